"""The combinations that training never composes; one fixed list, the same everywhere."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import numpy as np

from blip3o_jax.scenes.scene import Scene
from blip3o_jax.scenes.sprites import ASSETS, COLORS, GROUNDS, OBJECTS, PLAIN_COLOR

COUNTS = (2, 3, 4)
SEED = 20251015  # changing it changes the benchmark
# Words that training may write; the held-out ones are drawn from them.
WORDS = tuple((ASSETS / "words.txt").read_text().split())

Pair = tuple[str, str]


@dataclass(frozen=True)
class HeldOut:
    """Sets of (object, colour), unordered pairs, (object, count), (object, ground), words."""

    colors: frozenset[Pair]
    pairs: frozenset[frozenset[str]]
    counts: frozenset[tuple[str, int]]
    grounds: frozenset[Pair]
    words: frozenset[str]

    def combinations(self, scene: Scene) -> list:
        """Every held-out combination in the scene."""
        names = [thing.object for thing in scene.things]
        counts = {name: names.count(name) for name in names}
        return [
            *(c for c in {(t.object, t.color) for t in scene.things} if c in self.colors),
            *(p for p in map(frozenset, combinations(sorted(counts), 2)) if p in self.pairs),
            *(c for c in counts.items() if c in self.counts),
            *(g for g in ((name, scene.ground) for name in counts) if g in self.grounds),
            *([scene.word] if scene.word in self.words else []),
        ]


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


@lru_cache
def held_out() -> HeldOut:
    """20 of 168 (object, colour), 42 of 378 object pairs, 8 of 84 (object, count), 21 of 140
    (object, ground), 30 words."""
    rng = np.random.Generator(np.random.Philox(SEED))

    def three_partners(chosen: list, candidate: tuple) -> bool:
        return all(sum(name in pair for pair in chosen) < 3 for name in candidate)

    # A natural apple is red, so a red one would not be unseen.
    tinted = [pair for pair in product(OBJECTS, COLORS) if PLAIN_COLOR.get(pair[0]) != pair[1]]
    colors = _choose(rng, tinted, 20, _at_most(1, 4))
    pairs = _choose(rng, combinations(OBJECTS, 2), 42, three_partners)
    return HeldOut(
        colors=frozenset(colors),
        pairs=frozenset(map(frozenset, pairs)),
        counts=frozenset(_choose(rng, product(OBJECTS, COUNTS), 8, _at_most(1, 3))),
        grounds=frozenset(_choose(rng, product(OBJECTS, GROUNDS), 21, _at_most(1, 5))),
        words=frozenset(WORDS[i] for i in rng.choice(len(WORDS), 30, replace=False)),
    )
