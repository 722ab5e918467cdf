"""A record to arrays: decoding, the crop, the caption's length; and counts of what was not used."""

import json
import logging
import threading

import numpy as np
from PIL import Image

from blip3o_jax import paths
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data.records import Record, RecordError
from blip3o_jax.errors import InputError, require
from blip3o_jax.geometry import to_square
from blip3o_jax.paths import AnyPath
from blip3o_jax.pictures import LIMITS, Limits, PictureError, decode
from blip3o_jax.pixels import centre_crop, squash
from blip3o_jax.text import Text, edit_prompt, t2i_prompt

ENCODED = ("codes", "latents", "source_codes", "source_latents")  # what a cache holds of a record
MIN_READ = 1000  # records before the share of bad ones means something

log = logging.getLogger(__name__)


def decode_image(data: bytes, limits: Limits = LIMITS) -> Image.Image:
    """Encoded bytes -> RGB, as `pictures.decode`; RecordError when they cannot be used."""
    try:
        return decode(data, limits)
    except PictureError as error:
        raise RecordError(f"the image cannot be decoded ({error})") from error


def prompt_length(tokenizer: Text, caption: str, num_sources: int = 0) -> int:
    """Tokens of the templated caption, or of an edit's instruction without its images."""
    prompt = edit_prompt(caption, num_sources, 0) if num_sources else t2i_prompt(caption)
    return len(tokenizer.ids(prompt))


def fit_caption(tokenizer: Text, caption: str, num_sources: int = 0) -> str:
    """The longest beginning of the caption, by its tokens, whose prompt is no longer than the model
    allows."""
    encoding = tokenizer.tokenizer.encode(caption, add_special_tokens=False)
    count = len(encoding.ids)
    limit = tokenizer.max_prompt_tokens
    while count > 0 and (excess := prompt_length(tokenizer, caption, num_sources) - limit) > 0:
        count -= excess
        caption = caption[: encoding.offsets[count - 1][1]].rstrip() if count > 0 else ""
    return caption


class Tally:
    """Counts of records read, bad, and of captions truncated or dropped; thread-safe.

    A bad record is named in `path` (a line of JSON: key, reason) once. InputError when they are
    more than `max_fraction` of those read, or of `MIN_READ` while fewer are.
    """

    def __init__(self, max_fraction: float, path: AnyPath | None = None):
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
                    paths.append_text(self.path, json.dumps({"key": key, "reason": reason}) + "\n")
            # a share of at least MIN_READ, as the first record read may be a bad one
            bad, read = self.counts["bad"], self.counts["read"]
            limit = f"more than data.max_bad_fraction {self.max_fraction}"
            last = f"(the last: {key}: {reason})" + f"; {self.path} names them" * bool(self.path)
            few = bad <= self.max_fraction * max(read, MIN_READ)
            require(few, f"{bad} of {read} records cannot be used, {limit} {last}.")


def fit_square(picture: Image.Image, size: int, padded: bool) -> np.ndarray:
    """A picture as uint8 [size,size,3]: `padded` to a square as `edit` does, or its middle;
    RecordError for one with too long a side."""
    if not padded:
        return centre_crop(picture, size)
    try:
        return to_square(np.asarray(picture), size)[0]
    except InputError as error:
        raise RecordError(str(error).rstrip(".")) from error


def image_arrays(
    record: Record, model: Blip3oConfig, crop: str, limits: Limits
) -> dict[str, np.ndarray]:
    """`images` uint8 [size,size,3]; of an edit also `sources` [N,size,size,3], all padded to a
    square as `edit` does; with the original's crop, `view`, the tokenizer's."""
    size = model.image_size
    image, *inputs = (decode_image(data, limits) for data in (record.image, *record.inputs))
    padded = bool(inputs) and crop != "original"
    arrays = {"images": fit_square(image, size, padded)}
    if inputs:
        arrays["sources"] = np.stack([fit_square(picture, size, padded) for picture in inputs])
    if crop == "original":
        arrays["view"] = squash(image, model.ta_tok.encoder.image_size)
    return arrays


def with_sources(arrays: dict[str, np.ndarray], model: Blip3oConfig) -> dict[str, np.ndarray]:
    """The arrays of a row with `num_sources`, and its source images or what a cache holds of them
    padded by zeros to as many as the model takes."""
    names = {"source_codes": "codes", "source_latents": "latents"}
    names = names if "codes" in arrays else {"sources": "images"}
    count = len(arrays.get(next(iter(names)), ()))
    padded = {}
    for name, like in names.items():
        padded[name] = np.zeros((model.max_sources, *arrays[like].shape), arrays[like].dtype)
        padded[name][:count] = arrays.get(name, 0)
    return arrays | padded | {"num_sources": np.int32(count)}
