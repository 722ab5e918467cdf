"""Exercises: what their rows say, that they are a function of (seed, index), and that they keep
held-out combinations to themselves."""

import dataclasses

import numpy as np
import pytest
import tiny

from blip3o_jax.data.config import DataConfig
from blip3o_jax.errors import InputError
from blip3o_jax.presets import preset
from blip3o_jax.scenes import edits, exercises
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.heldout import held_out
from blip3o_jax.scenes.prompts import RELATIONS
from blip3o_jax.scenes.scene import PATCH_WORDS, patch_words
from blip3o_jax.scenes.sprites import COLORS, GROUNDS, OBJECTS

MODEL = preset("emoji_64")
TEXT = tiny.text(120)


def rows(
    kind: str, count: int = 100, seed: int = 0, **changes
) -> list[tuple[list[str], list[int], np.ndarray]]:
    """(words of the prompt, codes, row) of some rows of one kind."""
    world = WorldConfig(seed=seed, **changes)
    found = []
    for index in range(count):
        row = exercises.exercise(TEXT, world, {kind: 1.0}, 195, index)
        written = row["tokens"][row["tokens"] != MODEL.vocab.pad_token_id].tolist()
        codes = [
            i - MODEL.vocab.image_start_token_id
            for i in written
            if i >= MODEL.vocab.image_start_token_id
        ]
        words = [
            TEXT.tokenizer.id_to_token(i).removeprefix("Ġ")
            for i in written
            if i < MODEL.vocab.image_start_token_id
        ]
        found.append((words, codes, row))
    return found


def names(codes: list[int]) -> list[str]:
    return [PATCH_WORDS[code].split()[0] for code in codes]


def test_a_recital_says_its_words_again_in_either_order():
    orders = set()
    for _, _, row in rows("recital", 40):
        written = row["tokens"][row["tokens"] != MODEL.vocab.pad_token_id].tolist()
        said = [exercises._said(TEXT).get(word, word) for word in written[: exercises.RECITED]]
        backwards = written[exercises.RECITED + 1] == MODEL.vocab.scale_start_token_id
        assert written[-exercises.RECITED :] == (said[::-1] if backwards else said)
        assert row["weights"].sum() == exercises.RECITED
        assert row["weights"][len(written) - 1] == 1
        assert row["weights"][len(written) - exercises.RECITED - 1] == 0
        assert len(set(written[: exercises.RECITED])) == exercises.RECITED
        orders.add(backwards)
    assert orders == {True, False}


def test_a_sketch_says_things_in_the_order_of_the_prompt_and_of_the_relation():
    relations = set()
    for words, codes, _ in rows("sketch", 200, extra=0.0):
        said = names(codes[::3])
        things = [w for w in words if w in OBJECTS]
        relation = next((r for r in RELATIONS if r.split()[0] in words), None)
        if len(things) == 2:
            relations.add(relation)
            assert said == (things[::-1] if relation in ("right of", "below") else things)
    assert relations == {None, *RELATIONS}


def test_a_sketch_keeps_the_places_of_the_picture():
    for (words, codes, sketch), (same, whole, picture) in zip(
        rows("sketch", 40), rows("picture", 40), strict=True
    ):
        assert words == [w for w in same if w != "<im_end>"]
        start = int(np.flatnonzero(picture["weights"])[0])
        assert len(whole) == 64
        assert picture["weights"].sum() == 65
        drawn = sketch["positions"][start : start + len(codes)] - start
        assert [whole[place] for place in drawn] == codes
        assert sketch["weights"].sum() == len(codes)
        assert len(codes) % 3 == 0


def test_a_sketch_of_a_word_is_its_letters_upper_halves():
    for words, codes, row in rows("sketch", 40, text=1.0):
        written = words[words.index('"') + 1 :]
        spelled = written[: written.index('"')]
        assert [PATCH_WORDS[code] for code in codes] == [f"{x} top" for x in spelled]
        assert row["weights"].sum() == len(spelled)


