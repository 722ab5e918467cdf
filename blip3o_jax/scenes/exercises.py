"""What the transformer is pretrained on before it sees pictures: rows of tokens, made on demand.

- recital: words, and the same words again as image tokens, forwards or, after another sign,
  backwards;
- sketch: a scene's prompt, then each sprite's first three patches, at their places;
- picture: a scene's prompt and all of its image;
- edit: an instruction, a scene's image and all of the image after the edit.

A transformer that starts at random learns to copy words from recitals within a hundred steps, as
there is nothing to memorise, and then applies it to sketches and pictures, whose things follow the
order of the prompt (prompts._layouts). From pictures alone it hardly does: which colour belongs to
which object is one bit in a hundred tokens. Of an edit most tokens are ground that stays, which is
soon learned and counts little; which of the things is meant is seen on all of them. No scene holds
a held-out combination, and no recital both words of one.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from blip3o_jax.errors import require
from blip3o_jax.scenes import edits, prompts
from blip3o_jax.scenes.config import EXERCISES, WorldConfig
from blip3o_jax.scenes.heldout import held_out
from blip3o_jax.scenes.scene import PATCH_WORDS, SKETCH_WORDS, Scene, patch_words
from blip3o_jax.scenes.sprites import GROUNDS
from blip3o_jax.text import Text, right_pad

RECITED = 16  # words of a recital
GROUND_WORDS = np.isin(PATCH_WORDS, tuple(GROUNDS))
COMPOSED = 0.5  # share of the edits that are two at once, so that the first thing is not a guess
IMAGE = 64  # tokens of a picture
KEPT = 0.25  # what a patch of ground counts that an edit leaves as it is

# ids, places, and what the prediction of each id counts
Row = tuple[list[int], list[int], list[float]]


@lru_cache
def _forbidden() -> frozenset[frozenset[str]]:
    """Pairs of words that no recital may hold."""
    held = held_out()
    return frozenset(map(frozenset, (*held.pairs, *held.colors, *held.grounds)))


def name_ids(text: Text) -> np.ndarray:
    """The id of the word that names each of the embedded world's codes, -1 where the vocabulary has
    none."""
    ids = [text.tokenizer.token_to_id("Ġ" + word.split()[0]) for word in PATCH_WORDS]
    ids += [None] * (text.vocab.num_image_tokens - len(ids))
    return np.array([-1 if i is None else i for i in ids], np.int32)


@lru_cache
def _said(text: Text) -> dict[int, int]:
    """Id of a word -> id of the first image token that is named by it."""
    first: dict[int, int] = {}
    for code, word in enumerate(name_ids(text).tolist()):
        if word >= 0:
            first.setdefault(word, text.vocab.image_start_token_id + code)
    return first


@lru_cache
def _words(text: Text) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the words that image tokens say, and of all others."""
    said = _said(text)
    others = [i for i in range(256, text.vocab.pad_token_id) if i not in said]
    return np.array(list(said)), np.array(others)


def _recital(rng: np.random.Generator, text: Text) -> Row:
    # Distinct words, mostly of those that image tokens say, none of a held-out pair.
    said = _said(text)
    shown, others = _words(text)
    words: dict[int, str] = {}
    while len(words) < RECITED:
        word = int(rng.choice(shown if rng.random() < 0.75 else others))
        name = text.tokenizer.id_to_token(word).removeprefix("Ġ")
        pairs = {frozenset((name, other)) for other in words.values()}
        if word not in words and not pairs & _forbidden():
            words[word] = name
    # A sign (a prompt ends with both), then the same again, at random places of the image.
    backwards = rng.random() < 0.5
    signs = [text.vocab.image_start_tag_id] + [text.vocab.scale_start_token_id] * backwards
    again = [said.get(word, word) for word in words]
    ids = [*words, *signs, *(again[::-1] if backwards else again)]
    first = int(rng.integers(0, IMAGE))
    return ids, list(range(first, first + len(ids))), [0.0] * (len(ids) - RECITED) + [1.0] * RECITED


def _scene(text: Text, prompt: str, scene: Scene, sketch: bool) -> Row:
    ids, patches = text.encode_prompt(prompt), patch_words(scene).ravel()
    drawn = np.flatnonzero(SKETCH_WORDS[patches]) if sketch else np.arange(IMAGE)
    image = (text.vocab.image_start_token_id + patches[drawn].astype(int)).tolist()
    places = [*range(len(ids)), *(len(ids) + drawn).tolist()]
    if not sketch:
        image.append(text.vocab.image_end_tag_id)
        places.append(len(ids) + IMAGE)
    return ids + image, places, [0.0] * len(ids) + [1.0] * len(image)


def _edit(text: Text, edit: edits.Edit) -> Row:
    before, after = (patch_words(scene).ravel().astype(int) for scene in (edit.before, edit.after))
    ids = text.encode_edit(edit.instruction, before[None])
    image = (text.vocab.image_start_token_id + after).tolist()
    counts = np.where((after == before) & GROUND_WORDS[after], KEPT, 1.0).tolist()
    ids, counts = [*ids, *image, text.vocab.image_end_tag_id], [*[0.0] * len(ids), *counts, KEPT]
    return ids, list(range(len(ids))), counts


def exercise(
    text: Text, world: WorldConfig, shares: Mapping[str, float], length: int, index: int
) -> dict[str, np.ndarray]:
    """Row `index`, a pure function of (world, shares, index): `tokens` and `positions` int32
    [length], padded on the right, and `weights` f32 [length], what the prediction of each token
    counts.

    `shares` are those of `EXERCISES`. InputError when the row does not fit.
    """
    # The kind, then the row's ids, positions and weights.
    rng = prompts.generator(world, index, "train", 5)  # no prompt depends on the kind
    weights = np.array([shares.get(kind, 0.0) for kind in EXERCISES])
    kind = EXERCISES[rng.choice(len(EXERCISES), p=weights / weights.sum())]
    if kind == "recital":
        ids, places, counts = _recital(rng, text)
    elif kind == "edit":
        ids, places, counts = _edit(text, edits.draw(world, index, composed_edits=COMPOSED))
    else:
        metadata, scene = prompts.sample(world, index)
        ids, places, counts = _scene(text, metadata["prompt"], scene, kind == "sketch")
    size = len(ids)
    require(size <= length, f"A {kind} of {size} tokens does not fit data.row_length {length}.")
    return {
        "tokens": right_pad([ids], length, text.vocab.pad_token_id)[0][0],
        "positions": right_pad([places], length, 0)[0][0],
        "weights": np.pad(np.array(counts, np.float32), (0, length - size)),
    }
