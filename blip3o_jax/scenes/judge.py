"""Scores a picture against a prompt's metadata by GenEval's rules (djghosh13/geneval), with
template matching for eyes."""

from collections.abc import Iterable, Mapping

import numpy as np

from blip3o_jax.scenes.detect import Detection, detect, look
from blip3o_jax.scenes.sprites import LETTERS, SPRITE

__all__ = ["Detection", "detect", "judge", "judge_batch"]

POSITION_MARGIN = 0.1  # GenEval's: share of both sizes that an offset must exceed
MOST_UNEXPLAINED = 48  # px


def judge(image: np.ndarray, metadata: Mapping) -> dict:
    """The verdict on a picture [64, 64, 3], uint8 or float 0..1.

    correct: GenEval's original rules: at least `count` of each class, those with the least error in
    the right colour and position, and
        fewer than `count` of the excluded. For the tag "text": the letters read, in order, are the
        word.
    strict: correct, exactly the counts asked for, nothing else in the picture, and the ground that
    the prompt names. score: the dense reward of GenEval-trained models in 0..1: the mean over what
    was asked of how nearly it was met. detections, reason: what was seen, and in words what is
    wrong ("" if strict).
    """
    text = metadata["tag"] == "text"
    sight = look(image, text)
    letters = [d for d in sight.detections if d.object in LETTERS]
    objects: dict[str, list[Detection]] = {}
    for detection in sight.detections:
        if detection.object not in LETTERS:
            objects.setdefault(detection.object, []).append(detection)
    wrong, score = (
        _judge_word(letters, metadata["word"]) if text else _judge_objects(objects, metadata)
    )
    correct = not wrong
    asked: dict[str, int] = {}
    for item in metadata["include"]:
        asked[item["class"]] = asked.get(item["class"], 0) + item["count"]
    for name in sorted(asked.keys() | objects.keys()):
        number = len(objects.get(name, []))
        if number > asked.get(name, 0):
            wrong.append(f"{number} {name} instead of {asked.get(name, 0)}")
    if sight.unexplained > MOST_UNEXPLAINED:
        wrong.append(f"{sight.unexplained} px of something else")
    if metadata.get("ground", sight.ground) != sight.ground:
        wrong.append(f"ground {sight.ground} instead of {metadata['ground']}")
    return {
        "correct": correct,
        "strict": not wrong,
        "score": score,
        "detections": list(sight.detections),
        "reason": "; ".join(wrong),
    }


def judge_batch(images: Iterable[np.ndarray], metadata: Iterable[Mapping]) -> list[dict]:
    """judge() of every picture with its metadata."""
    return [judge(image, item) for image, item in zip(images, metadata, strict=True)]


def _judge_objects(
    objects: Mapping[str, list[Detection]], metadata: Mapping
) -> tuple[list[str], float]:
    """What breaks GenEval's rules, and the dense score."""
    wrong: list[str] = []
    scores: list[float] = []
    groups: list[list[Detection] | None] = []
    for item in metadata["include"]:
        name, count = item["class"], item["count"]
        everything = objects.get(name, [])
        found = everything[:count]
        scores.append(_nearness(len(everything), count))
        matched = len(found) == count
        if not matched:
            wrong.append(f"{len(found)} {name} instead of {count}")
            scores += [0.0] * (("color" in item) + ("position" in item))
        if matched and "color" in item:
            colors = [d.plain_color for d in found]
            right = colors.count(item["color"])
            scores.append(_nearness(right, count))
            if right < count:
                matched = False
                wrong.append(
                    f"{name} is {', '.join(color or 'natural' for color in colors)} "
                    f"instead of {item['color']}"
                )
        if matched and "position" in item:
            relation, target = item["position"]
            others = groups[target]
            matched = others is not None and all(
                relation in _relations(a, b) for a in found for b in others
            )
            if not matched:
                seen = (
                    "nothing to relate to"
                    if others is None
                    else " and ".join(sorted(_relations(found[0], others[0]))) or "too near"
                )
                wrong.append(f"{name}: {seen} instead of {relation}")
            scores.append(float(matched))
        elif "position" in item and len(found) == count:
            scores.append(0.0)
        groups.append(found if matched else None)
    for item in metadata.get("exclude", []):
        if len(objects.get(item["class"], [])) >= item["count"]:
            wrong.append(
                f"{len(objects[item['class']])} {item['class']}, should be less than "
                f"{item['count']}"
            )
    return wrong, sum(scores) / len(scores)


def _nearness(found: int, count: int) -> float:
    return max(1 - abs(count - found) / count, 0.0)


def _relations(a: Detection, b: Detection) -> set[str]:
    """How `a` lies to `b`, by GenEval's rule: beyond the margin, and within 60 degrees of the
    direction."""
    offset = np.array([a.column_px - b.column_px, a.row_px - b.row_px], np.float64)
    beyond = np.maximum(abs(offset) - POSITION_MARGIN * 2 * SPRITE, 0) * np.sign(offset)
    if not beyond.any():
        return set()
    right, down = beyond / np.linalg.norm(offset)
    holds = {
        "left of": right < -0.5,
        "right of": right > 0.5,
        "above": down < -0.5,
        "below": down > 0.5,
    }
    return {name for name, true in holds.items() if true}


def _judge_word(letters: list[Detection], word: str) -> tuple[list[str], float]:
    """Whether the letters spell the word; the score is 1 - edit distance / length."""
    written = "".join(d.object for d in letters)
    distances = list(range(len(word) + 1))
    for i, letter in enumerate(written):
        row = [i + 1]
        for j, wanted in enumerate(word):
            row.append(min(distances[j] + (letter != wanted), distances[j + 1] + 1, row[j] + 1))
        distances = row
    return ([] if written == word else [f'"{written}" instead of "{word}"']), max(
        1 - distances[-1] / len(word), 0.0
    )
