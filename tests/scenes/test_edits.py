"""Edits: the same for the same arguments, one change each, words that mean one thing, and nothing
that is held out in training."""

import dataclasses
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from blip3o_jax.errors import InputError
from blip3o_jax.resources import ASSETS
from blip3o_jax.scenes import edits
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.edits import INVERSES, KINDS, Edit, composed, draw, inverted, region, sample
from blip3o_jax.scenes.heldout import held_out
from blip3o_jax.scenes.instructions import WORDINGS, instructions, names, num_tokens, places
from blip3o_jax.scenes.judge import judge_edit
from blip3o_jax.scenes.scene import Scene, Thing, compose
from blip3o_jax.text import edit_prompt, load_tokenizer

WORLD = WorldConfig()


def changes(edit: Edit) -> tuple[set[Thing], set[Thing]]:
    """What is gone and what is new."""
    before, after = set(edit.before.things), set(edit.after.things)
    return before - after, after - before


@pytest.fixture(scope="module")
def training() -> list[Edit]:
    return [sample(WORLD, i) for i in range(3000)]


@pytest.fixture(scope="module")
def compounds() -> list[Edit]:
    return [composed(WORLD, i) for i in range(300)]


def test_an_edit_is_a_function_of_seed_split_and_index(training):
    assert sample(WORLD, 7) == training[7]
    assert composed(WORLD, 7) == composed(WORLD, 7)
    other = dataclasses.replace(WORLD, seed=1)
    assert len({sample(WORLD, 7), sample(other, 7), sample(WORLD, 7, "heldout")}) == 3
    assert len(set(training)) > 2990


def test_weights_are_the_shares_of_kinds(training):
    counts = Counter(edit.kind for edit in training)
    assert set(counts) == set(KINDS)
    assert counts["recolor"] / counts["move"] == pytest.approx(1.6, rel=0.2)
    assert counts["recolor"] / counts["ground"] == pytest.approx(8, rel=0.3)
    assert {sample(WORLD, i, weights={"move": 1.0}).kind for i in range(20)} == {"move"}
    with pytest.raises(InputError, match=r"Unknown kind 'recolour'; .*recolor"):
        sample(WORLD, 0, weights={"recolour": 1.0})
    with pytest.raises(InputError, match="Unknown split 'test'"):
        sample(WORLD, 0, "test")


def test_exactly_one_thing_changes(training):
    for edit in training:
        gone, new = changes(edit)
        kind, old, young = edit.kind, next(iter(gone), None), next(iter(new), None)
        expected = {"ground": (0, 0), "add": (0, 1), "remove": (1, 0)}.get(kind, (1, 1))
        assert (len(gone), len(new)) == expected
        assert (edit.before.ground != edit.after.ground) == (kind == "ground")
        if kind == "recolor":
            assert dataclasses.replace(old, color=young.color) == young
        if kind == "replace":
            assert (old.row, old.column) == (young.row, young.column)
            assert old.object != young.object
        if kind == "move":
            assert dataclasses.replace(old, row=young.row, column=young.column) == young
            assert max(abs(old.row - young.row), abs(old.column - young.column)) >= 2
        assert 0 < len(edit.before.things) <= 4
        assert (compose(edit.before) != compose(edit.after)).any()


def test_numbers_of_things_and_namesakes(training):
    numbers = Counter(len(edit.before.things) for edit in training)
    assert min(numbers[n] for n in (1, 2, 3, 4)) > 200
    namesakes = [len({t.object for t in e.before.things}) < len(e.before.things) for e in training]
    assert 0.2 < np.mean(namesakes) < 0.6


def test_the_inverse_is_an_instruction_for_the_way_back(training):
    for edit in training[:300]:
        back = inverted(edit)
        assert back.kind == INVERSES[edit.kind]
        assert (back.before, back.after) == (edit.after, edit.before)
        assert edit.instruction in instructions(edit.kind, edit.before, edit.after)
        assert edit.inverse in instructions(back.kind, back.before, back.after)
        assert inverted(back) == edit


def test_training_never_composes_what_is_held_out(training, compounds):
    for edit in (*training, *compounds):
        assert held_out().combinations(edit.before) == []
        assert held_out().combinations(edit.after) == []


@pytest.mark.parametrize("kind", KINDS)
def test_heldout_edits_ask_for_what_is_held_out(kind):
    held = held_out()
    allowed = {"recolor": held.colors, "ground": held.grounds}.get(kind, held.pairs)
    for i in range(40):
        edit = sample(WORLD, i, "heldout", {kind: 1.0})
        before, after = map(held.combinations, (edit.before, edit.after))
        assert after
        assert set(after) <= allowed
        assert bool(before) == (kind in ("remove", "move"))
        if kind == "recolor":
            (thing,) = changes(edit)[1]
            assert after == [(thing.object, thing.color)]


