"""Words for a change of a scene, which always mean one thing and one place.

A thing is named by its object, by its colour among namesakes of other colours, by where it is among
equals. A place is one of nine in the picture, or beside another thing, and stands for one cell, so
that there is one true picture.
"""

from collections.abc import Sequence
from itertools import product

from blip3o_jax.scenes.prompts import describe
from blip3o_jax.scenes.scene import POSITIONS, SPAN, Scene, Thing
from blip3o_jax.scenes.sprites import PLAIN_COLOR

# Where {thing} is "the left heart", {new} "a red hat", {where} "in the top left" or "left of the
# dog", and {to} "to the top left", "left of the dog" or "up".
WORDINGS = {
    "recolor": (
        "make {thing} {color}",
        "turn {thing} {color}",
        "color {thing} {color}",
        "paint {thing} {color}",
        "change {thing} to {color}",
        "change the color of {thing} to {color}",
    ),
    "replace": (
        "replace {thing} with {new}",
        "change {thing} into {new}",
        "change {thing} to {new}",
        "turn {thing} into {new}",
        "make {thing} into {new}",
        "swap {thing} for {new}",
    ),
    "remove": (
        "remove {thing}",
        "remove {thing} from the image",
        "take away {thing}",
        "take {thing} away",
        "delete {thing}",
        "erase {thing}",
    ),
    "add": (
        "add {new} {where}",
        "put {new} {where}",
        "place {new} {where}",
        "add {new} to the image {where}",
        "{where} add {new}",
        "{where} put {new}",
    ),
    "move": (
        "move {thing} {to}",
        "bring {thing} {to}",
        "shift {thing} {to}",
        "put {thing} {where}",
        "place {thing} {where}",
    ),
    "ground": (
        "change the background to {ground}",
        "change the color of the background to {ground}",
        "make the background {ground}",
        "turn the background {ground}",
        "color the background {ground}",
        "replace the background with {ground}",
    ),
}
# Words that are more than one token in the embedded model's vocabulary, and how many.
MANY_TOKENS = {
    **dict.fromkeys(("down", "for", "then", "take", "top"), 2),
    **dict.fromkeys(("up", "place", "bring", "away", "erase"), 3),
    **dict.fromkeys(("swap", "paint", "middle"), 4),
    **dict.fromkeys(("bottom", "shift"), 5),
    "delete": 6,
}
# A step is as long as a sprite is wide.
STEPS = {"up": (-SPAN, 0), "down": (SPAN, 0), "left": (0, -SPAN), "right": (0, SPAN)}
# Thirds of the picture, two cells each, and where a thing that is put there should be.
ROWS = {"top": 0, "middle": 2, "bottom": 5}
COLUMNS = {"left": 0, "middle": 2, "right": 5}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
CELLS = tuple(product(range(POSITIONS), repeat=2))
APART = 2  # cells between equals that are told apart by place; the shortest move

Cell = tuple[int, int]
Things = Sequence[Thing]


def said_color(thing: Thing) -> str | None:
    """The colour that one would say: a natural apple is red."""
    return thing.color or PLAIN_COLOR.get(thing.object)


def names(things: Things, thing: Thing) -> list[str]:
    """Every way to name one of the things beyond doubt."""
    result = []
    for color in dict.fromkeys((None, thing.color)):
        same = [t for t in things if t.object == thing.object]
        equals = [t for t in same if color is None or said_color(t) == color]
        noun = f"{color} {thing.object}" if color else thing.object
        result += [f"the {where}{noun}" for where in _where_among(equals, thing)]
    return result


def _where_among(equals: Things, thing: Thing) -> list[str]:
    """Words that tell a thing from its equals by its place; "" where it has none.

    Things in one row are left and right, others top and bottom: "left" of two on a slant would be
    a matter of columns, which positions of one dimension hardly show.
    """
    others = [other for other in equals if other != thing]
    if not others:
        return [""]
    rows, columns = [other.row for other in others], [other.column for other in others]
    words = []
    if thing.row + APART <= min(rows):
        words.append("top ")
    if thing.row - APART >= max(rows):
        words.append("bottom ")
    if set(rows) == {thing.row}:
        words.append("left " if thing.column < min(columns) else "right ")
    return words


def places(things: Things, moved: Thing | None = None) -> dict[Cell, list[str]]:
    """Every place that has a name, as its one cell, with its names: "top left" (of the nine thirds)
    or "left of the dog".

    A third stands for its free cell that is nearest to the edge or the middle of the picture, a
    relation for the nearest free cell in that direction. Of a thing to be moved, neither where it
    is already nor its own cells count as taken.
    """
    rest = [thing for thing in things if thing != moved]
    free = [cell for cell in CELLS if is_free(cell, rest)]
    result: dict[Cell, list[str]] = {}
    # Nine thirds.
    for (down, row), (right, column) in product(ROWS.items(), COLUMNS.items()):
        third = [cell for cell in free if (cell[0] // 2, cell[1] // 2) == (row // 2, column // 2)]
        is_there = moved and (moved.row // 2, moved.column // 2) == (row // 2, column // 2)
        if third and not is_there:
            cell = min(third, key=lambda c: (abs(c[0] - row) + abs(c[1] - column), c))
            name = "middle" if down == right else f"{down} {right}"
            result.setdefault(cell, []).append(name)
    # Four sides of each thing.
    for thing, (relation, (down, right)) in product(rest, RELATIONS.items()):
        line = [(thing.row + down * k, thing.column + right * k) for k in range(SPAN, POSITIONS)]
        cell = next((cell for cell in line if cell in free), None)
        ahead = moved and (moved.row - thing.row) * down + (moved.column - thing.column) * right
        if cell and (moved is None or ahead < APART):
            spots = result.setdefault(cell, [])
            spots += [f"{relation} {name}" for name in names(things, thing)]
    return result


def instructions(kind: str, before: Scene, after: Scene) -> list[str]:
    """Every wording that turns one scene into the other beyond doubt; [] if there is none."""
    old = [thing for thing in before.things if thing not in after.things]
    new = [thing for thing in after.things if thing not in before.things]
    # What the wordings' slots can hold.
    slots = {"ground": [after.ground]}
    if old:
        slots["thing"] = names(before.things, old[0])
    if new:
        slots["new"] = [describe([(new[0].object, new[0].color)])]
        slots["color"] = [new[0].color or "natural"]
    if kind in ("add", "move"):
        cell = new[0].row, new[0].column
        spots = places(before.things, *old).get(cell, [])
        thirds = [spot for spot in spots if " the " not in spot]
        beside = [spot for spot in spots if " the " in spot]
        slots["where"] = [f"in the {third}" for third in thirds] + beside
        slots["to"] = [f"to the {third}" for third in thirds] + beside
        if old:
            step = cell[0] - old[0].row, cell[1] - old[0].column
            slots["to"] += [word for word, offset in STEPS.items() if step == offset]
    # Every wording with everything in its slots.
    result = []
    for wording in WORDINGS[kind]:
        used = [slot for slot in slots if f"{{{slot}}}" in wording]
        for words in product(*(slots[slot] for slot in used)):
            result.append(wording.format(**dict(zip(used, words, strict=True))))
    return result


def num_tokens(instruction: str) -> int:
    """The length of an instruction in the embedded model's tokens."""
    return sum(MANY_TOKENS.get(word, 1) for word in instruction.split())


def is_free(cell: Cell, things: Things) -> bool:
    """Whether a sprite at the cell overlaps none of the things."""
    row, column = cell
    return all(max(abs(t.row - row), abs(t.column - column)) >= SPAN for t in things)
