"""The reward for written words: its formula, what it has nothing to say of, and what it reads."""

import importlib.util
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax.errors import InputError
from blip3o_jax.rl.rewards import ocr
from blip3o_jax.rl.rewards.protocol import named
from blip3o_jax.scenes.scene import Scene, compose

needs_reader = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr") is None, reason="needs rapidocr (extra [ocr])"
)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ('a sign that says "Open Now" at night', "opennow"),
        ('"A" over "B"', "a"),
        ('say "it', ""),
        ('say "" and "x"', ""),
        ('say "  "', ""),
        ("say it", ""),
    ],
)
def test_what_is_asked_for_stands_in_the_first_double_quotes(prompt, asked):
    assert ocr.quoted(prompt) == asked


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert ocr.edit_distance(a, b) == ocr.edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("text", "asked", "reward"),
    [
        ("open", "open", 1.0),
        ("weareopen24h", "open", 1.0),  # a part of what is read
        ("opan", "open", 0.75),
        ("", "open", 0.0),
        ("something quite else", "open", 0.0),  # never below
        ("oopeen", "open", 0.5),
    ],
)
def test_the_reward_is_the_share_of_the_characters_that_are_right(text, asked, reward):
    assert ocr.agreement(text, asked) == reward


def test_prompts_that_quote_nothing_are_not_judged(monkeypatch):
    monkeypatch.setattr(ocr, "read", lambda image: "hi")
    image = np.zeros((8, 8, 3), np.uint8)
    one, *others = ocr.ocr([image] * 3, ['"Hi"', '""', "Hi"])
    assert one == 1.0
    assert all(map(math.isnan, others))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the extra \[ocr\]; install it with"):
        named("ocr")


@needs_reader
def test_words_of_the_embedded_world_are_read():
    scenes = [Scene((), "gray", "CAT"), Scene((), "cream", "HELLO"), Scene((), "gray", "CAT")]
    images = [compose(scene) for scene in scenes]
    asked = ['the word "CAT"', 'the word "hello" on cream', 'the word "DOG"']
    right, also, wrong = named("ocr")(images, asked, [{}] * 3)
    assert (right, also) == (1.0, 1.0)
    assert wrong < 1
    blank = np.full((64, 64, 3), 200, np.uint8)
    assert ocr.read(blank) == ""


@needs_reader
def test_a_sentence_in_two_lines_is_read():
    image = Image.new("RGB", (384, 192), "white")
    draw = ImageDraw.Draw(image)
    for line, top in (("Open today", 20), ("until seven", 100)):
        draw.text((20, top), line, "navy", ImageFont.load_default(48))
    asked = ['a sign: "open today until seven"', 'a sign: "seven"', 'a sign: "until nine"']
    assert ocr.read(np.asarray(image)) == "opentodayuntilseven"
    whole, part, other = named("ocr")([np.asarray(image)] * 3, asked, [{}] * 3)
    assert (whole, part) == (1.0, 1.0)
    # Further from it than it is long: the distance is from all that is read.
    assert other == 0.0


@needs_reader
def test_channels_are_in_the_readers_order(monkeypatch):
    seen = []
    monkeypatch.setattr(ocr, "_reader", lambda: lambda image: seen.append(image) or Empty())
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 255
    ocr.read(red)
    np.testing.assert_array_equal(seen[0][0, 0], [0, 0, 255])


class Empty:
    txts = None
