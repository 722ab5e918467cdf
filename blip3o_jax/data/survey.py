"""Surveys a source record by record: what cannot be used and why, sizes, perceptual hashes, lengths
of captions."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip3o_jax.data.records import Record, RecordError, Source
from blip3o_jax.data.transform import decode_image, fit_caption, prompt_length
from blip3o_jax.errors import InputError
from blip3o_jax.text import Text, edit_prompt

NEAR = 3  # bits of 64 in which the hashes of near duplicates differ at most
BANDS = NEAR + 1  # of two such hashes at least one band agrees
# and of a thumbnail of 8x8 cells none by more than this; a flat picture's hash says too little
CELLS, NEAR_CELLS = 8, 16


@dataclass(frozen=True)
class Seen:
    """One record; `problem` is "" when it can be used.

    `pixels` is a 64-bit hash of all pixels, `hash` is `dhash`, `thumbnail` the RGB bytes of `CELLS`
    x `CELLS` cells; `tokens` are the templated caption's, without source images.
    """

    key: str
    problem: str
    width: int = 0
    height: int = 0
    pixels: int = 0
    hash: int = 0
    thumbnail: bytes = b""
    tokens: int = 0
    inputs: int = 0


def dhash(image: Image.Image) -> int:
    """64 bits: of the image shrunk to 9x8 in grey, whether each pixel is brighter than the one to
    its right."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def look(source: Source, i: int, tokenizer: Text) -> Seen:
    """Record i, decoded and tokenised as training would."""
    key = source.key(i)
    try:
        record = source[i]
        image = decode_image(record.image)
        for data in record.inputs:
            decode_image(data)
        tokens = _tokens(record, tokenizer)
    except RecordError as error:
        return Seen(key, str(error))
    pixels = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "big")
    thumbnail = image.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()
    return Seen(key, "", *image.size, pixels, dhash(image), thumbnail, tokens, len(record.inputs))


def _tokens(record: Record, tokenizer: Text) -> int:
    try:
        tokenizer.encode_prompt(fit_caption(tokenizer, record.caption))
    except InputError as error:
        raise RecordError(str(error).rstrip(".")) from error
    if not record.inputs:
        return prompt_length(tokenizer, record.caption)
    prompt = edit_prompt(record.caption, len(record.inputs), 0)
    return len(tokenizer.ids(prompt))


def survey(source: Source, tokenizer: Text, count: int, threads: int) -> Iterator[Seen]:
    """Looks at `count` records, evenly spread."""
    numbers = [i * len(source) // count for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda i: look(source, i, tokenizer), numbers)


def equal_groups(seen: list[Seen]) -> list[list[int]]:
    """Positions of records with the same pixels, a list for each picture that is there more than
    once."""
    return _groups(np.array([s.pixels for s in seen], np.uint64))


def near_groups(seen: list[Seen]) -> list[list[int]]:
    """The same for pictures that look alike: hash and thumbnail are near, or there is a chain of
    such pairs."""
    # Different pictures, each its own group at first.
    pixels = np.array([s.pixels for s in seen], np.uint64)
    _, first, inverse = np.unique(pixels, return_index=True, return_inverse=True)
    hashes = np.array([seen[i].hash for i in first], np.uint64)
    cells = [np.frombuffer(seen[i].thumbnail, np.uint8) for i in first]
    cells = np.array(cells, np.int16).reshape(len(first), 3 * CELLS**2)
    parents = np.arange(len(first))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    # Only pictures that share a band of their hashes can be near; their groups are joined.
    width = 64 // BANDS
    for band in range(BANDS):
        values = (hashes >> np.uint64(band * width)) & np.uint64(2**width - 1)
        order = np.argsort(values, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
            for k, i in enumerate(bucket[:-1]):
                others = bucket[k + 1 :]
                others = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= NEAR]
                distances = np.abs(cells[others] - cells[i]).max(axis=1, initial=0)
                for j in others[distances <= NEAR_CELLS]:
                    parents[root(int(j))] = root(int(i))
    joined = np.array([root(i) for i in range(len(first))], np.int64)
    return _groups(joined[inverse] if len(first) else inverse)


def _groups(labels: np.ndarray) -> list[list[int]]:
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted(part.tolist() for part in parts if len(part) > 1)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, 5 %, median, 95 % and maximum; nothing of no values."""
    if not len(values):
        return {}
    shares = {"min": 0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1}
    return {name: float(np.quantile(np.asarray(values, float), q)) for name, q in shares.items()}


def summary(seen: list[Seen], image_size: int, max_prompt_tokens: int) -> dict:
    """Counts and quantiles of one source's records."""
    good = [s for s in seen if not s.problem]
    sides = np.array([min(s.width, s.height) for s in good])
    tokens = np.array([s.tokens for s in good])
    return {
        "looked_at": len(seen),
        "usable": len(good),
        "bad": len(seen) - len(good),
        "edits": sum(s.inputs > 0 for s in good),
        "shorter_side": quantiles(sides),
        "smaller_than_the_run": int((sides < image_size).sum()),
        "aspect_ratio": quantiles([s.width / s.height for s in good]),
        "prompt_tokens": quantiles(tokens),
        "longer_than_the_prompt": int((tokens > max_prompt_tokens).sum()),
    }
