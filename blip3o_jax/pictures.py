"""Encoded pictures as a viewer shows them: upright, on white, in sRGB; or why one cannot be shown.

A picture comes as bytes, a path, a PIL image or an array, and leaves as RGB of eight bits.
"""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from blip3o_jax import paths
from blip3o_jax.errors import InputError, os_errors

MAX_PIXELS = 1 << 26  # 8192 x 8192: those of one picture are in memory at once
MAX_ASPECT = 20.0  # longer side by shorter of a picture that is trained on
ORIENTATION = 0x0112  # EXIF's tag
ROWS = 256  # of a picture that become eight bits at once
DRAWINGS = ("EPS", "WMF")  # formats that Pillow has other programs render, such as Ghostscript
STILLS = ("MPO", "PSD")  # formats whose further frames are previews and layers


class Limits(NamedTuple):
    """What a picture may have at most, told by its header."""

    pixels: int = MAX_PIXELS
    aspect: float = math.inf  # longer side by shorter


LIMITS = Limits()  # of a picture that is edited

Picture = str | os.PathLike | Image.Image | np.ndarray


class PictureError(ValueError):
    """Why a picture cannot be shown: a phrase about `it`, without a full stop."""


def decode(data: bytes, limits: Limits = LIMITS) -> Image.Image:
    """Encoded bytes -> RGB, as `shown`; PictureError for a file that is unknown, damaged, animated
    or beyond the limits, which its header says before it is decoded."""
    with _phrased(data, limits):
        image = Image.open(io.BytesIO(data))
        _check(image, limits)
        image.load()
        return shown(image)


@contextlib.contextmanager
def _phrased(data: bytes, limits: Limits) -> Iterator[None]:
    """Puts a PictureError in place of whatever a decoder of `data` raises."""
    try:
        yield
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(_too_large(limits)) from error
    except UnidentifiedImageError as error:  # whose text names an address in memory
        raise PictureError("its format is unknown" if data else "it is empty") from error
    except Exception as error:  # decoders of images raise what they please
        reason = str(error) or type(error).__name__
        is_cut = "truncated" in reason.lower()
        raise PictureError("it is truncated" if is_cut else f"it is damaged: {reason}") from error


def alpha(data: bytes, limits: Limits = LIMITS) -> np.ndarray:
    """The transparency of encoded bytes, uint8 [h,w], upright; PictureError as `decode`, and for a
    picture without any."""
    with _phrased(data, limits):
        image = Image.open(io.BytesIO(data))
        _check(image, limits)
        return _alpha(image)


def _alpha(image: Image.Image) -> np.ndarray:
    if not image.has_transparency_data:
        raise PictureError("it has no alpha channel")
    image.load()
    return np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))[..., 3]


def array(picture: Picture) -> np.ndarray:
    """A picture as uint8 [h,w,3]; InputError for one that cannot be used."""
    with _named("picture", picture) as name:
        if isinstance(picture, Image.Image):
            _check(picture)
            return np.asarray(shown(picture))
        if isinstance(picture, np.ndarray):
            return _checked(picture, (3,))
        return np.asarray(decode(_read(picture, name)))


def alpha_of(mask: Picture) -> np.ndarray:
    """The transparency uint8 [h,w] of a picture, or that array itself; errors as of `array`, and
    for a picture without any."""
    with _named("mask", mask) as name:
        if isinstance(mask, Image.Image):
            _check(mask)
            return _alpha(mask)
        if isinstance(mask, np.ndarray):
            return _checked(mask, ())
        return alpha(_read(mask, name))


@contextlib.contextmanager
def _named(kind: str, picture: Picture) -> Iterator[str]:
    """What to call it; an InputError that says so in place of a PictureError."""
    name = f"A {kind}" if isinstance(picture, Image.Image | np.ndarray) else f"The {kind} {picture}"
    try:
        yield name
    except PictureError as error:
        raise InputError(f"{name} cannot be used: {error}.") from error


def _read(file: str | os.PathLike, name: str) -> bytes:
    with os_errors(f"{name} cannot be read"):
        return paths.path(file).read_bytes()


