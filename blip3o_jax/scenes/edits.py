"""Edits of scenes by instruction: a scene before, the same after with exactly one change, the words
that ask for it and those that undo it; a pure function of (seed, split, index)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from blip3o_jax.errors import nearest, require
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.heldout import held_out
from blip3o_jax.scenes.instructions import (
    APART,
    CELLS,
    STEPS,
    instructions,
    is_free,
    num_tokens,
    places,
    said_color,
)
from blip3o_jax.scenes.prompts import generator
from blip3o_jax.scenes.scene import Scene, Thing, compose
from blip3o_jax.scenes.sprites import COLORS, GROUNDS, OBJECTS

KINDS = ("recolor", "replace", "remove", "add", "move", "ground")
WEIGHTS = dict(zip(KINDS, (2.0, 2.0, 1.25, 0.75, 1.25, 0.25), strict=True))  # the hard ones most
# The kind that undoes a kind.
INVERSES = {kind: kind for kind in KINDS} | {"remove": "add", "add": "remove"}
# Which of the held-out combinations an edit of the split "heldout" asks for.
HELD_OUT = dict.fromkeys(KINDS, "pairs") | {"recolor": "colors", "ground": "grounds"}
MOST_THINGS = 4
NUMBERS_OF_THINGS = (1, 2, 2, 3, 3, 4)
NAMESAKE = 0.35  # share of things that are the same object as the one before them
TWIN = 0.5  # share of those that have its colour too
ALIGNED = 0.5  # share of the same objects that stand in one row, if there is room
COLORED = 0.6  # share of things in one of the six colours
MOST_TOKENS = 30  # of an instruction; its template has 34, a prompt of emoji_64 at most 64
MARGIN = 3  # px around changed pixels that belong to the edited region

Rng = np.random.Generator


@dataclass(frozen=True)
class Edit:
    """`instruction` turns `before` into `after`, and `inverse` turns it back."""

    kind: str
    instruction: str
    inverse: str
    before: Scene
    after: Scene


def sample(
    world: WorldConfig, index: int, split: str = "train", weights: Mapping[str, float] | None = None
) -> Edit:
    """One edit, the same for the same arguments; `weights` are the shares of KINDS.

    "train" never composes a held-out combination, "heldout" asks for one of HELD_OUT in `after`;
    moves and removals, which make none, have it before and after. InputError for an unknown split
    or kind.
    """
    for kind in weights or ():
        require(kind in KINDS, f"Unknown kind {kind!r}; {nearest(kind, KINDS)}")
    rng = generator(world, index, split, 1)
    return _sample(rng, split, _pick_kind(rng, weights or WEIGHTS))


def composed(world: WorldConfig, index: int, split: str = "train") -> Edit:
    """Two edits of different kinds and things in one instruction.

    Its kind is "recolor and move" or the like; its inverse undoes the second edit first.
    """
    rng = generator(world, index, split, 2)
    while True:
        # The second change, of the first one's result, and alone.
        first = _sample(rng, split, _pick_kind(rng, WEIGHTS))
        kind = _pick_kind(rng, WEIGHTS)
        after = _change(rng, kind, first.after)
        if kind == first.kind or after is None:
            continue
        alone = _transfer(first.after, after, first.before)
        if alone is None or bool(held_out().combinations(after)) == (split == "train"):
            continue
        # Words that mean the same before and after the first change.
        words = instructions(kind, first.after, after)
        words = sorted(set(words) & set(instructions(kind, first.before, alone)))
        undo = instructions(INVERSES[kind], after, first.after)
        if not words or not undo:
            continue
        joint = _pick(rng, ("and", "and then"))
        instruction = f"{first.instruction} {joint} {_pick(rng, words)}"
        inverse = f"{_pick(rng, undo)} and then {first.inverse}"
        if max(num_tokens(instruction), num_tokens(inverse)) <= MOST_TOKENS:
            return Edit(f"{first.kind} and {kind}", instruction, inverse, first.before, after)


def inverted(edit: Edit) -> Edit:
    """The edit that undoes an edit."""
    kinds = [INVERSES[kind] for kind in reversed(edit.kind.split(" and "))]
    return Edit(" and ".join(kinds), edit.inverse, edit.instruction, edit.after, edit.before)


def chain(world: WorldConfig, index: int, turns: int) -> list[Edit]:
    """Successive edits, each of the scene that the last one left; none changes the ground, and
    combinations are as they come."""
    rng = generator(world, index, "heldout", 4)
    weights = {kind: share for kind, share in WEIGHTS.items() if kind != "ground"}
    edits: list[Edit] = []
    scene = _scene(rng)
    while len(edits) < turns:
        kind = _pick_kind(rng, weights)
        after = _change(rng, kind, scene)
        words = instructions(kind, scene, after) if after else []
        undo = instructions(INVERSES[kind], after, scene) if after else []
        if words and undo:
            edits.append(Edit(kind, _pick(rng, words), _pick(rng, undo), scene, after))
            scene = after
    return edits


def draw(
    world: WorldConfig,
    index: int,
    split: str = "train",
    inverted_edits: float = 0.0,
    composed_edits: float = 0.0,
) -> Edit:
    """An edit for training: a share of them inverted, a share composed, otherwise as `sample`."""
    rng = generator(world, index, split, 3)
    invert, compound = rng.random(2) < (inverted_edits, composed_edits)
    edit = composed(world, index, split) if compound else sample(world, index, split)
    return inverted(edit) if invert else edit


def region(edit: Edit) -> np.ndarray:
    """Pixels that the edit changes and those within MARGIN px of them, bool [64, 64]."""
    changed = (compose(edit.before) != compose(edit.after)).any(axis=-1)
    return sliding_window_view(np.pad(changed, MARGIN), (2 * MARGIN + 1,) * 2).any(axis=(2, 3))


def _sample(rng: Rng, split: str, kind: str) -> Edit:
    """Draws scenes and changes until the split allows them and there are words both ways."""
    while True:
        before = _scene(rng)
        after = _change(rng, kind, before)
        if after is None or not _is_allowed(kind, before, after, split):
            continue
        words = instructions(kind, before, after)
        undo = instructions(INVERSES[kind], after, before)
        if words and undo:
            return Edit(kind, _pick(rng, words), _pick(rng, undo), before, after)


def _is_allowed(kind: str, before: Scene, after: Scene, split: str) -> bool:
    """Whether the scenes hold the held-out combinations that an edit of the split has."""
    held = held_out()
    old, new = held.combinations(before), held.combinations(after)
    if split == "train":
        return not old and not new
    right = set(new) <= getattr(held, HELD_OUT[kind]) and bool(new)
    if kind in ("remove", "move"):
        return right and bool(old) and set(old) <= held.pairs
    return right and not old


def _scene(rng: Rng) -> Scene:
    """One to four things, natural or coloured, some of the same object, anywhere."""
    number = _pick(rng, NUMBERS_OF_THINGS)
    nouns: list[tuple[str, str | None]] = []
    for _ in range(number):
        name, color = _noun(rng)
        if nouns and rng.random() < NAMESAKE:
            name = nouns[-1][0]
            color = nouns[-1][1] if rng.random() < TWIN else color
        nouns.append((name, color))
    # Cells one by one; again from the start where they leave no room.
    things: list[Thing] = []
    while len(things) < number:
        noun, free = nouns[len(things)], [cell for cell in CELLS if is_free(cell, things)]
        if things and noun[0] == things[-1].object and rng.random() < ALIGNED:
            free = [cell for cell in free if cell[0] == things[-1].row] or free
        things = [*things, Thing(*noun, *_pick(rng, free))] if free else []
    return Scene(tuple(things), _pick(rng, tuple(GROUNDS)))


def _change(rng: Rng, kind: str, scene: Scene) -> Scene | None:
    """The scene after a change of the kind, drawn at random; None where the draw is no change."""
    things = scene.things
    if kind == "ground":
        ground = _pick(rng, tuple(GROUNDS))
        return replace(scene, ground=ground) if ground != scene.ground else None
    if kind == "add":
        cells = list(places(things))
        if len(things) == MOST_THINGS or not cells:
            return None
        return replace(scene, things=(*things, Thing(*_noun(rng), *_pick(rng, cells))))
    # The others change one of the things.
    if not things:
        return None
    thing = _pick(rng, things)
    rest = [other for other in things if other != thing]
    if kind == "remove":
        return replace(scene, things=tuple(rest))
    if kind == "recolor":
        other = replace(thing, color=_pick(rng, COLORS))
        differs = said_color(other) != said_color(thing)
    elif kind == "replace":
        other = Thing(*_noun(rng), thing.row, thing.column)
        differs = other.object != thing.object
    else:
        steps = [(thing.row + down, thing.column + right) for down, right in STEPS.values()]
        cells = [*places(things, thing), *(c for c in steps if c in CELLS and is_free(c, rest))]
        if not cells:
            return None
        row, column = _pick(rng, cells)
        other = replace(thing, row=row, column=column)
        differs = max(abs(row - thing.row), abs(column - thing.column)) >= APART
    changed = tuple(other if t == thing else t for t in things)
    return replace(scene, things=changed) if differs else None


def _transfer(base: Scene, changed: Scene, onto: Scene) -> Scene | None:
    """Another scene with the change from `base` to `changed`; None where it cannot have it."""
    old = [thing for thing in base.things if thing not in changed.things]
    new = [thing for thing in changed.things if thing not in base.things]
    rest = tuple(thing for thing in onto.things if thing not in old)
    fits = len(rest) + len(old) == len(onto.things)
    if not fits or not all(is_free((thing.row, thing.column), rest) for thing in new):
        return None
    ground = changed.ground if changed.ground != base.ground else onto.ground
    return Scene((*rest, *new), ground)


def _noun(rng: Rng) -> tuple[str, str | None]:
    color = _pick(rng, COLORS) if rng.random() < COLORED else None
    return _pick(rng, OBJECTS), color


def _pick_kind(rng: Rng, weights: Mapping[str, float]) -> str:
    shares = np.array(list(weights.values()))
    return list(weights)[rng.choice(len(weights), p=shares / shares.sum())]


def _pick(rng: Rng, values: Sequence):
    return values[rng.integers(len(values))]
