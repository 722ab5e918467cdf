"""A record to arrays: decoding, the crop, the caption's length; and counts of what was not used."""

import io
import json
import logging
import pathlib
import threading
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data.config import DataConfig
from blip3o_jax.data.records import Record, RecordError, Source
from blip3o_jax.errors import InputError
from blip3o_jax.pixels import centre_crop, squash
from blip3o_jax.text import Text, t2i_prompt

ATTEMPTS = 100  # records in the place of one that cannot be used
MIN_READ = 1000  # records before the share of bad ones means something

log = logging.getLogger(__name__)


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB; RecordError when they are damaged."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except UnidentifiedImageError as error:  # whose text names an address in memory
        raise RecordError("the image cannot be decoded (its format is unknown)") from error
    except Exception as error:  # decoders of images raise what they please
        reason = str(error) or type(error).__name__
        raise RecordError(f"the image cannot be decoded ({reason})") from error


def prompt_length(tokenizer: Text, caption: str) -> int:
    """Tokens of the templated caption."""
    return len(tokenizer.tokenizer.encode(t2i_prompt(caption), add_special_tokens=False).ids)


def fit_caption(tokenizer: Text, caption: str) -> str:
    """The longest beginning of the caption, by its tokens, whose prompt is no longer than the model
    allows."""
    encoding = tokenizer.tokenizer.encode(caption, add_special_tokens=False)
    count = len(encoding.ids)
    limit = tokenizer.max_prompt_tokens
    while count > 0 and (excess := prompt_length(tokenizer, caption) - limit) > 0:
        count -= excess
        caption = caption[: encoding.offsets[count - 1][1]].rstrip() if count > 0 else ""
    return caption


class Tally:
    """Counts of records read, bad, and of captions truncated or dropped; thread-safe.

    A bad record is named in `path` (a line of JSON: key, reason) once. InputError when they are
    more than `max_fraction` of those read, or of `MIN_READ` while fewer are.
    """

    def __init__(self, max_fraction: float, path: pathlib.Path | None = None):
        self.max_fraction = max_fraction
        self.path = path
        self.counts = {"read": 0, "bad": 0, "truncated": 0, "dropped": 0, "bytes": 0}
        self._named = set()
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        """Adds to the counts; long captions are logged at powers of two."""
        with self._lock:
            for name, count in counts.items():
                self.counts[name] += count
                total, read = self.counts[name], self.counts["read"]
                if name in ("truncated", "dropped") and total & (total - 1) == 0:
                    log.info("Captions too long: %d %s of %d records read.", total, name, read)

    def bad(self, key: str, reason: str) -> None:
        """Counts a record that cannot be used."""
        with self._lock:
            self.counts["bad"] += 1
            if key not in self._named:
                self._named.add(key)
                log.warning("Record %s is not used: %s.", key, reason)
                if self.path:
                    with self.path.open("a") as file:
                        file.write(json.dumps({"key": key, "reason": reason}) + "\n")
            bad, read = self.counts["bad"], self.counts["read"]
            if bad > self.max_fraction * max(read, MIN_READ):
                where = f"; {self.path} names them" if self.path else ""
                raise InputError(
                    f"{bad} of {read} records cannot be used, more than data.max_bad_fraction "
                    f"{self.max_fraction} (the last: {key}: {reason}){where}."
                )


def token_row(text: Text, caption: str, num_tokens: int, length: int) -> dict[str, np.ndarray]:
    """`tokens` int32 [length] and `start` int32 of a caption and an image, whose codes are made on
    the device and written there."""
    prompt = text.encode_prompt(caption)
    tokens, start = text.training_rows([prompt], np.zeros((1, num_tokens), np.int32), length)
    return {"tokens": tokens[0], "start": start[0]}


@dataclass
class Rows:
    """Record number -> the arrays of a training row; of a bad record, those of the next good one.

    `source` gives Records, or the cache's dicts with `codes` and `latents`. Rows hold what
    `token_row` gives, and what `image_arrays` gives or `codes` and `latents`.
    """

    source: Source
    tokenizer: Text
    model: Blip3oConfig
    data: DataConfig
    length: int
    tally: Tally

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        for attempt in range(ATTEMPTS):
            number = (i + attempt) % len(self.source)
            self.tally.add(read=1)
            try:
                if (row := self._row(self.source[number])) is not None:
                    return row
            except RecordError as error:
                self.tally.bad(self.source.key(number), str(error))
        raise InputError(
            f"None of {ATTEMPTS} records from {self.source.key(i)} on can be used; "
            "see `blip3o-jax data check`."
        )

    def _row(self, record: Record | dict) -> dict[str, np.ndarray] | None:
        # The caption: shortened, or the record dropped, when its prompt is too long.
        cached = isinstance(record, dict)
        caption = record["caption"] if cached else record.caption
        if prompt_length(self.tokenizer, caption) > self.tokenizer.max_prompt_tokens:
            if self.data.long_captions == "drop":
                return self.tally.add(dropped=1)
            self.tally.add(truncated=1)
            caption = fit_caption(self.tokenizer, caption)
        try:
            row = token_row(self.tokenizer, caption, self.model.ta_tok.num_tokens, self.length)
        except InputError as error:
            raise RecordError(str(error).rstrip(".")) from error

        # The image: its encodings from a cache, or its pixels.
        if cached:
            self.tally.add(bytes=record["codes"].nbytes + record["latents"].nbytes)
            return row | {"codes": record["codes"], "latents": record["latents"]}
        if record.inputs:
            raise RecordError("it is an edit, which cannot be trained on yet")
        self.tally.add(bytes=len(record.image))
        return row | image_arrays(record, self.model, self.data.crop)


def image_arrays(record: Record, model: Blip3oConfig, crop: str) -> dict[str, np.ndarray]:
    """`images` uint8 [size,size,3] and, with the original's crop, `view`, the tokenizer's."""
    image = decode_image(record.image)
    arrays = {"images": centre_crop(image, model.image_size)}
    if crop == "original":
        arrays["view"] = squash(image, model.ta_tok.encoder.image_size)
    return arrays