def shown(image: Image.Image) -> Image.Image:
    """A decoded image -> RGB: turned as its EXIF says, levels of any depth as eight bits, colours
    by its ICC profile, what is transparent on white."""
    profile = image.info.get("icc_profile")
    # Damaged EXIF and profiles are ignored, as viewers do.
    with contextlib.suppress(Exception):
        is_upright = image.getexif().get(ORIENTATION, 1) == 1
        image = image if is_upright else ImageOps.exif_transpose(image)
    alpha = None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if image.has_transparency_data:
            opaque = grey != image.info["transparency"]
            alpha = Image.fromarray(np.uint8(255) * opaque)
            del opaque
        image = Image.fromarray(_eight_bits(grey, image.mode == "F"))
        del grey

    # Colours are converted without their transparency, then laid on white; a conversion copies.
    if image.has_transparency_data:
        mode = "LA" if image.mode in ("1", "L", "LA", "La") else "RGBA"
        image = image if image.mode == mode else image.convert(mode)
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    image = image.convert("RGB") if image.mode in ("P", "PA") else image
    if profile:
        with contextlib.suppress(Exception):
            source, target = io.BytesIO(profile), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    image = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is None:
        return image
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=alpha)
    return ground


def _eight_bits(levels: np.ndarray, is_float: bool) -> np.ndarray:
    """Grey levels [h,w] -> uint8: of 16 bits, or floats in [0,1] or [0,255]."""
    least, most = (levels.min(), levels.max()) if levels.size else (0, 0)
    limit = 65535
    if is_float:
        limit = 1 if most <= 1 else 255
    # a NaN is in no range
    if not 0 <= least <= most <= limit:
        kinds = "floats beyond 0 to 255" if is_float else "beyond 16 bits"
        raise PictureError(f"its grey levels are {kinds}")
    # In float64, a few rows at a time.
    shown = np.empty(levels.shape, np.uint8)
    for start in range(0, len(levels), ROWS):
        rows = slice(start, start + ROWS)
        shown[rows] = np.rint(levels[rows] * (255 / limit))
    return shown


def _check(image: Image.Image, limits: Limits = LIMITS) -> None:
    if image.format in DRAWINGS:
        raise PictureError(f"it is a drawing ({image.format}), which is not rendered")
    if image.width * image.height > limits.pixels:
        raise PictureError(_too_large(limits))
    if max(image.size) > limits.aspect * min(image.size):
        raise PictureError(f"its longer side is more than {limits.aspect:g} times its shorter")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in STILLS:
        what = f"has {frames} pages" if image.format == "TIFF" else f"is animated ({frames} frames)"
        raise PictureError(f"it {what}")
    _spread_transparency(image)


def _spread_transparency(image: Image.Image) -> None:
    """Puts the transparent grey level of a PNG of 1, 2 or 4 bits, which Pillow leaves as it is
    written, among the eight bits that all levels become when they are read."""
    level, (tile, *_) = image.info.get("transparency"), getattr(image, "tile", ()) or (None,)
    written = tile and tile[-1]
    if level is None or image.format != "PNG":
        return
    # Pillow reads the high bytes alone, of which one colour may be another's.
    if written == "RGB;16B":
        raise PictureError("it has colours of 16 bits of which one is transparent")
    if image.mode == "1":
        level = 255 * bool(level)
    image.info["transparency"] = level * {"L;2": 85, "L;4": 17}.get(written, 1)


def _too_large(limits: Limits) -> str:
    return f"it has more than {limits.pixels:,} pixels"


def _checked(pixels: np.ndarray, channels: tuple[int, ...]) -> np.ndarray:
    is_form = pixels.ndim >= 2 and pixels.shape[2:] == channels
    if pixels.dtype != np.uint8 or not is_form or not pixels.size:
        shape, form = (",".join(map(str, x)) for x in (pixels.shape, ("h", "w", *channels)))
        raise PictureError(f"it is {pixels.dtype} [{shape}], not uint8 [{form}]")
    return pixels
