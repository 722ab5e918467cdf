"""Rewards by the judge of the embedded world, one image at a time."""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.errors import InputError, first_line, require
from blip3o_jax.scenes import judge
from blip3o_jax.scenes.scene import SIZE

# Reward -> the verdict that it is, of a prompt and of an edit; None where it has nothing to say.
# Dense scores, strict verdicts, and what an edit did and what it left.
REWARDS = {
    "scenes": ("score", "score"),
    "strict": ("strict", "success"),
    "edit_done": (None, "done"),
    "edit_kept": (None, "kept"),
}
# What is logged of a verdict; of an edit's under the name edit_NAME.
OF_PROMPTS, OF_EDITS = ("score", "correct", "strict"), ("score", "done", "kept", "success")
LACKING = "has no metadata of GenEval (`tag`, `include`) to judge it by"


def check_metadata(prompt: str, metadata: dict) -> None:
    """InputError unless a prompt has what GenEval's rules look at."""
    require({"tag", "include"} <= metadata.keys(), f"{prompt!r} {LACKING}.")
    items = metadata["include"]
    if metadata["tag"] == "text":
        known = items == [] and isinstance(metadata.get("word"), str) and metadata["word"] != ""
        require(known, f"{prompt!r} {LACKING}: tag 'text' has a `word` and nothing to include.")
        return
    what = 'a list of {"class": NAME, "count": N}, with "color" or "position": [RELATION, INDEX]'
    is_list = isinstance(items, list) and bool(items)
    known = is_list and all(_is_item(item, i) for i, item in enumerate(items))
    require(known, f"{prompt!r} {LACKING}: `include` is {what}, not {items!r}.")


def _is_item(item: object, before: int) -> bool:
    """Whether it can be asked for, as the item that has so many `before` it."""
    match item:
        case {"class": str(), "count": int(count), "position": [str(), int(index)]}:
            return count >= 1 and 0 <= index < before
        case {"class": str(), "count": int(count)}:
            return count >= 1 and "position" not in item
    return False


def judged(
    name: str,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    metadata: Sequence[dict],
    sources: Sequence[Sequence[np.ndarray]] = (),
) -> list[float]:
    """The reward `name` of `REWARDS`."""
    return column(name, verdicts(images, prompts, metadata), metadata)


def verdicts(
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    metadata: Sequence[dict],
    sources: Sequence[Sequence[np.ndarray]] = (),
) -> list[dict]:
    """What the judge says of images [64,64,3], by GenEval's metadata (docs/model.md §7.4) or by the
    "edit" there; InputError for metadata that it cannot judge by."""
    rows, size = [], (SIZE, SIZE, 3)
    for image, prompt, asked in zip(images, prompts, metadata, strict=True):
        shape = np.shape(image)
        require(shape == size, f"The judge of scenes looks at images of {size}, not {shape}.")
        try:
            if edit := asked.get("edit"):
                rows.append(judge.judge_edit(image, edit))
            else:
                rows.append(judge.judge(image, asked))
        except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{prompt!r} {LACKING}: {first_line(error)}.") from error
    return rows


def column(name: str, verdicts: Sequence[dict], metadata: Sequence[dict]) -> list[float]:
    """One reward of `REWARDS` from the verdicts."""
    of_prompt, of_edit = REWARDS[name]
    keys = [of_edit if asked.get("edit") else of_prompt for asked in metadata]
    return [float(v[key]) if key else np.nan for key, v in zip(keys, verdicts, strict=True)]


def logged(verdicts: Sequence[dict], metadata: Sequence[dict]) -> dict[str, np.ndarray]:
    """Of each verdict that is logged f64 [B], NaN for an image of the other kind."""
    names = dict.fromkeys(OF_PROMPTS, False) | {f"edit_{name}": True for name in OF_EDITS}
    columns = {name: np.full(len(verdicts), np.nan) for name in names}
    for i, (verdict, asked) in enumerate(zip(verdicts, metadata, strict=True)):
        for name, of_edits in names.items():
            if of_edits == bool(asked.get("edit")):
                columns[name][i] = verdict[name.removeprefix("edit_")]
    return columns