def test_what_a_row_shows_does_not_depend_on_its_kind():
    """Of sketches and of pictures half are of words."""
    world, counts = WorldConfig(text=0.5), {"sketch": [0, 0], "picture": [0, 0]}
    for index in range(300):
        row = exercises.exercise(TEXT, world, {"sketch": 1.0, "picture": 1.0}, 195, index)
        words = TEXT.tokenizer.decode(row["tokens"].tolist())
        # Only pictures show the ground everywhere.
        kind = "picture" if row["weights"].sum() > 32 else "sketch"
        counts[kind]['the word "' in words] += 1
    assert min(min(pair) for pair in counts.values()) > 50


def test_an_edit_holds_both_pictures_and_counts_ground_that_stays_little():
    for index in range(40):
        row = exercises.exercise(TEXT, WorldConfig(), {"edit": 1.0}, 195, index)
        edit = edits.draw(WorldConfig(), index, composed_edits=exercises.COMPOSED)
        image = row["tokens"] - MODEL.vocab.image_start_token_id
        places = np.flatnonzero(image >= 0)
        before, after = (patch_words(scene).ravel() for scene in (edit.before, edit.after))
        np.testing.assert_array_equal(image[places], [*before, *after])
        weights = row["weights"][places]
        np.testing.assert_array_equal(weights[:64], 0)
        is_ground = np.isin(np.array(PATCH_WORDS)[after], list(GROUNDS))
        expected = np.where((after == before) & is_ground, exercises.KEPT, 1)
        np.testing.assert_array_equal(weights[64:], expected)
        assert 0 < (expected == 1).sum() < 64 or "ground" in edit.kind
        # Nothing else counts but the sign after the image.
        end = places[-1] + 1
        assert row["tokens"][end] == MODEL.vocab.image_end_tag_id
        assert row["weights"].sum() == weights.sum() + row["weights"][end]
        np.testing.assert_array_equal(row["positions"][: end + 1], np.arange(end + 1))
        words = TEXT.tokenizer.decode(row["tokens"][: places[0]].tolist())
        assert edit.instruction in " ".join(words.split())


@pytest.mark.parametrize("kind", ["recital", "sketch", "edit"])
def test_rows_are_a_function_of_seed_and_index(kind):
    first, again, other = (rows(kind, 5, seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert all(np.array_equal(a[2][name], b[2][name]) for name in a[2])
        assert not np.array_equal(a[2]["tokens"], c[2]["tokens"])


def test_no_row_pairs_what_is_held_out():
    held = held_out()
    for words, codes, _ in rows("recital", 200):
        said = {*words, *names(codes)}
        assert not any(set(pair) <= said for pair in (*held.pairs, *held.colors, *held.grounds))
    for words, _, _ in rows("sketch", 300):
        things = [w for w in words if w in OBJECTS]
        colored = {
            (words[i + 1], w)
            for i, w in enumerate(words)
            if w in COLORS and words[i + 1] in OBJECTS
        }
        assert not colored & held.colors
        assert not any(set(pair) <= set(things) for pair in held.pairs)


def test_a_row_that_is_too_short_is_named():
    with pytest.raises(
        InputError, match=r"recital of 3[34] tokens does not fit data.row_length 20"
    ):
        exercises.exercise(TEXT, WorldConfig(), {"recital": 1.0}, 20, 0)


def test_bad_shares():
    with pytest.raises(InputError, match="Unknown exercise 'recitals'; did you mean 'recital'"):
        DataConfig(exercises={"recitals": 1.0}, row_length=40)
    with pytest.raises(InputError, match=r"need data.row_length"):
        DataConfig(exercises={"recital": 1.0})
    with pytest.raises(InputError, match="shares"):
        dataclasses.replace(DataConfig(), exercises={"recital": 0.0}, row_length=40)
    for share in (-1.0, "1", True, float("nan")):
        with pytest.raises(InputError, match="shares above 0"):
            DataConfig(exercises={"sketch": 2.0, "recital": share}, row_length=40)
        with pytest.raises(InputError, match=r"data\.weights are shares above 0"):
            DataConfig(weights={"counting": share, "colors": 1.0})
    for name in ("text_fraction", "edits", "extra"):
        with pytest.raises(InputError, match=rf"data\.{name} is in \[0, 1\], not 1\.5"):
            DataConfig(**{name: 1.5})
