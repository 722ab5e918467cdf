"""The words of the embedded world, against prompts and instructions as they are drawn."""

import pytest

from blip3o_jax.scenes import edits, lexicon, prompts
from blip3o_jax.scenes.config import WorldConfig


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_all_that_is_drawn_is_of_known_words(split):
    world = WorldConfig(seed=7, text=0.2)
    texts = [prompts.sample(world, i, split)[0]["prompt"] for i in range(300)]
    assert set(lexicon.words_of(texts)) <= lexicon.of_prompts()
    drawn = [edits.draw(world, i, split, 0.5, 0.3) for i in range(40)]
    texts = [text for edit in drawn for text in (edit.instruction, edit.inverse)]
    assert set(lexicon.words_of(texts)) <= lexicon.of_instructions()


def test_the_lexicons_hold_words_and_no_slots_numbers_or_letters():
    assert len(lexicon.of_prompts()) == 81
    assert lexicon.of_prompts() >= {
        "an",
        "and",
        "on",
        "photo",
        "of",
        "left",
        "cacti",
        "fish",
        "four",
    }
    assert not {"thing", "color", "one", "it", "remove", "", "A", "NN"} & lexicon.of_prompts()
    assert lexicon.of_instructions() >= {
        "in",
        "to",
        "the",
        "natural",
        "then",
        "and",
        "middle",
        "up",
    }
    assert not {"thing", "new", "where", "ground", "two", "on", "it"} & lexicon.of_instructions()


def test_quoted_letters_are_no_words():
    texts = ['the word "NEW YORK" on gray', "a T-shirt, a cat's hat; 2 hats (blue)", "a cat"]
    assert lexicon.words_of(texts) == [
        *("the", "word", "on", "gray", "a", "T-shirt", "cat's", "hat", "2", "hats", "blue", "cat")
    ]
