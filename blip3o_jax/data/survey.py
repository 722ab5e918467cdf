"""Surveys a source record by record: what cannot be used and why, sizes, perceptual hashes, lengths
of captions; of edits, whether the result lies on its source."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from blip3o_jax.data.records import RecordError, Source
from blip3o_jax.data.transform import decode_image, fit_caption, fit_square, prompt_length
from blip3o_jax.errors import InputError
from blip3o_jax.pictures import Limits
from blip3o_jax.registration import register
from blip3o_jax.text import Text

NEAR = 3  # bits of 64 in which the hashes of near duplicates differ at most
BANDS = NEAR + 1  # of two such hashes at least one band agrees
# and of a thumbnail of 8x8 cells none by more than this; a flat picture's hash says too little
CELLS, NEAR_CELLS = 8, 16
# Pictures are registered at most this large. Beyond these limits an edit is misplaced: pixels at
# the model's size, and a share of the picture's.
REGISTERED = 256
SHIFTED, ZOOMED = 0.5, 0.01
REASONS = 10  # kinds of bad records that a report counts


class Seen(NamedTuple):
    """One record; `problem` is "" when it can be used.

    `pixels` is a 64-bit hash of all pixels, `hash` is `dhash`, `thumbnail` the RGB bytes of `CELLS`
    x `CELLS` cells; `tokens` are the longest templated caption's, without source images;
    `registration` is the result's against each source image, as `registration.register`, in the
    model's pixels.
    """

    key: str
    problem: str
    width: int = 0
    height: int = 0
    pixels: int = 0
    hash: int = 0
    thumbnail: bytes = b""
    tokens: int = 0
    captions: int = 1
    inputs: int = 0
    registration: tuple[tuple[float, float] | None, ...] = ()


def dhash(image: Image.Image) -> int:
    """64 bits: of the image shrunk to 9x8 in grey, whether each pixel is brighter than the one to
    its right."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def look(
    source: Source, i: int, tokenizer: Text, image_size: int, crop: str, limits: Limits
) -> Seen:
    """Record i, decoded and tokenised as training would."""
    key = source.key(i)
    try:
        record = source[i]
        image, *inputs = (decode_image(data, limits) for data in (record.image, *record.inputs))
        registration = _registration(image, inputs, image_size, crop)
        for caption in record.captions:
            tokenizer.encode_prompt(fit_caption(tokenizer, caption))
    except (RecordError, InputError) as error:
        return Seen(key, str(error).rstrip("."))
    tokens = max(prompt_length(tokenizer, text, len(inputs)) for text in record.captions)
    pixels = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "big")
    thumbnail = image.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()
    counts = tokens, len(record.captions), len(inputs)
    return Seen(key, "", *image.size, pixels, dhash(image), thumbnail, *counts, registration)


def _registration(
    image: Image.Image, inputs: list[Image.Image], image_size: int, crop: str
) -> tuple[tuple[float, float] | None, ...]:
    """Shift and zoom of an edit's result against each source, all as the model sees them."""
    if not inputs:
        return ()
    side = min(image_size, REGISTERED)
    result, *sources = (fit_square(p, side, crop != "original") for p in (image, *inputs))
    scale = np.array([image_size / side, 1])
    pairs = (register(result, source) for source in sources)
    return tuple(pair and tuple((scale * pair).tolist()) for pair in pairs)


