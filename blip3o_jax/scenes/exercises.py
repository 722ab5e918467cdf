"""What the transformer practises before it is shown pictures; rows of tokens alone, made as they are needed.

    recital    words, and the same words again as image tokens, forwards or, by another sign, backwards
    dictation  a prompt for things, then of each its first three patches (thing, colour, thing), in the order of their relation, or in any
    sketch     a scene's prompt, then each sprite's first three patches, at their places
    picture    a scene's prompt and all of its image

To say a word again, and to say of a thing the word that stood before it, is what Qwen3 brings along from text. A transformer that starts at
random does not find it in pictures: which of two colours is whose is one bit among a hundred tokens, and the pairs of training are learned
by heart before. In a recital nothing can be learned by heart.

No row holds a held-out combination.
"""

from functools import lru_cache

import numpy as np

from blip3o_jax.config import ConfigError
from blip3o_jax.scenes import prompts
from blip3o_jax.scenes.heldout import held_out
from blip3o_jax.scenes.scene import _FIRST_LOOK, LOOKS, PATCH_WORDS, SKETCH_WORDS, Scene, Thing, patch_words
from blip3o_jax.scenes.sprites import COLORS, GROUNDS, OBJECTS
from blip3o_jax.text import Text
from blip3o_jax.train.data_config import EXERCISES, DataConfig

RECITED = 16  # words of a recital
DICTATED = 4  # things of a dictation, at most; they are coloured, but for half of those with a relation
RELATED = 0.3  # share of dictations of two things and their relation
IMAGE = 64  # places of an image, over which what is said is spread
EASY = 0.5  # weight of a token that the row does not determine, as which thing comes next

Row = tuple[list[int], list[int], list[float]]  # ids, places, and what the prediction of each id counts


@lru_cache
def _forbidden() -> frozenset[frozenset[str]]:
    """Pairs of words that no recital may hold: the held-out combinations, unordered."""
    held = held_out()
    return frozenset(map(frozenset, (*held.pairs, *held.colors, *held.grounds)))


@lru_cache
def _said(text: Text) -> dict[int, int]:
    """Id of a word -> id of the first image token that is named by it."""
    found: dict[int, int] = {}
    for code, name in enumerate(PATCH_WORDS):
        word = text.tokenizer.token_to_id("Ġ" + name.split()[0])
        if word is not None:
            found.setdefault(word, text.vocab.image_start_token_id + code)
    return found


def _recital(rng: np.random.Generator, text: Text) -> Row:
    said, forbidden = _said(text), _forbidden()
    words: list[int] = []
    names: list[str] = []
    known = list(said)
    others = [i for i in range(256, text.vocab.pad_token_id) if i not in said]
    while len(words) < RECITED:
        word = int(rng.choice(known if rng.random() < 0.75 else others))
        name = text.tokenizer.id_to_token(word).removeprefix("Ġ")
        if word not in words and not any(frozenset((name, other)) in forbidden for other in names):
            words.append(word)
            names.append(name)
    backwards = rng.random() < 0.5
    signs = [text.vocab.image_start_tag_id] + [text.vocab.scale_start_token_id] * backwards  # a prompt ends with both
    again = [said.get(word, word) for word in words]
    ids = [*words, *signs, *(reversed(again) if backwards else again)]
    first = int(rng.integers(0, IMAGE))
    return ids, list(range(first, first + len(ids))), [0.0] * (len(ids) - RECITED) + [1.0] * RECITED


def _things(rng: np.random.Generator, number: int, colored: bool) -> list[Thing]:
    """So many different things, if they fit together: without a held-out combination."""
    things: list[Thing] = []
    for name in rng.permutation(OBJECTS):
        new = Thing(str(name), COLORS[rng.integers(len(COLORS))] if colored else None, 0, 0)
        if len(things) < number and not held_out().found(Scene((*things, new), "")):
            things.append(new)
    return things


def _dictation(rng: np.random.Generator, text: Text) -> Row:
    relation = str(rng.choice(prompts.RELATIONS)) if rng.random() < RELATED else None
    things = _things(rng, 2 if relation else int(rng.integers(2, DICTATED + 1)), not relation or rng.random() < 0.5)
    grounds = [g for g in GROUNDS if not held_out().found(Scene(tuple(things), g))]
    ground = str(rng.choice(grounds)) if grounds and rng.random() < 0.75 else None
    ids = text.encode_prompt(prompts.describe([(t.object, t.color) for t in things], relation, ground))
    start, first = len(ids), text.vocab.image_start_token_id
    places, weights = list(range(start)), [0.0] * start
    cells = 4 * np.sort(rng.choice(IMAGE // 4, len(things), replace=False))
    order = [1, 0] if relation in ("right of", "below") else [0, 1] if relation else rng.permutation(len(things))
    for cell, i in zip(cells, order, strict=True):
        thing, look = 5 * OBJECTS.index(things[i].object), _FIRST_LOOK + 4 * LOOKS.index(things[i].color)
        patches = [thing, look, thing + 1]
        if ground and rng.random() < 0.5:
            patches.insert(0, PATCH_WORDS.index(ground))
        ids += [first + patch for patch in patches]
        places += range(start + int(cell) + 4 - len(patches), start + int(cell) + 4)
        weights += [1.0 if patch == look or (relation and patch == thing) else EASY for patch in patches]
    return ids, places, weights


def _scene(text: Text, prompt: str, scene: Scene, sketch: bool) -> Row:
    ids, patches = text.encode_prompt(prompt), patch_words(scene).ravel()
    drawn = np.flatnonzero(SKETCH_WORDS[patches]) if sketch else np.arange(IMAGE)
    image = (text.vocab.image_start_token_id + patches[drawn].astype(int)).tolist()
    end = [] if sketch else [text.vocab.image_end_tag_id]
    places = [*range(len(ids)), *(len(ids) + drawn).tolist(), *(len(ids) + IMAGE for _ in end)]
    return ids + image + end, places, [0.0] * len(ids) + [1.0] * (len(drawn) + len(end))


def exercise(text: Text, data: DataConfig, seed: int, index: int) -> dict[str, np.ndarray]:
    """Row `index`, a pure function of (seed, index): `tokens` and `positions` int32 [T], padded on the right, and `weights` f32 [T], what
    the prediction of each token counts; T is `data.row_length`. ConfigError when it does not fit."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, index]))
    shares = np.array([data.exercises.get(kind, 0.0) for kind in EXERCISES])
    kind = EXERCISES[rng.choice(len(EXERCISES), p=shares / shares.sum())]
    if kind in ("sketch", "picture"):
        weights = data.weights or prompts.WEIGHTS
        asked, scene = prompts.sample(seed, index, "train", weights, extra=data.extra, named_ground=data.named_ground)
        ids, places, counts = _scene(text, asked["prompt"], scene, kind == "sketch")
    else:
        ids, places, counts = (_recital if kind == "recital" else _dictation)(rng, text)
    if len(ids) > data.row_length:
        raise ConfigError(f"A {kind} of {len(ids)} tokens does not fit data.row_length {data.row_length}.")
    padding = (0, data.row_length - len(ids))
    return {
        "tokens": np.pad(np.array(ids, np.int32), padding, constant_values=text.vocab.pad_token_id),
        "positions": np.pad(np.array(places, np.int32), padding),
        "weights": np.pad(np.array(counts, np.float32), padding),
    }
