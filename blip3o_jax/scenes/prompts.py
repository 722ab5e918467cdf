"""Prompts with GenEval's metadata (djghosh13/geneval) and a scene that satisfies each exactly, as a
pure function of (seed, index)."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations, product

import numpy as np

from blip3o_jax.errors import nearest, require
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.heldout import COUNTS, WORDS, held_out
from blip3o_jax.scenes.scene import POSITIONS, SPAN, Scene, Thing
from blip3o_jax.scenes.sprites import COLORS, GROUNDS, LETTERS, OBJECTS, PLAIN_COLOR, PLURALS

NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
# Kinds that GenEval does not know, and their shares: coloured things counted or placed, three or
# four things, natural, coloured or one of them coloured: too many combinations to be learned by
# heart.
EXTRA = {"counting": 0.5, "position": 1.5, "three_object": 3.0, "color_attr": 4.0, "one_color": 3.0}
AND = 0.5  # share of the prompts for three things or more that join all of them by "and"
PHOTO = 0.15  # share of training prompts that begin with "a photo of", as GenEval's own do
NUMBER_OF_SPLIT = {"train": 0, "heldout": 1}

Rng = np.random.Generator
Noun = tuple[str, str | None]  # object and colour


def sample(world: WorldConfig, index: int, split: str = "train") -> tuple[dict, Scene]:
    """A prompt's metadata and its scene; the same for the same arguments, whatever was drawn
    before.

    "train" never composes a held-out combination, "heldout" always asks for one. The metadata: tag,
    include, exclude (counting), prompt; ground where the prompt names it; word for the tag "text";
    extra=True for the kinds of EXTRA. A color of None (one_color) is that of a thing with many
    colours of its own. InputError for an unknown split.
    """
    rng = generator(world, index, split, 0)
    training = split == "train"
    if rng.random() < world.text:
        return _write(rng, training, world.named_ground)
    tag = _pick(rng, *_shares(world.weights))
    extra = training and rng.random() < world.extra
    if extra:
        tag = _pick(rng, *_shares(EXTRA))
    photo = training and not extra and rng.random() < PHOTO
    return _make(rng, tag, training, world.named_ground, extra, photo)


def generator(world: WorldConfig, index: int, split: str, stream: int) -> Rng:
    """Randomness of one prompt, stream 0, of one edit or exercise; InputError for an unknown
    split."""
    require(split in NUMBER_OF_SPLIT, f"Unknown split {split!r}; {nearest(split, NUMBER_OF_SPLIT)}")
    key = [world.seed, NUMBER_OF_SPLIT[split]]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, stream, index]))


def _shares(weights: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """Names and their shares, which sum to 1."""
    return list(weights), np.array(list(weights.values())) / sum(weights.values())


def _make(
    rng: Rng, tag: str, training: bool, named_ground: float, extra: bool, photo: bool
) -> tuple[dict, Scene]:
    """Draws nouns for the tag until the split allows them, then ground, places and words."""
    # The kinds of held-out combinations that a prompt of the split has, no more and no less.
    named = rng.random() < named_ground or (not training and tag == "single_object")
    new_color = rng.random() < 0.5  # heldout color_attr: is a colour unseen too?
    kinds = {
        "colors": ["color"],
        "counting": ["count"],
        "single_object": ["ground"],
        "color_attr": ["color", "pair"] if new_color else ["pair"],
    }
    allowed = [] if training else kinds.get(tag, ["pair"])
    while True:
        nouns = _nouns(rng, tag, extra)
        ground = _pick(rng, list(GROUNDS))
        # Any layout will do here: what is held out does not depend on places.
        things = tuple(Thing(name, color, 0, 0) for name, color in nouns)
        held = held_out().combinations(Scene(things, ground))
        if sorted(map(_kind, held)) == allowed:
            break
    # Places that the relation allows.
    relation = _pick(rng, RELATIONS) if tag == "position" else None
    layouts = _layouts(len(nouns), relation)
    cells = layouts[rng.integers(len(layouts))]
    things = tuple(Thing(*noun, *cell) for noun, cell in zip(nouns, cells, strict=True))
    by_and = len(nouns) > 2 and tag != "counting" and rng.random() < AND
    phrase = describe(nouns, relation, ground if named else None, " and " if by_and else ", ")
    metadata = _metadata(tag, nouns, relation, ground if named else None, phrase)
    metadata["prompt"] = "a photo of " * photo + metadata["prompt"]
    if extra:
        metadata["extra"] = True
    return metadata, Scene(things, ground)


def _kind(combination: frozenset | tuple) -> str:
    """Which of HeldOut's sets a combination belongs to."""
    if isinstance(combination, frozenset):
        return "pair"
    second = combination[1]
    return "color" if second in COLORS else "ground" if second in GROUNDS else "count"


