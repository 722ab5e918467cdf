"""Whether the words that a prompt quotes can be read in the image (docs/model.md §7.3)."""

import functools
import importlib.util
import math
import multiprocessing
from collections.abc import Callable, Sequence

import numpy as np

from blip3o_jax.errors import require


def check_extra() -> None:
    """InputError where the reader is not installed."""
    is_there = all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime")))
    install = "install it with: pip install 'blip3o-jax[ocr]'"
    require(is_there, f"The reward 'ocr' needs the extra [ocr]; {install}")


def ocr(
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    metadata: Sequence[dict] = (),
    sources: Sequence[Sequence[np.ndarray]] = (),
) -> list[float]:
    """1 - d / n for the n characters that a prompt quotes: d is 0 where they stand in the text that
    is read, else the edit distance from that text, n at most. nan for a prompt that quotes nothing.
    """
    rewards = []
    for image, prompt in zip(images, prompts, strict=True):
        asked = quoted(prompt)
        rewards.append(agreement(read(image), asked) if asked else math.nan)
    return rewards


def quoted(prompt: str) -> str:
    """What stands between the first two double quotes, without spaces and in lower case; "" where
    there is nothing."""
    _, *inside = prompt.split('"', 2)
    return _plain(inside[0]) if len(inside) == 2 else ""


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


def agreement(text: str, asked: str) -> float:
    """How nearly `text` is, or holds, what was asked for: 0..1."""
    distance = 0 if asked in text else min(edit_distance(text, asked), len(asked))
    return 1 - distance / len(asked)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def read(image: np.ndarray) -> str:
    """All text in an image uint8 [h,w,3], line after line, without spaces and in lower case."""
    # The reader takes channels in OpenCV's order.
    lines = _reader()(np.ascontiguousarray(image[..., ::-1])).txts or ()
    return _plain("".join(lines))


@functools.cache
def _reader() -> Callable:
    from rapidocr import RapidOCR

    # As in the original: lines as they stand, whatever their confidence; and pictures at their own
    # size, where rapidocr would enlarge those below 736 px at ten times the cost.
    settings = {"Global.use_cls": False, "Global.text_score": 0.0, "Det.limit_side_len": 64}
    # All cores, or that of one process of several.
    threads = 1 if multiprocessing.parent_process() else -1
    settings |= {"EngineConfig.onnxruntime.intra_op_num_threads": threads}
    return RapidOCR(params=settings | {"Global.log_level": "error"})
