"""The combinations that training never composes; one fixed list, the same everywhere."""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from blip3o_jax.resources import ASSETS
from blip3o_jax.scenes.scene import Scene

COUNTS = (2, 3, 4)
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


@lru_cache
def held_out() -> HeldOut:
    """20 of 168 (object, colour), 42 of 378 object pairs, 8 of 84 (object, count), 21 of 140
    (object, ground), 30 words; drawn once, by tests/scenes/make_heldout.py."""
    written = json.loads((ASSETS / "heldout.json").read_text())
    pairs, words = map(frozenset, written.pop("pairs")), written.pop("words")
    others = {name: frozenset(map(tuple, members)) for name, members in written.items()}
    return HeldOut(pairs=frozenset(pairs), words=frozenset(words), **others)
