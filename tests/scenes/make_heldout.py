"""Draws the held-out combinations, blip3o_jax/assets/heldout.json; run once, the result is
committed: `python tests/scenes/make_heldout.py`."""

import json
from collections.abc import Callable, Iterable
from itertools import combinations, product

import numpy as np

from blip3o_jax.resources import ASSETS
from blip3o_jax.scenes.heldout import COUNTS, WORDS
from blip3o_jax.scenes.sprites import COLORS, GROUNDS, OBJECTS, PLAIN_COLOR

SEED = 20251015  # changing it changes the benchmark

Rule = Callable[[list, tuple], bool]  # whether a candidate may be chosen beside others


def _choose(rng: np.random.Generator, candidates: Iterable, number: int, allowed: Rule) -> list:
    """`number` candidates in random order, each `allowed` beside those chosen before; starts over
    if that gets stuck."""
    candidates, chosen = list(candidates), []
    while len(chosen) < number:
        chosen = []
        for i in rng.permutation(len(candidates)):
            if len(chosen) < number and allowed(chosen, candidates[i]):
                chosen.append(candidates[i])
    return chosen


def _at_most(*limits: int) -> Rule:
    """The i-th member of a combination occurs at most limits[i] times at that place, so that
    nothing is held out lopsidedly."""
    return lambda chosen, candidate: all(
        sum(c[i] == part for c in chosen) < limit
        for i, (part, limit) in enumerate(zip(candidate, limits, strict=True))
    )


def draw() -> dict[str, list]:
    """20 of 168 (object, colour), 42 of 378 object pairs, 8 of 84 (object, count), 21 of 140
    (object, ground), 30 words."""
    rng = np.random.Generator(np.random.Philox(SEED))

    def three_partners(chosen: list, candidate: tuple) -> bool:
        return all(sum(name in pair for pair in chosen) < 3 for name in candidate)

    # A natural apple is red, so a red one would not be unseen.
    tinted = [pair for pair in product(OBJECTS, COLORS) if PLAIN_COLOR.get(pair[0]) != pair[1]]
    sets = {
        "colors": _choose(rng, tinted, 20, _at_most(1, 4)),
        "pairs": _choose(rng, combinations(OBJECTS, 2), 42, three_partners),
        "counts": _choose(rng, product(OBJECTS, COUNTS), 8, _at_most(1, 3)),
        "grounds": _choose(rng, product(OBJECTS, GROUNDS), 21, _at_most(1, 5)),
        "words": [WORDS[i] for i in rng.choice(len(WORDS), 30, replace=False)],
    }
    return {name: sorted(combinations) for name, combinations in sets.items()}


def written() -> str:
    """The file's text: a set's name and its members on a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(members)}" for name, members in draw().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    (ASSETS / "heldout.json").write_text(written())
