"""Pictures of every kind come out as a viewer shows them, and the others are refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from blip3o_jax import pictures
from blip3o_jax.data.records import RecordError
from blip3o_jax.data.transform import decode_image
from blip3o_jax.errors import InputError
from blip3o_jax.pictures import PictureError, decode

RAMP = np.arange(256, dtype=np.uint8)[None].repeat(3, axis=0)
RED = (255, 0, 0)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def levels(data: bytes) -> np.ndarray:
    """The grey levels [h,w] of a picture without colour."""
    pixels = np.asarray(decode(data))
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_sixteen_bits_stays_a_ramp(kind):
    deep = RAMP.astype(np.uint16) * 257
    np.testing.assert_array_equal(levels(encoded(Image.fromarray(deep), kind)), RAMP)


def test_grey_of_sixteen_bits_opened_as_integers_stays_a_ramp():
    """A netpbm file is opened in mode I."""
    data = b"P5 256 3 65535\n" + (RAMP.astype(">u2") * 257).tobytes()
    assert Image.open(io.BytesIO(data)).mode == "I"
    np.testing.assert_array_equal(levels(data), RAMP)
    beyond = Image.fromarray(RAMP.astype(np.int32) * 70000)
    with pytest.raises(PictureError, match=r"^its grey levels are beyond 16 bits$"):
        decode(encoded(beyond, "tiff"))


@pytest.mark.parametrize("scale", [1, 1 / 255])
def test_floats_are_of_one_or_of_255(scale):
    image = Image.fromarray(RAMP.astype(np.float32) * np.float32(scale))
    np.testing.assert_array_equal(levels(encoded(image, "tiff")), RAMP)


@pytest.mark.parametrize("extreme", [-1.0, 256.0, float("nan")])
def test_floats_beyond_are_refused(extreme):
    values = RAMP.astype(np.float32)
    values[0, 0] = extreme
    with pytest.raises(PictureError, match=r"^its grey levels are floats beyond 0 to 255$"):
        decode(encoded(Image.fromarray(values), "tiff"))


def pixel(data: bytes) -> tuple[int, ...]:
    return decode(data).getpixel((0, 0))


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (4, 4), (*RED, 128))
    assert pixel(encoded(half)) == (255, 127, 127)
    assert pixel(encoded(Image.new("RGBA", (4, 4), (*RED, 0)))) == (255, 255, 255)
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 51)))) == (204, 204, 204)
    # A colour declared transparent (tRNS), in RGB, in grey and in a palette.
    assert pixel(encoded(Image.new("RGB", (4, 4), RED), transparency=RED)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (4, 4), RED), transparency=(0, 0, 1))) == RED
    assert pixel(encoded(Image.new("L", (4, 4), 7), transparency=7)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert pixel(encoded(palette)) == RED
    assert pixel(encoded(palette, transparency=1)) == (255, 255, 255)
    assert pixel(encoded(palette, "gif", transparency=1)) == (255, 255, 255)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


GREY, COLOUR, GREY_ALPHA = 0, 2, 4  # kinds of PNG


def png(kind: int, depth: int, values: list[int], transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of one row, not by Pillow; `transparent` is the level or colour that is not seen."""
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    channels = {GREY: 1, COLOUR: 3, GREY_ALPHA: 2}[kind]
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", len(values) // channels, 1, depth, kind, 0, 0, 0))
    ]
    if transparent:
        parts.append(chunk(b"tRNS", struct.pack(f">{channels}H", *transparent)))
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("depth", "values", "transparent", "shown"),
    [
        (1, [0, 0, 0, 0, 1, 1, 1, 1], 0, [255] * 8),
        (1, [0, 0, 0, 0, 1, 1, 1, 1], 1, [0] * 4 + [255] * 4),
        (2, [0, 1, 2, 3], 1, [0, 255, 170, 255]),
        (4, [0, 7, 8, 15], 7, [0, 255, 136, 255]),
        (8, [0, 7, 8, 15], 7, [0, 255, 8, 15]),
        (16, [0, 25700, 25701, 65535], 25700, [0, 255, 100, 255]),
    ],
)
def test_a_transparent_grey_level_is_one_of_any_depth(depth, values, transparent, shown):
    data = png(GREY, depth, values, (transparent,))
    assert levels(data)[0].tolist() == shown
    # An image that Pillow opened, twice.
    image = Image.open(io.BytesIO(data))
    for _ in range(2):
        assert pictures.array(image)[0, :, 0].tolist() == shown
    opaque = np.array(values) * 255 // (2**depth - 1)
    assert levels(png(GREY, depth, values))[0].tolist() == opaque.tolist()


def test_colours_and_alpha_of_sixteen_bits():
    """A transparent colour is refused: Pillow cuts colours to eight bits, which makes these two
    one."""
    assert pixel(png(COLOUR, 16, [65535, 25700, 0])) == (255, 100, 0)
    assert pixel(png(GREY_ALPHA, 16, [25700, 32896])) == (177, 177, 177)
    data = png(COLOUR, 16, [771, 515, 3, 770, 515, 3], (771, 515, 3))
    with pytest.raises(PictureError, match=r"^it has colours of 16 bits of which one is transp"):
        decode(data)


