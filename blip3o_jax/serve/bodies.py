"""Bodies of /v1/images/generations and /v1/images/edits in OpenAI's form, of a server and of batch
files: the one place that reads them."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from blip3o_jax import geometry
from blip3o_jax.errors import MAX_SEED, InputError
from blip3o_jax.pictures import LIMITS, Limits, PictureError, alpha, decode
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import EditSettings, Settings, check_few_steps

if TYPE_CHECKING:
    from blip3o_jax.config import Blip3oConfig

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
MOST_IMAGES, MOST_PARTIAL = 10, 3
LABELS = ("user", "safety_identifier")  # decide nothing
# Fields whose other values would ask for what is not done here.
FIXED = {
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "quality": ("auto",),
    "response_format": ("b64_json",),
}
FILES = ("image_url", "file_id")  # what an image of a JSON body is named by


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a body may leave out and what it cannot change: the model and its names, the formats of
    the images, the first one by default, and settings whose value is `fixed`.

    A server also streams, encodes as it is asked to, and takes images by `file_id` if it has a
    `file` that gives their bytes.
    """

    models: tuple[str, ...]
    config: Blip3oConfig
    formats: tuple[str, ...]
    seed: int = 0
    settings: Settings = dataclasses.field(default_factory=Settings)
    edit_settings: EditSettings = dataclasses.field(default_factory=EditSettings)
    fixed: tuple[str, ...] = ()
    is_server: bool = False
    limits: Limits = LIMITS
    file: Callable[[str], bytes | None] | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a body asks for: a request for each of its images, and how they are given back."""

    requests: list[Request]
    format: str
    compression: int | None = None  # the encoder's quality, 0 to 100
    stream: bool = False
    partial_images: int = 0


class FieldError(InputError):
    """What is wrong with the field `param` of a body."""

    def __init__(self, param: str, sentence: str):
        super().__init__(f"{param}: {sentence}")
        self.param = param


def check_field(holds: bool, param: str, sentence: str) -> None:
    """FieldError unless the condition holds."""
    if not holds:
        raise FieldError(param, sentence)


def known_fields(url: str, offer: Offer) -> set[str]:
    """The names of all fields that a body may have."""
    kind = EditSettings if url == EDITS else Settings
    known = {field.name for field in dataclasses.fields(kind)} | FIXED.keys() | {*LABELS}
    known |= {"prompt", "model", "n", "size", "seed", "output_format", "stream"}
    known |= {"images", "mask"} if url == EDITS else set()
    if offer.is_server:
        known |= {"output_compression", "partial_images"}
    return known


def read_body(url: str, body: Any, id_: str, offer: Offer, where: str = "") -> Asked:
    """What a body that stands `where` asks for; FieldError for a field that is missing, wrong or
    asks for what is not done here: none is passed over. One that is null is one that is missing."""
    check_field(url in (GENERATIONS, EDITS), "url", f"{GENERATIONS} or {EDITS}, not {url!r}.")
    check_field(isinstance(body, dict), "body", "an object.")
    for name in sorted(body.keys() - known_fields(url, offer)):
        raise FieldError(name, "this field is not served.")
    # Simple fields first, each by its own sentence.
    body = {name: value for name, value in body.items() if value is not None}
    prompt, n, seed = body.get("prompt"), body.get("n", 1), body.get("seed", offer.seed)
    check_field(isinstance(prompt, str), "prompt", "a text, which is missing.")
    _check_whole(n, "n", 1, MOST_IMAGES)
    is_seed = type(seed) is int and 0 <= seed <= MAX_SEED
    check_field(is_seed, "seed", f"a whole number from 0 to {MAX_SEED}, not {_shown(seed)}.")
    _check_fixed(url, body, offer)
    settings = _settings(url, body, offer)
    format_, compression = _encoding(body, offer)
    stream, partial = body.get("stream", False), body.get("partial_images", 0)
    streams = (True, False) if offer.is_server else (False,)
    shown = " or ".join(map(json.dumps, streams))
    is_one = isinstance(stream, bool) and stream in streams
    check_field(is_one, "stream", f"{shown}, not {_shown(stream)}.")
    _check_whole(partial, "partial_images", 0, MOST_PARTIAL)
    check_field(stream or not partial, "partial_images", "these come with stream true alone.")
    # Pictures last, since they take longest.
    images = _images(body.get("images"), offer) if url == EDITS else ()
    mask = _mask(body["mask"], images[0], offer) if "mask" in body else None
    how = {"seed": seed, "settings": settings, "within": mask, "id": id_, "where": where}
    requests = [Request(prompt, images, index=index, **how) for index in range(n)]
    return Asked(requests, format_, compression, stream, partial)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 50 else "such a long one"


def _check_whole(value: Any, name: str, least: int, most: int) -> None:
    is_whole = type(value) is int and least <= value <= most
    check_field(is_whole, name, f"{least} to {most}, not {_shown(value)}.")


def _check_fixed(url: str, body: dict, offer: Offer) -> None:
    """FieldError for another value of what can only be as it is."""
    side = f"{offer.config.image_size}x{offer.config.image_size}"
    fixed = {"model": offer.models, "output_format": offer.formats}
    fixed |= {"size": ("auto", side)} if url == GENERATIONS else {"size": ("auto",)}
    for name, values in (FIXED | fixed).items():
        if name in body:
            shown = " or ".join(json.dumps(value) for value in values)
            check_field(body[name] in values, name, f"{shown}, not {_shown(body[name])}.")
    for name in LABELS:
        check_field(isinstance(body.get(name, ""), str), name, "a text.")


def _settings(url: str, body: dict, offer: Offer) -> Settings:
    settings = offer.edit_settings if url == EDITS else offer.settings
    for name in sorted({field.name for field in dataclasses.fields(settings)} & body.keys()):
        try:
            changed = dataclasses.replace(settings, **{name: body[name]})
        except InputError as error:
            raise FieldError(name, str(error).removeprefix(f"{name} is ")) from error
        if name in offer.fixed:
            only = json.dumps(getattr(settings, name))
            sentence = f"{only}, which this server compiled, not {_shown(body[name])}."
            check_field(changed == settings, name, sentence)
        settings = changed
    if offer.config.sana.few_steps:
        try:
            check_few_steps(settings)
        except InputError as error:
            raise FieldError("guidance_scale", str(error)) from error
    return settings


def _encoding(body: dict, offer: Offer) -> tuple[str, int | None]:
    """The format of the images, and the quality of its encoder."""
    format_, compression = body.get("output_format", offer.formats[0]), None
    if "output_compression" in body:
        compression = body["output_compression"]
        _check_whole(compression, "output_compression", 0, 100)
        is_lossy = format_ in ("jpeg", "webp") or compression == 100
        check_field(is_lossy, "output_compression", "of jpeg and webp; a png has none.")
    return format_, None if format_ == "png" else compression


def _images(images: Any, offer: Offer) -> tuple[np.ndarray, ...]:
    """The source images uint8 [h,w,3] of an edit, which are counted before they are decoded."""
    form = "a list of {image_url} or {file_id}" if offer.file else "a list of {image_url}"
    check_field(isinstance(images, list) and bool(images), "images", f"{form}.")
    try:
        offer.config.check_sources(len(images))
    except InputError as error:
        raise FieldError("images", str(error)) from error
    return tuple(_decoded(images, offer))


def _decoded(images: list, offer: Offer) -> Iterator[np.ndarray]:
    for place, image in enumerate(images):
        name = f"images[{place}]"
        data = _bytes(image, name, offer)
        try:
            picture = np.asarray(decode(data, offer.limits))
            geometry.placement(picture)
        except PictureError as error:
            raise FieldError(name, f"it cannot be used: {error}.") from error
        except InputError as error:
            raise FieldError(name, str(error)) from error
        yield picture


def _bytes(image: Any, name: str, offer: Offer) -> bytes:
    """Those of an encoded image: of a form, of a data URL, or of a file of the server."""
    if isinstance(image, bytes):
        return image
    fields = image if isinstance(image, dict) else {}
    for field in sorted(fields.keys() - set(FILES)):
        raise FieldError(f"{name}.{field}", "this field is not served.")
    url, file_id = (fields.get(field) for field in FILES)
    if offer.file and isinstance(file_id, str) and url is None:
        data = offer.file(file_id)
        check_field(data is not None, name, f"there is no file {_shown(file_id)}.")
        return data
    head, _, data = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    is_data = head.startswith("data:image/") and file_id is None
    check_field(is_data, name, "image_url is a data URL, data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FieldError(name, f"it cannot be used: {error}.") from error


def _mask(mask: Any, source: np.ndarray, offer: Offer) -> np.ndarray:
    """The alpha uint8 [h,w] of a mask, of the size of the first source image."""
    data = _bytes(mask, "mask", offer)
    try:
        levels = alpha(data, offer.limits)
        geometry.check_mask(levels, source)
    except PictureError as error:
        raise FieldError("mask", f"it cannot be used: {error}.") from error
    except InputError as error:
        raise FieldError("mask", str(error)) from error
    return levels


def error_body(
    message: str, param: str | None, kind: str = "invalid_request_error", code: str | None = None
) -> dict:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
