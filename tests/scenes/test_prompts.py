"""Scenes and prompts: same seed, same bytes; a prompt and its scene agree; training never sees what
is held out."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from blip3o_jax.errors import InputError
from blip3o_jax.scenes.config import FURTHER_TAGS, TAGS, WorldConfig
from blip3o_jax.scenes.heldout import held_out
from blip3o_jax.scenes.instructions import said_color
from blip3o_jax.scenes.prompts import EXTRA, sample
from blip3o_jax.scenes.scene import PATCH_WORDS, Scene, Thing, compose, patch_words
from blip3o_jax.scenes.sprites import GROUNDS, OBJECTS, PLURALS

SCENE = Scene(
    (Thing("cat", None, 0, 5), Thing("key", "blue", 3, 0), Thing("fish", "red", 5, 3)), "cream"
)


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def test_golden_pictures():
    """The pictures are part of the benchmark: a change of art, colours or layout must be
    deliberate."""
    assert digest(compose(SCENE), patch_words(SCENE)) == "e6ec322216e158b8"
    assert digest(compose(Scene((), "pink", "QUIZ"))) == "8882ff109dd5e2d4"


def test_held_out_lists_are_fixed():
    held = held_out()
    assert [len(s) for s in (held.colors, held.pairs, held.counts, held.grounds, held.words)] == [
        20,
        42,
        8,
        21,
        30,
    ]
    text = repr(
        [
            sorted(held.colors),
            sorted(map(sorted, held.pairs)),
            sorted(held.counts),
            sorted(held.grounds),
            sorted(held.words),
        ]
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "dfe65996c836671a"


def test_the_share_of_named_grounds_is_as_asked():
    def share(named_ground):
        world = WorldConfig(weights={"colors": 1.0}, extra=0.0, named_ground=named_ground)
        return np.mean(["ground" in sample(world, i)[0] for i in range(400)])

    assert share(0.0) == 0.0
    assert share(1.0) == 1.0
    assert abs(share(0.75) - 0.75) < 0.08


def test_sample_is_a_function_of_seed_and_index():
    world, other = (WorldConfig(seed=seed, text=0.1) for seed in (3, 4))
    first = [sample(world, i) for i in range(50)]
    assert [sample(world, i) for i in reversed(range(50))] == first[::-1]
    assert [sample(other, i) for i in range(50)] != first
    assert [sample(world, i, "heldout") for i in range(50)] != first


def test_training_never_composes_held_out():
    world = WorldConfig(text=0.1)
    samples = [sample(world, i) for i in range(5000)]
    assert [held_out().combinations(scene) for _, scene in samples] == [[]] * 5000
    kinds = Counter((m["tag"], m.get("extra", False)) for m, _ in samples)
    assert set(kinds) == {(tag, False) for tag in (*TAGS, "text")} | {(tag, True) for tag in EXTRA}
    assert kinds["color_attr", False] > kinds["single_object", False]
    assert any(m["prompt"].startswith("a photo of") for m, _ in samples)


@pytest.mark.parametrize("tag", [*TAGS, *FURTHER_TAGS])
def test_held_out_prompts_ask_for_the_unseen(tag):
    held, with_color = held_out(), 0
    world = WorldConfig(weights={tag: 1})
    for i in range(100):
        metadata, scene = sample(world, i, "heldout")
        found = held.combinations(scene)
        nouns = {item["class"] for item in metadata["include"]}
        if tag in ("two_object", "position", "color_attr"):
            assert nouns in held.pairs
            with_color += len(found) == 2
        elif tag in FURTHER_TAGS:
            assert len(found) == 1
            assert found[0] <= nouns
            colored = [thing for thing in scene.things if thing.color]
            assert len(colored) == (tag == "one_color")
            assert len(nouns) == len(scene.things)
            assert len(nouns) == 3 or (tag == "one_color" and 2 <= len(nouns) <= 4)
        elif tag == "colors":
            assert found == [(metadata["include"][0]["class"], metadata["include"][0]["color"])]
        elif tag == "counting":
            assert found == [(metadata["include"][0]["class"], metadata["include"][0]["count"])]
        else:
            assert found == [(metadata["include"][0]["class"], metadata["ground"])]
    assert 30 < with_color < 70 if tag == "color_attr" else with_color == 0


def test_scene_has_what_the_prompt_says_and_nothing_else():
    world = WorldConfig(seed=1, text=0.1)
    for i in range(1500):
        metadata, scene = sample(world, i, ("train", "heldout")[i % 2])
        words = metadata["prompt"].replace(",", "").split()
        wanted = Counter()
        for item in metadata["include"]:
            wanted[item["class"], item.get("color")] += item["count"]
            assert item["class"] in words or PLURALS[item["class"]] in words
        # One coloured thing beside others: those keep the colour that they have anyway.
        color = said_color if metadata["tag"] == "one_color" else lambda thing: thing.color
        assert Counter((t.object, color(t)) for t in scene.things) == wanted
        assert metadata.get("ground", scene.ground) == scene.ground
        assert (words[-2:] == ["on", scene.ground]) == ("ground" in metadata)
        assert metadata.get("word") == scene.word
        if metadata["tag"] == "position":
            relation, target = metadata["include"][1]["position"]
            place = {t.object: np.array([t.row, t.column]) for t in scene.things}
            down, right = (
                place[metadata["include"][1]["class"]] - place[metadata["include"][target]["class"]]
            )
            signs = {"left of": -right, "right of": right, "above": -down, "below": down}
            assert max(signs, key=signs.get) == relation
            assert signs[relation] >= 3


def test_wording():
    world = WorldConfig(text=0.05)
    prompts = [sample(world, i)[0]["prompt"] for i in range(5000)]
    assert not [p for p in prompts if " a a" in f" {p}" or " a o" in f" {p}" or " a u" in f" {p}"]
    assert any(p.startswith("an orange") for p in prompts)
    assert any(p.count(" and ") == 2 for p in prompts)
    assert any(p.count(", ") == 1 and p.count(" and ") == 1 for p in prompts)
    assert any("butterflies" in p for p in prompts)
    assert not any("fishs" in p or "fishes" in p for p in prompts)


def test_patch_words_name_every_patch():
    words = [PATCH_WORDS[i] for i in patch_words(SCENE)[:4].ravel()]
    assert words[5:8] == ["cat 0", "natural 1", "cat 2"]
    assert words[24:27] == ["key 0", "blue 1", "key 2"]
    assert words[0] == "cream"
    letters = patch_words(Scene((), "gray", "AT"))[3:5, 3:5]
    assert [PATCH_WORDS[i] for i in letters.ravel()] == ["A top", "T top", "A bottom", "T bottom"]
    assert len(set(PATCH_WORDS)) == 225


def test_one_thing_changes_its_own_patches_only():
    blue, red, star = (Scene((Thing("key", "green", 0, 0), thing), "white") for thing in changed())
    for other, kind in ((red, [0, 1] * 4 + [0]), (star, [1, 0] * 4 + [1])):
        words = patch_words(blue) != patch_words(other)
        pixels = np.any((compose(blue) != compose(other)).reshape(8, 8, 8, 8, 3), axis=(1, 3, 4))
        assert np.array_equal(words[2:5, 4:7], np.reshape(kind, (3, 3)))
        words[2:5, 4:7] = pixels[2:5, 4:7] = False
        assert not words.any()
        assert not pixels.any()
    ground = Scene(blue.things, "pink")
    assert (patch_words(blue) != patch_words(ground)).sum() == 64 - 2 * 9


def changed() -> list[Thing]:
    return [Thing("heart", "blue", 2, 4), Thing("heart", "red", 2, 4), Thing("star", "blue", 2, 4)]


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (Scene((Thing("cat", None, 0, 0), Thing("dog", None, 2, 2)), "white"), "overlap"),
        (Scene((Thing("cat", None, 0, 6),), "white"), "outside"),
        (Scene((Thing("unicorn", None, 0, 0),), "white"), "unicorn"),
        (Scene((), "black"), "black"),
        (Scene((), "white", "hello"), "hello"),
        (Scene((Thing("cat", None, 2, 2),), "white", "CAT"), "overlap"),
    ],
)
def test_impossible_scenes_are_refused(scene, message):
    with pytest.raises(InputError, match=message):
        compose(scene)


def test_unknown_split_and_tag():
    with pytest.raises(InputError, match="heldout"):
        sample(WorldConfig(), 0, "held_out")
    with pytest.raises(InputError, match="colors"):
        WorldConfig(weights={"color": 1})


def test_art():
    assert len(OBJECTS) == 28
    assert len(GROUNDS) == 5
