"""Scores a picture against a prompt's metadata by GenEval's rules (djghosh13/geneval), or against
an edit, with template matching for eyes."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from blip3o_jax.scenes.detect import Detection, detect, look
from blip3o_jax.scenes.edits import Edit
from blip3o_jax.scenes.instructions import said_color
from blip3o_jax.scenes.scene import CELL, Thing
from blip3o_jax.scenes.sprites import LETTERS, SPRITE

__all__ = ["Detection", "detect", "judge", "judge_batch", "judge_edit"]

POSITION_MARGIN = 0.1  # GenEval's: share of both sizes that an offset must exceed
MOST_UNEXPLAINED = 48  # px


def judge(image: np.ndarray, metadata: Mapping) -> dict:
    """The verdict on a picture [64, 64, 3], uint8 or float 0..1:

    - correct: GenEval's original rules: at least `count` of each class, those with the least error
      in the right colour and position, and fewer than `count` of the excluded. For the tag "text":
      the letters read, in order, are the word.
    - strict: correct, exactly the counts asked for, nothing else in the picture, and the ground
      that the prompt names.
    - score: the dense reward of GenEval-trained models in 0..1: the mean over what was asked of how
      nearly it was met.
    - detections, reason: what was seen, and in words what is wrong ("" if strict).
    """
    # What is in the picture.
    text = metadata["tag"] == "text"
    sight = look(image, text)
    letters = "".join(d.object for d in sight.detections if d.object in LETTERS)
    things = [d for d in sight.detections if d.object not in LETTERS]
    objects = {a.object: [b for b in things if b.object == a.object] for a in things}
    # GenEval's rules, or the word.
    if text:
        wrong, score = _judge_word(letters, metadata["word"])
    else:
        wrong, score = _judge_objects(objects, metadata)
    correct = not wrong
    # What strict asks besides.
    asked = Counter()
    for item in metadata["include"]:
        asked[item["class"]] += item["count"]
    for name in sorted(objects):
        if (number := len(objects[name])) > asked[name]:
            wrong.append(f"{number} {name} instead of {asked[name]}")
    if sight.unexplained > MOST_UNEXPLAINED:
        wrong.append(f"{sight.unexplained} px of something else")
    if metadata.get("ground", sight.ground) != sight.ground:
        wrong.append(f"ground {sight.ground} instead of {metadata['ground']}")
    verdict = {"correct": correct, "strict": not wrong, "score": score}
    return verdict | {"detections": list(sight.detections), "reason": "; ".join(wrong)}


def judge_batch(images: Iterable[np.ndarray], metadata: Iterable[Mapping]) -> list[dict]:
    """judge() of every picture with its metadata."""
    return [judge(image, item) for image, item in zip(images, metadata, strict=True)]


def judge_edit(image: np.ndarray, edit: Edit) -> dict:
    """The verdict on a picture [64, 64, 3] that should show `edit.after`:

    - done: what is new is there in its colour and at most a cell from its place, what should go is
      gone, and a new ground is there;
    - kept: everything else is where it was, at most a cell away, in its colour and on its ground,
      and there is nothing more;
    - success: both;
    - score: the share of what was asked for that is without fault, 0..1;
    - reason: in words what is wrong ("" for a success).
    """
    # What should be there for either verdict, each matched with what was seen, at most once.
    before, after = edit.before, edit.after
    sight = look(image)
    rest = list(sight.detections)
    not_done = _missing([t for t in after.things if t not in before.things], rest)
    not_kept = _missing([t for t in after.things if t in before.things], rest)
    # What should have gone, and what nobody asked for.
    old = [t for t in before.things if t not in after.things]
    not_done += [f"{_said(thing)} still there" for thing in old if _take(thing, rest)]
    not_kept += [f"{_said(d)} besides" for d in rest]
    if sight.unexplained > MOST_UNEXPLAINED:
        not_kept.append(f"{sight.unexplained} px of something else")
    if sight.ground != after.ground:
        wrong = not_kept if before.ground == after.ground else not_done
        wrong.append(f"ground {sight.ground} instead of {after.ground}")
    done, kept = not not_done, not not_kept
    # Asked for are all things after, the absence of old ones, and the ground.
    faults, asked = not_done + not_kept, len(after.things) + len(old) + 1
    verdict = {"done": done, "kept": kept, "success": done and kept}
    return verdict | {"score": max(0.0, 1 - len(faults) / asked), "reason": "; ".join(faults)}


def _missing(things: Iterable[Thing], detections: list[Detection]) -> list[str]:
    """Words for the things that are not among the detections; those that are leave the list."""
    return [f"no {_said(t)} at its place" for t in things if not _take(t, detections)]


def _take(thing: Thing, detections: list[Detection]) -> Detection | None:
    """Removes and returns the nearest detection of a thing, by object, colour and place within a
    cell."""

    def distance(d: Detection) -> int:
        return max(abs(d.row_px - CELL * thing.row), abs(d.column_px - CELL * thing.column))

    alike = [d for d in detections if _said(d) == _said(thing) and distance(d) <= CELL]
    nearest = min(alike, key=distance, default=None)
    if nearest:
        detections.remove(nearest)
    return nearest


def _said(thing: Thing | Detection) -> str:
    """What one would call a thing or a detection: a natural apple is a red apple."""
    return f"{said_color(thing) or 'natural'} {thing.object}"


def _judge_objects(
    objects: Mapping[str, list[Detection]], metadata: Mapping
) -> tuple[list[str], float]:
    """What breaks GenEval's rules, and the dense score."""
    wrong: list[str] = []
    scores: list[float] = []
    groups: list[list[Detection] | None] = []  # of each item asked for, those that meet it
    for item in metadata["include"]:
        # Counts.
        name, count = item["class"], item["count"]
        everything = objects.get(name, [])
        best = everything[:count]
        scores.append(max(1 - abs(count - len(everything)) / count, 0.0))
        matched = complete = len(best) == count
        if not complete:
            wrong.append(f"{len(best)} {name} instead of {count}")
            scores += [0.0] * (("color" in item) + ("position" in item))
        # Colours.
        if complete and "color" in item:
            colors = [d.plain_color for d in best]
            right = colors.count(item["color"])
            scores.append(1 - (count - right) / count)
            matched = right == count
            if not matched:
                seen = ", ".join(color or "natural" for color in colors)
                wrong.append(f"{name} is {seen} instead of {item['color'] or 'natural'}")
        # Position, relative to an item that came before.
        if complete and "position" in item:
            relation, target = item["position"]
            others = groups[target] or []
            holds = others and all(relation in _relations(a, b) for a in best for b in others)
            if matched and not holds:
                seen = "nothing to relate to"
                if others:
                    seen = " and ".join(sorted(_relations(best[0], others[0]))) or "too near"
                wrong.append(f"{name}: {seen} instead of {relation}")
            matched = matched and bool(holds)
            scores.append(float(matched))
        groups.append(best if matched else None)
    for item in metadata.get("exclude", []):
        name, count = item["class"], item["count"]
        if (number := len(objects.get(name, []))) >= count:
            wrong.append(f"{number} {name}, should be less than {count}")
    return wrong, sum(scores) / len(scores)


def _relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is as seen from `b`, by GenEval's rule: beyond the margin, and within 60 degrees of
    the direction."""
    offset = np.array([a.column_px - b.column_px, a.row_px - b.row_px], np.float64)
    beyond = np.maximum(abs(offset) - POSITION_MARGIN * 2 * SPRITE, 0) * np.sign(offset)
    if not beyond.any():
        return set()
    right, down = beyond / np.linalg.norm(offset)
    shares = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, share in shares.items() if share > 0.5}


def _judge_word(written: str, word: str) -> tuple[list[str], float]:
    """Whether the letters spell the word; the score is 1 - edit distance / length."""
    distances = list(range(len(word) + 1))
    for i, letter in enumerate(written):
        row = [i + 1]
        for j, right in enumerate(word):
            row.append(min(distances[j] + (letter != right), distances[j + 1] + 1, row[j] + 1))
        distances = row
    wrong = [] if written == word else [f'"{written}" instead of "{word}"']
    return wrong, max(1 - distances[-1] / len(word), 0.0)