def survey(
    source: Source,
    tokenizer: Text,
    count: int,
    threads: int,
    image_size: int,
    crop: str,
    limits: Limits,
) -> Iterator[Seen]:
    """Looks at `count` records, evenly spread."""
    numbers = [i * len(source) // count for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda i: look(source, i, tokenizer, image_size, crop, limits), numbers)


def misplaced(seen: list[Seen]) -> list[dict]:
    """The pairs of a result and a source image that do not lie on each other: key, source (from 1),
    reason, and unless they are not comparable shift and zoom."""
    lines = []
    for record in seen:
        for number, pair in enumerate(record.registration, 1):
            line = {"key": record.key, "source": number}
            if pair is None:
                lines.append(line | {"reason": "not comparable"})
                continue
            shift, zoom = pair
            reasons = [f"shifted by {shift:.1f} px"] if shift > SHIFTED else []
            reasons += [f"zoomed by {100 * zoom:+.1f} %"] if abs(zoom) > ZOOMED else []
            numbers = {"shift": round(shift, 2), "zoom": round(zoom, 4)}
            if reasons:
                lines.append(line | {"reason": ", ".join(reasons)} | numbers)
    return lines


def equal_groups(seen: list[Seen]) -> list[list[int]]:
    """Positions of records with the same pixels, a list for each picture that is there more than
    once."""
    return [group for group in _groups([s.pixels for s in seen]) if len(group) > 1]


def near_groups(seen: list[Seen]) -> list[list[int]]:
    """The same for pictures that look alike: hash and thumbnail are near, or there is a chain of
    such pairs."""
    # Different pictures, each its own group at first.
    pictures = _groups([s.pixels for s in seen])
    hashes = np.array([seen[first].hash for first, *_ in pictures], np.uint64)
    cells = [np.frombuffer(seen[first].thumbnail, np.uint8) for first, *_ in pictures]
    cells = np.array(cells, np.int16).reshape(len(pictures), 3 * CELLS**2)
    parents = list(range(len(pictures)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    # Only pictures that share a band of their hashes can be near; their groups are joined.
    width = 64 // BANDS
    for band in range(BANDS):
        for bucket in _groups((hashes >> np.uint64(band * width)) & np.uint64(2**width - 1)):
            members = np.array(bucket)
            for k, i in enumerate(bucket[:-1]):
                others = members[k + 1 :]
                others = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= NEAR]
                distances = np.abs(cells[others] - cells[i]).max(axis=1, initial=0)
                for j in others[distances <= NEAR_CELLS].tolist():
                    parents[root(j)] = root(i)
    joined = [
        sorted(i for member in group for i in pictures[member])
        for group in _groups([root(i) for i in range(len(pictures))])
    ]
    return sorted(group for group in joined if len(group) > 1)


def _groups(labels: Sequence[int]) -> list[list[int]]:
    """Positions of each label, in order."""
    groups: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        groups.setdefault(int(label), []).append(position)
    return list(groups.values())


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, 5 %, median, 95 % and maximum; nothing of no values."""
    if not len(values):
        return {}
    numbers = np.quantile(np.asarray(values, float), (0, 0.05, 0.5, 0.95, 1)).tolist()
    return dict(zip(("min", "p5", "median", "p95", "max"), numbers, strict=True))


def summary(
    seen: list[Seen], image_size: int, max_prompt_tokens: int, max_sources: int
) -> dict[str, Any]:
    """Counts and quantiles of one source's records, against the limits of a model."""
    good = [s for s in seen if not s.problem]
    sides = np.array([min(s.width, s.height) for s in good])
    tokens = np.array([s.tokens for s in good])
    # Of an edit, one source image that the result does not lie on is enough.
    pairs = [[pair for pair in s.registration if pair] for s in good if s.inputs]
    # Reasons of bad records without the numbers in them; those in names stay.
    number = re.compile(r"(?<![\w.-])\d[\d.,]*(?!\w)")
    reasons = Counter(number.sub("N", s.problem) for s in seen if s.problem)
    return {
        "looked_at": len(seen),
        "usable": len(good),
        "bad": len(seen) - len(good),
        "reasons": dict(reasons.most_common(REASONS)),
        "several_captions": sum(s.captions > 1 for s in good),
        "edits": len(pairs),
        "more_sources_than_the_model_takes": sum(s.inputs > max_sources for s in good),
        "shifted_edits": sum(any(shift > SHIFTED for shift, _ in own) for own in pairs),
        "zoomed_edits": sum(any(abs(zoom) > ZOOMED for _, zoom in own) for own in pairs),
        "not_comparable_edits": pairs.count([]),
        "shorter_side": quantiles(sides),
        "smaller_than_the_run": int((sides < image_size).sum()),
        "aspect_ratio": quantiles([s.width / s.height for s in good]),
        "prompt_tokens": quantiles(tokens),
        "longer_than_the_prompt": int((tokens > max_prompt_tokens).sum()),
    }