LEFT, RIGHT = Thing("heart", "red", 0, 0), Thing("heart", "red", 0, 5)
BLUE, DOG = Thing("heart", "blue", 1, 3), Thing("dog", None, 4, 4)


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        ((DOG,), ["the dog"]),
        ((BLUE, DOG), ["the heart", "the blue heart"]),
        ((LEFT, RIGHT), ["the left heart", "the left red heart"]),
        ((RIGHT, LEFT), ["the right heart", "the right red heart"]),
        # neither left nor right of both, nor above them, and the only blue one
        ((BLUE, LEFT, RIGHT), ["the blue heart"]),
        # on a slant the rows tell, where they are far enough apart
        ((LEFT, Thing("heart", "red", 2, 4)), ["the top heart", "the top red heart"]),
        ((Thing("heart", "red", 2, 4), LEFT), ["the bottom heart", "the bottom red heart"]),
        ((LEFT, Thing("heart", "blue", 1, 4)), ["the red heart"]),
        # a natural heart is red too, and so neither is "the red heart"
        ((LEFT, Thing("heart", None, 0, 4)), ["the left heart", "the left red heart"]),
        ((Thing("heart", None, 0, 4), LEFT), ["the right heart"]),
        # below both of them
        ((Thing("heart", "green", 5, 3), LEFT, RIGHT), ["the bottom heart", "the green heart"]),
    ],
)
def test_names_mean_one_thing(things, expected):
    assert names(things, things[0]) == expected


def test_a_name_belongs_to_one_thing(training):
    for edit in training[:500]:
        every = [n for t in edit.before.things for n in names(edit.before.things, t)]
        assert len(every) == len(set(every))


def test_places_of_an_empty_picture():
    assert places(()) == {
        (0, 0): ["top left"],
        (0, 2): ["top middle"],
        (0, 5): ["top right"],
        (2, 0): ["middle left"],
        (2, 2): ["middle"],
        (2, 5): ["middle right"],
        (5, 0): ["bottom left"],
        (5, 2): ["bottom middle"],
        (5, 5): ["bottom right"],
    }


def test_places_make_room_for_things():
    spots = places((Thing("dog", None, 0, 2),))
    # no free cell of the two upper rows is in the middle third
    assert "top middle" not in chain(*spots.values())
    assert spots[0, 5] == ["top right", "right of the dog"]
    assert spots[3, 2] == ["middle", "below the dog"]
    assert spots[3, 0] == ["middle left"]
    # nothing fits left of it, and above is outside
    assert not any("left of" in spot or "above" in spot for spot in chain(*spots.values()))


def test_a_move_goes_where_the_thing_is_not_yet():
    dog, key = Thing("dog", None, 3, 3), Thing("key", None, 3, 0)
    spots = list(chain(*places((dog, key), key).values()))
    assert "left of the dog" not in spots
    assert "middle left" not in spots
    # three cells to the right of the dog there is no room
    assert "right of the dog" not in spots
    assert {"above the dog", "below the dog", "bottom left"} - set(spots) == {"below the dog"}


def test_steps_are_as_long_as_a_sprite():
    before = Scene((Thing("cat", "red", 4, 1), DOG), "pink")
    after = Scene((Thing("cat", "red", 1, 1), DOG), "pink")
    words = instructions("move", before, after)
    assert {"move the cat up", "bring the red cat up"} <= set(words)
    assert "put the cat up" not in words
    shorter = Scene((Thing("cat", "red", 2, 1), DOG), "pink")
    assert not any(words.endswith("up") for words in instructions("move", before, shorter))


def test_compounds_are_two_edits(compounds):
    for edit in compounds:
        first, second = edit.kind.split(" and ")
        gone, new = changes(edit)
        number = {"ground": (0, 0), "add": (0, 1), "remove": (1, 0)}
        sizes = np.add(number.get(first, (1, 1)), number.get(second, (1, 1)))
        assert (len(gone), len(new)) == tuple(sizes)
        assert " and " in edit.instruction
        assert " and then " in edit.inverse
        assert inverted(edit).kind == f"{INVERSES[second]} and {INVERSES[first]}"


