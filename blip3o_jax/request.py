"""What is asked of a model, one image of a prompt or of an edit, and what it gives back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from blip3o_jax.errors import InputError, about, check_number, check_seed, require
from blip3o_jax.sample.settings import LEVELS, EditSettings, Settings, check_few_steps, defaults

if TYPE_CHECKING:
    from blip3o_jax.config import Blip3oConfig
    from blip3o_jax.pictures import Picture
    from blip3o_jax.text import Text

SHORTEST = 16  # tokens of the smallest bucket of prompts
BUCKETS = 4  # at most
# Scales of text and source for each set of forwards that guidance has (`condition.guidance`), those
# of the defaults first.
SCALES = ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (2.0, 3.0))


@dataclass(frozen=True, eq=False)
class Request:
    """An image of `prompt`; or, if there are source `images`, of them edited by it, and each result
    again by the instructions `then`.

    An image depends on these fields and on the checkpoint, but not on `id` and `where`, which only
    name it, or `metadata`.
    The first source gives an edit its size. `keep_unchanged`: see `geometry.keep_unchanged`;
    `within`: a mask of the first source, a picture with alpha or its alpha uint8 [h,w], see
    `geometry.masked`. InputError for what contradicts itself.
    """

    prompt: str
    images: tuple[Picture, ...] = ()
    then: tuple[str, ...] = ()
    seed: int = 0
    index: int = 0  # of several images of the same prompt and seed
    settings: Settings | None = None  # by default the model's, see `settled`
    keep_unchanged: float | None = None
    within: Picture | None = None
    id: str = ""
    where: str = ""  # in a file it stands, for errors
    metadata: dict | None = None  # for rewards

    def __post_init__(self):
        check_seed(self.seed)
        kind = EditSettings if self.images else Settings
        if self.settings is not None and type(self.settings) is not kind:
            raise ValueError(f"{kind.__name__} belong to this request, not {self.settings}.")
        is_edit = self.then or self.keep_unchanged is not None or self.within is not None
        names = "`then`, `keep_unchanged` and `within` belong to an edit, which has source images."
        require(bool(self.images) or not is_edit, names)
        if self.keep_unchanged is not None:
            check_number(self.keep_unchanged, "keep_unchanged", 0, LEVELS)

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt, or the instruction of each turn."""
        return (self.prompt, *self.then)

    @property
    def num_sources(self) -> list[int]:
        """Source images of each turn: a further one has the last result alone."""
        return [len(self.images)] + [1] * len(self.then)

    def named(self) -> contextlib.AbstractContextManager:
        """Puts where the request stands, or its id, before an InputError."""
        name = self.where or self.id
        return about(name) if name else contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class Sample:
    """The image uint8 [h,w,3] of a request's `turn`, from 0, and its codebook ids, int32 [n].

    An edit has its source's size. The model drew it as `square` uint8 [H,W,3] from `latents` f32
    [Y,X,C]; `mask` uint8 [h,w] says what is new where other pixels are the source's own.
    """

    request: Request
    turn: int
    image: np.ndarray
    tokens: np.ndarray
    square: np.ndarray | None = None
    latents: np.ndarray | None = None
    mask: np.ndarray | None = None
    facts: dict = field(default_factory=dict)  # more to say of where it is from

    @property
    def prompt(self) -> str:
        """The prompt, or the instruction of this turn."""
        return self.request.texts[self.turn]

    @property
    def seed(self) -> int:
        """The request's."""
        return self.request.seed

    @property
    def index(self) -> int:
        """The request's, of several images of one prompt and seed."""
        return self.request.index


def settled(request: Request, config: Blip3oConfig) -> Request:
    """The request with settings: where it has none, those that the model is sampled by."""
    if request.settings is not None:
        return request
    kind = EditSettings if request.images else Settings
    return replace(request, settings=defaults(config, kind))


def encode(request: Request, config: Blip3oConfig, text: Text) -> list[list[int]]:
    """Token ids of each turn's prompt, those of source images open; InputError for a text that is
    empty, too long or holds a control token, for more source images than the model takes, or for
    settings that it does not know."""
    with request.named():
        if config.sana.few_steps and request.settings is not None:
            check_few_steps(request.settings)
        if not request.images:
            return [text.encode_prompt(request.prompt)]
        config.check_sources(len(request.images))
        sources = [np.zeros((n, config.ta_tok.num_tokens), int) for n in request.num_sources]
        return [text.encode_edit(*turn) for turn in zip(request.texts, sources, strict=True)]


def bucket(request: Request, rows: list[list[int]], config: Blip3oConfig) -> int:
    """The length that the rows of `encode` are padded to. It depends on nothing but the request, so
    that others of its batch do not change its numbers; few lengths are few compiled programs."""
    n, turns = config.ta_tok.num_tokens, zip(rows, request.num_sources, strict=True)
    longest = max(len(row) - count * n for row, count in turns)
    length = config.max_prompt_tokens
    for _ in range(BUCKETS - 1):
        if longest > length // 2 or length // 2 < SHORTEST:
            break
        length //= 2
    return length + config.max_sources * n * bool(request.images)


def repeated(requests: list[Request], num_images: int) -> list[Request]:
    """Each request `num_images` times, with the indexes 0, 1, ...; InputError for none."""
    require(num_images >= 1, f"num_images is at least 1, not {num_images}.")
    require(len(requests) > 0, "There are no prompts.")
    return [replace(request, index=i) for request in requests for i in range(num_images)]


def of_each_shape(
    config: Blip3oConfig, text: Text, guided: bool = False, **settings
) -> Iterator[Request]:
    """A request for each length that prompts are padded to, and of edits also, if `guided`, for
    each set of forwards that guidance has: together they need every program of these settings."""
    sources = (np.zeros((config.image_size, config.image_size, 3), np.uint8),)
    kinds = [((), defaults(config, Settings, **settings))]
    if config.max_sources:
        kinds.append((sources, defaults(config, EditSettings, **settings)))
    for images, own in kinds:
        # Longer and longer, until a length comes that was not there yet.
        lengths = set()
        for words in range(1, config.max_prompt_tokens):
            request = Request(" ".join(["a"] * words), images, settings=own)
            try:
                length = bucket(request, encode(request, config, text), config)
            except InputError:  # longer than a prompt can be
                break
            if length not in lengths:
                lengths.add(length)
                yield request
    # Any prompt does here: denoising does not see its length. One of few steps guides by itself.
    if guided and config.max_sources and not config.sana.few_steps:
        for by_text, by_image in SCALES[1:]:
            scales = {"guidance_scale": by_text, "image_guidance_scale": by_image}
            yield Request("a", sources, settings=replace(own, **scales))