def test_a_palette_has_an_alpha_for_each_of_its_colours():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *RED, *RED])
    image.putdata([0, 1, 2])
    shown = decode(encoded(image, transparency=bytes([0, 128, 255])))
    assert [shown.getpixel((i, 0)) for i in range(3)] == [(255,) * 3, (255, 127, 127), RED]


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda stored: stored),
        (2, np.fliplr),
        (3, lambda stored: np.rot90(stored, 2)),
        (4, np.flipud),
        (5, lambda stored: stored.swapaxes(0, 1)),
        (6, lambda stored: np.rot90(stored, -1)),
        (7, lambda stored: np.rot90(stored.swapaxes(0, 1), 2)),
        (8, np.rot90),
    ],
)
def test_each_of_the_eight_orientations_is_undone(orientation, turn):
    stored = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode(encoded(Image.fromarray(stored), exif=exif))
    np.testing.assert_array_equal(np.asarray(shown), turn(stored))


def test_exif_turns_a_picture():
    image = Image.new("RGB", (8, 4), "black")
    image.paste(RED, (0, 0, 4, 4))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    for kind in ("png", "jpeg"):
        turned = np.asarray(decode(encoded(image, kind, exif=exif)))
        assert turned.shape == (8, 4, 3)
        assert turned[:3, :, 0].min() > 200
        assert turned[5:, :, 0].max() < 50
    damaged = encoded(image, "jpeg", exif=b"Exif\0\0nonsense")
    assert decode(damaged).size == (8, 4)


def test_inks_become_colours():
    assert pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "tiff")) == RED
    red, green, blue = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg"))
    assert red > 245
    assert max(green, blue) < 10


def linear_profile() -> bytes:
    """sRGB's profile with a gamma of 1: its three curves, which are one, without an exponent."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    tags = [struct.unpack(">4sII", profile[i : i + 12]) for i in range(132, 132 + 12 * count, 12)]
    for name, offset, size in tags:
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + size] = b"curv".ljust(size, b"\0")
    return bytes(profile)


def test_colours_of_a_profile_become_srgb():
    grey = Image.new("RGB", (4, 4), (55, 55, 55))
    assert pixel(encoded(grey, icc_profile=linear_profile())) == pytest.approx((128,) * 3, abs=1)
    half = Image.new("RGBA", (4, 4), (55, 55, 55, 128))
    through = pixel(encoded(half, icc_profile=linear_profile()))
    assert through == pytest.approx((191,) * 3, abs=1)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixel(encoded(grey, icc_profile=srgb)) == pytest.approx((55,) * 3, abs=1)
    # A damaged one is ignored, and so is one for other colours.
    for other in (b"nonsense", linear_profile()[:200]):
        assert pixel(encoded(grey, icc_profile=other)) == (55, 55, 55)
    assert pixel(encoded(Image.new("L", (4, 4), 55), icc_profile=srgb)) == (55, 55, 55)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header alone says this size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + end + b"\0\0\0\0IDAT" + b"\0" * 8


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
GIF = encoded(
    Image.new("L", (4, 4), 9),
    "gif",
    save_all=True,
    append_images=[Image.new("L", (4, 4), i) for i in (1, 2)],
)
APNG = encoded(
    Image.new("L", (4, 4), 9),
    save_all=True,
    append_images=[Image.new("L", (4, 4), i) for i in (1,)],
)
WEBP = encoded(NOISE, "webp", save_all=True, append_images=[NOISE.rotate(90)])
PAGES = encoded(NOISE, "tiff", save_all=True, append_images=[NOISE])


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        (b"", "it is empty"),
        (b"not a picture", "its format is unknown"),
        (encoded(NOISE)[:-2000], "it is truncated"),
        (encoded(NOISE, "jpeg")[:-500], "it is truncated"),
        (bomb(8193, 8192), "it has more than 67,108,864 pixels"),
        (bomb(60000, 60000), "it has more than 67,108,864 pixels"),
        (GIF, r"it is animated \(3 frames\)"),
        (APNG, r"it is animated \(2 frames\)"),
        (WEBP, r"it is animated \(2 frames\)"),
        (PAGES, "it has 2 pages"),
        (encoded(NOISE, "eps"), r"it is a drawing \(EPS\), which is not rendered"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(data, phrase, tmp_path):
    with pytest.raises(PictureError, match=f"^{phrase}$"):
        decode(data)
    with pytest.raises(RecordError, match=rf"^the image cannot be decoded \({phrase}\)$"):
        decode_image(data)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InputError, match=f"a cannot be used: {phrase}.$"):
        pictures.array(tmp_path / "a")


def test_a_photograph_with_its_preview_is_one_picture():
    preview = Image.new("RGB", (8, 8))
    data = encoded(NOISE, "mpo", save_all=True, append_images=[preview], quality=95)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert decode(data).size == (64, 64)


def test_a_picture_of_any_kind_is_an_array(tmp_path):
    expected = np.asarray(NOISE)
    NOISE.save(tmp_path / "a.png")
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), NOISE, expected):
        np.testing.assert_array_equal(pictures.array(picture), expected)
    assert pictures.array(Image.new("RGBA", (4, 4), (*RED, 128)))[0, 0].tolist() == [255, 127, 127]
    with pytest.raises(InputError, match=r"^The picture .*b.png cannot be read: No such file"):
        pictures.array(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"^The picture .* cannot be read: Is a directory\.$"):
        pictures.array(tmp_path)
    with pytest.raises(InputError, match=r"float64 \[4,4,3\], not uint8 \[h,w,3\]"):
        pictures.array(np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match=r"uint8 \[0,4,3\], not"):
        pictures.array(np.zeros((0, 4, 3), np.uint8))