def test_draw_mixes_inverted_and_composed_edits():
    assert [draw(WORLD, i) for i in range(5)] == [sample(WORLD, i) for i in range(5)]
    assert draw(WORLD, 3, "train", 1.0, 1.0) == inverted(composed(WORLD, 3))
    drawn = [draw(WORLD, i, "train", 0.25, 0.5) for i in range(200)]
    assert 0.35 < np.mean([" and " in edit.kind for edit in drawn]) < 0.65


def test_instructions_fit_the_rows_of_the_embedded_model(training, compounds):
    tokenizer = load_tokenizer(ASSETS / "emoji_64" / "tokenizer.json")
    for edit in (*training[:500], *compounds):
        for words in (edit.instruction, edit.inverse):
            size = len(tokenizer.encode(edit_prompt(words, 1, 0)).ids)
            assert size == num_tokens(words) + 34
            assert size <= 64


def test_every_kind_has_five_wordings():
    assert min(map(len, WORDINGS.values())) >= 5
    assert set(WORDINGS) == set(KINDS)


def test_region_is_what_changes_and_a_margin():
    thing = Thing("book", "red", 2, 1)
    mask = region(Edit("add", "", "", Scene((), "white"), Scene((thing,), "white")))
    changed = (compose(Scene((), "white")) != compose(Scene((thing,), "white"))).any(axis=-1)
    rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
    grown = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
    assert mask.shape == (64, 64)
    assert mask[changed].all()
    assert [grown[0][0], grown[0][-1]] == [rows[0] - 3, rows[-1] + 3]
    assert [grown[1][0], grown[1][-1]] == [columns[0] - 3, columns[-1] + 3]
    assert region(edits.sample(WORLD, 0, weights={"ground": 1.0})).mean() > 0.3


def test_the_judge_tells_true_edits_from_none_and_others():
    """120 edits; of 600: 100 % right, none of 600 sources, none of 1,200 other edits."""
    drawn = [sample(WORLD, i, "heldout" if i % 2 else "train") for i in range(120)]
    after = [compose(edit.after) for edit in drawn]
    for i, edit in enumerate(drawn):
        right = {"done": True, "kept": True, "success": True, "score": 1.0, "reason": ""}
        assert judge_edit(after[i], edit) == right
        unchanged = judge_edit(compose(edit.before), edit)
        assert (unchanged["done"], unchanged["kept"]) == (False, True)
        assert not judge_edit(after[i - 1], edit)["success"]


CAT, KEY = Thing("cat", "red", 0, 0), Thing("key", "blue", 3, 3)
BLUE_CAT = dataclasses.replace(CAT, color="blue")


@pytest.mark.parametrize(
    ("things", "ground", "done", "kept", "reason"),
    [
        ((BLUE_CAT, KEY), "pink", True, True, ""),
        # a cell off, and two
        ((dataclasses.replace(BLUE_CAT, row=1), KEY), "pink", True, True, ""),
        (
            (dataclasses.replace(BLUE_CAT, column=2), KEY),
            "pink",
            False,
            False,
            "no blue cat at its place; blue cat besides",
        ),
        ((CAT, KEY), "pink", False, True, "no blue cat at its place; red cat still there"),
        ((BLUE_CAT,), "pink", True, False, "no blue key at its place"),
        ((BLUE_CAT, KEY), "gray", True, False, "ground gray instead of pink"),
        ((BLUE_CAT, KEY, Thing("apple", None, 0, 5)), "pink", True, False, "red apple besides"),
        (
            (BLUE_CAT, Thing("key", "red", 3, 3)),
            "pink",
            True,
            False,
            "no blue key at its place; red key besides",
        ),
    ],
)
def test_the_judge_says_what_is_wrong(things, ground, done, kept, reason):
    edit = Edit("recolor", "", "", Scene((CAT, KEY), "pink"), Scene((BLUE_CAT, KEY), "pink"))
    verdict = judge_edit(compose(Scene(things, ground)), edit)
    # Two things after, one that should have gone, and the ground.
    score = 1 - len(reason.split("; ") if reason else ()) / 4
    right = {"done": done, "kept": kept, "success": done and kept, "score": score}
    assert verdict == right | {"reason": reason}


def test_the_judge_wants_the_new_ground_and_nothing_shapeless():
    edit = Edit("ground", "", "", Scene((CAT, KEY), "pink"), Scene((CAT, KEY), "cyan"))
    verdict = judge_edit(compose(Scene((CAT, KEY), "white")), edit)
    assert (verdict["done"], verdict["kept"]) == (False, True)
    image = compose(edit.after)
    image[50:, :14] = 0
    assert judge_edit(image, edit)["reason"] == "196 px of something else"