def _nouns(rng: Rng, tag: str, extra: bool) -> list[Noun]:
    """The things of one prompt, in the order in which it names them."""
    if tag == "counting":
        name, color = _pick(rng, OBJECTS), _pick(rng, COLORS) if extra else None
        return [(name, color)] * _pick(rng, COUNTS)
    number = {"single_object": 1, "colors": 1, "three_object": 3}.get(tag, 2)
    if tag == "one_color":
        number = int(rng.integers(2, 5))
    elif extra and tag != "position":
        number = int(rng.integers(3, 5))
    names = [OBJECTS[i] for i in rng.choice(len(OBJECTS), number, replace=False)]
    colors = [None] * number
    if tag in ("colors", "color_attr") or (tag == "position" and extra):
        colors = [COLORS[i] for i in rng.choice(len(COLORS), number, replace=False)]
    elif tag == "one_color":
        colors[rng.integers(number)] = _pick(rng, COLORS)
    return list(zip(names, colors, strict=True))


def describe(
    nouns: list[Noun], relation: str | None = None, ground: str | None = None, separator: str = ", "
) -> str:
    """Words for things: "a red key, a hat and a blue cat on gray", or "a hat left of a cat".

    `separator` stands between all but the last two.
    """
    names = [f"{color} {name}" if color else name for name, color in nouns]
    *others, last = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    phrase = f"{separator.join(others)} {relation or 'and'} {last}" if others else last
    return phrase + (f" on {ground}" if ground else "")


def _metadata(
    tag: str, nouns: list[Noun], relation: str | None, ground: str | None, phrase: str
) -> dict:
    """GenEval's dictionary and the prompt's words."""
    include = [
        {"class": name, "count": 1} | ({"color": color} if color else {}) for name, color in nouns
    ]
    if tag == "one_color":  # the others are to keep their own
        include = [{"color": PLAIN_COLOR.get(item["class"])} | item for item in include]
    metadata = {"tag": tag, "include": include}
    if tag == "counting":
        (name, color), count = nouns[0], len(nouns)
        metadata["include"] = [include[0] | {"count": count}]
        metadata["exclude"] = [{"class": name, "count": count + 1}]
        words = [NUMBERS[count], color, PLURALS[name], f"on {ground}" if ground else None]
        phrase = " ".join(filter(None, words))
    elif tag == "position":
        # as in GenEval's file: first the thing to relate to, then the one that has the position
        metadata["include"] = [include[1], include[0] | {"position": [relation, 0]}]
    metadata["prompt"] = phrase
    return metadata | ({"ground": ground} if ground else {})


def _write(rng: Rng, training: bool, named_ground: float) -> tuple[dict, Scene]:
    """A word to be written: in training half the time one of WORDS, half the time random letters;
    otherwise one held out."""
    unseen = held_out().words
    while True:
        if not training or rng.random() < 0.5:
            word = _pick(rng, WORDS if training else sorted(unseen))
        else:
            word = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(2, 7)))
        if not training or word not in unseen:
            break
    ground = _pick(rng, list(GROUNDS))
    metadata = {"tag": "text", "include": [], "word": word, "prompt": f'the word "{word}"'}
    if rng.random() < named_ground:
        metadata["prompt"] += f" on {ground}"
        metadata["ground"] = ground
    return metadata, Scene((), ground, word)


@lru_cache
def _layouts(number: int, relation: str | None) -> tuple[tuple[tuple[int, int], ...], ...]:
    """All places for `number` things.

    They follow each other as one reads, row by row, in the order in which the prompt names them;
    with a relation, first is `relation` second beyond doubt, and the left or upper one comes first.
    """
    cells = list(product(range(POSITIONS), repeat=2))

    def holds(a: tuple[int, int], b: tuple[int, int]) -> bool:
        # GenEval's rule wants a direction within 60 degrees; here the other way is at most half as
        # far, as people draw it.
        down, right = a[0] - b[0], a[1] - b[1]
        return {
            None: max(abs(down), abs(right)) >= SPAN,
            "left of": right <= -SPAN and 0 <= 2 * -down <= -right,
            "right of": right >= SPAN and 0 <= 2 * down <= right,
            "above": down <= -SPAN and 2 * abs(right) <= -down,
            "below": down >= SPAN and 2 * abs(right) <= down,
        }[relation]

    layouts = product(cells, cells) if relation else combinations(cells, number)
    return tuple(x for x in layouts if all(holds(*pair) for pair in combinations(x, 2)))


def _pick(rng: Rng, values: Sequence, shares: np.ndarray | None = None):
    return values[rng.choice(len(values), p=shares)]
