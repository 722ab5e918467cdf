"""Encoded pictures as a viewer shows them: upright, on white, in sRGB; or why one cannot be shown.

A picture comes as bytes, a path, a PIL image or an array, and leaves as RGB of eight bits.
"""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from blip3o_jax.errors import InputError, os_errors

MAX_PIXELS = 1 << 26  # 8192 x 8192: those of one picture are in memory at once
STILLS = ("MPO", "PSD")  # formats whose further frames are previews and layers

Picture = str | os.PathLike | Image.Image | np.ndarray


class PictureError(ValueError):
    """Why a picture cannot be shown: a phrase about `it`, without a full stop."""


def decode(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB, as `shown`; PictureError for a file that is unknown, damaged, animated
    or too large, which its header says before it is decoded."""
    try:
        image = Image.open(io.BytesIO(data))
        _check(image)
        image.load()
        return shown(image)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(_too_large()) from error
    except UnidentifiedImageError as error:  # whose text names an address in memory
        raise PictureError("its format is unknown" if data else "it is empty") from error
    except Exception as error:  # decoders of images raise what they please
        reason = str(error) or type(error).__name__
        is_cut = "truncated" in reason.lower()
        raise PictureError("it is truncated" if is_cut else f"it is damaged: {reason}") from error


def array(picture: Picture) -> np.ndarray:
    """A picture as uint8 [h,w,3]; InputError for one that cannot be used."""
    name = "A picture"
    try:
        if isinstance(picture, Image.Image):
            _check(picture)
            return np.asarray(shown(picture))
        if isinstance(picture, np.ndarray):
            return _checked(picture)
        name = f"The picture {picture}"
        with os_errors(f"{name} cannot be read"):
            data = Path(picture).read_bytes()
        return np.asarray(decode(data))
    except PictureError as error:
        raise InputError(f"{name} cannot be used: {error}.") from error


def shown(image: Image.Image) -> Image.Image:
    """A decoded image -> RGB: turned as its EXIF says, levels of any depth as eight bits, colours
    by its ICC profile, what is transparent on white."""
    profile = image.info.get("icc_profile")
    # Damaged EXIF and profiles are ignored, as viewers do.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    alpha = None
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if image.has_transparency_data:
            alpha = Image.fromarray(np.uint8(255) * (grey != image.info["transparency"]))
        image = Image.fromarray(_eight_bits(grey, image.mode == "F"))

    # Colours are converted without their transparency, then laid on white.
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    image = image.convert("RGB") if image.mode in ("P", "PA") else image
    if profile:
        with contextlib.suppress(Exception):
            source, target = io.BytesIO(profile), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    image = image.convert("RGB")
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


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
    return np.rint(levels * (255 / limit)).astype(np.uint8)


def _check(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(_too_large())
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


def _too_large() -> str:
    return f"it has more than {MAX_PIXELS:,} pixels"


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        shape = ",".join(map(str, pixels.shape))
        raise PictureError(f"it is {pixels.dtype} [{shape}], not uint8 [h,w,3]")
    return pixels
