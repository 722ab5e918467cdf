"""Edits that change nothing, of photographs (scikit-image's) of ten sizes and of made pictures: the
whole way of `Pipeline.edits`, with a given answer in the place of the model's."""

import functools

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from skimage import data
from skimage.filters import gaussian
from skimage.registration import phase_cross_correlation

from blip3o_jax import checkpoints, geometry
from blip3o_jax.config import replace
from blip3o_jax.evaluate.edits import heldout, pictures
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.request import Request

CHANNELS = {"use_und_image_vae_as_channels": True, "sana.in_channels": 32, "max_sources": 1}
SIDE = 64  # px of the embedded model's pictures
# Width x height -> a photograph, its part (top, bottom, left, right), at its own size or resized.
PHOTOGRAPHS = {
    "64x64": (data.astronaut, (0, 256, 150, 406)),
    "640x480": (data.coffee, (0, 400, 0, 533)),
    "480x640": (data.chelsea, (0, 300, 80, 305)),
    "1000x300": (data.hubble_deep_field, (0, 300, 0, 1000)),
    "500x33": (data.astronaut, (150, 183, 0, 500)),
    "33x500": (data.coffee, (0, 400, 260, 286)),
    "512x64": (data.astronaut, (200, 264, 0, 512)),
    "33x47": (data.rocket, (50, 420, 200, 460)),
    "241x317": (data.rocket, (0, 427, 158, 482)),
    "1411x1411": (data.retina, (0, 1411, 0, 1411)),
}
MEASURABLE = 16  # of the model's pixels, across which a zoom of half a percent shows


@functools.cache
def photograph(name: str) -> np.ndarray:
    function, (top, bottom, left, right) = PHOTOGRAPHS[name]
    part = Image.fromarray(function()[top:bottom, left:right])
    return np.asarray(part.resize(map(int, name.split("x")), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module")
def pipeline():
    """The embedded autoencoder in an editing model that has no other weights."""
    checkpoint = checkpoints.open("emoji_64")
    cfg, mesh = replace(checkpoint.config, **CHANNELS), make_mesh(devices=jax.devices()[:1])
    return Pipeline(Blip3o(cfg), checkpoint.load(("dc_ae",)), tiny.text(), mesh, "", batch_size=1)


def edited(pipeline, monkeypatch, source, answer, size=SIDE):
    """The edit of a picture by a model of `size` whose answer to the square [B,H,W,3] this is."""

    def edit(params, ids, valid, keys, squares, exists, latents, **options):
        rest = {"latents": np.zeros((1, 1, 1, 1)), "tokens": np.zeros((1, 1))}
        return {"images": answer(squares[:, 0]), **rest}

    monkeypatch.setattr(pipeline, "_edit", edit)
    side = size // pipeline.model.config.dc_ae.factor
    model = Blip3o(replace(pipeline.model.config, **{"sana.sample_size": side}))
    monkeypatch.setattr(pipeline, "model", model)
    (sample,) = pipeline.run([Request("change nothing", (source,))])
    assert sample.image.shape == source.shape
    return sample.image


def blurred(result, source, size):
    """Grey levels of both, f64 [h,w], blurred by half a pixel of the model's, which loses what is
    finer."""
    scale = max(1, max(source.shape[:2]) / size)
    return (
        gaussian(picture.astype(float).mean(axis=2), scale / 2, mode="nearest")
        for picture in (result, source)
    )


def phase_shift(moved, fixed):
    """By how many pixels [rows, columns] a picture is shifted against another: scikit-image's phase
    correlation, not normalised, as a small model leaves no detail whose phase counted."""
    window = np.outer(*(np.hanning(n + 2)[1:-1] for n in fixed.shape))
    windowed = [(x - x.mean()) * window for x in (fixed, moved)]
    return -phase_cross_correlation(*windowed, upsample_factor=50, normalization=None)[0]


def affine_flow(moved, fixed):
    """The shift and the zoom of each axis that explain most of a difference: least squares of
    moved - fixed = -(shift + zoom place) . gradient, contrast and brightness."""
    gradients = np.gradient(fixed)
    places = [at - (n - 1) / 2 for at, n in zip(np.indices(fixed.shape), fixed.shape, strict=True)]
    zooms = (g * at for g, at in zip(gradients, places, strict=True))
    terms = [*gradients, *zooms, fixed, np.ones_like(fixed)]
    terms = np.stack(terms, axis=-1).reshape(-1, len(terms))
    flow = -np.linalg.lstsq(terms, (moved - fixed).ravel())[0]
    return flow[:2], flow[2:4]


def assert_registered(result, source, size):
    """Below half a pixel of the source and half a percent."""
    moved, fixed = blurred(result, source, size)
    shift, zoom = affine_flow(moved, fixed)
    for vector in (phase_shift(moved, fixed), shift):
        assert np.hypot(*vector) < 0.5
    for axis, length in enumerate(fixed.shape):
        if length * size / max(fixed.shape) >= MEASURABLE:
            assert abs(zoom[axis]) < 0.005
            continue
        # Of so thin a picture neither half is shifted.
        for half in (slice(length // 2), slice(length - length // 2, None)):
            part = (slice(None),) * axis + (half,)
            assert abs(phase_shift(moved[part], fixed[part])[axis]) < 0.5


def expected(square, source):
    """A model's square where it lies on its source, by the mapping's formula: the value at a pixel
    is that at (pixel + half a pixel + padding) size / longer side, linearly; f64 [h,w,3]."""
    longer, size = max(source.shape[:2]), len(square)
    values = square.astype(float)
    for axis, length in enumerate(source.shape[:2]):
        at = (np.arange(length) + 0.5 + (longer - length) // 2) * size / longer - 0.5
        at = np.clip(at, 0, size - 1)
        before = np.minimum(at.astype(int), size - 2)
        weight = (at - before).reshape(-1, 1, 1) if axis == 0 else (at - before)[:, None]
        low, high = (np.take(values, before + i, axis=axis) for i in (0, 1))
        values = low + weight * (high - low)
    return values


def means(picture, region=np.s_[:]):
    return picture[region].reshape(-1, 3).mean(axis=0)


@pytest.mark.parametrize("size", [SIDE, 256])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_comes_back_neither_shifted_nor_zoomed(name, size, pipeline, monkeypatch):
    source = photograph(name)
    result = edited(pipeline, monkeypatch, source, lambda square: square, size)
    assert_registered(result, source, size)
    np.testing.assert_allclose(means(result), means(source), atol=1)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_colours_are_those_of_the_autoencoders_round_trip(name, pipeline, monkeypatch):
    """Where an edit paints the middle, and everywhere else."""
    source = photograph(name)
    squares = []

    def answer(square):
        squares.append(np.asarray(pipeline._round_trip(pipeline.params, square))[0])
        painted = squares[0].copy()
        painted[24:40, 24:40] = (255, 0, 255)
        return painted[None]

    result = edited(pipeline, monkeypatch, source, answer)
    roundtrip = expected(squares[0], source)
    at = np.zeros((SIDE, SIDE, 3))
    at[20:44, 20:44] = 1  # with what the resizing spreads
    unpainted = expected(at, source)[..., 0] == 0
    assert 0.4 < unpainted.mean() < 0.9
    np.testing.assert_allclose(means(result, unpainted), means(roundtrip, unpainted), atol=1)
    # The round trip itself is not the source: its colours are the autoencoder's.
    assert np.abs(means(roundtrip) - means(source)).max() > 1


@pytest.mark.parametrize("side", [40, 64, 300])
def test_what_the_autoencoder_makes_of_its_own_world_is_not_shifted(side, pipeline, monkeypatch):
    def answer(square):
        return pipeline._round_trip(pipeline.params, square)

    for scene in pictures(heldout(3))[0]:
        source = np.asarray(Image.fromarray(scene).resize((side, side), Image.Resampling.LANCZOS))
        result = edited(pipeline, monkeypatch, source, answer)
        assert_registered(result, source, SIDE)


@pytest.mark.parametrize("name", ["640x480", "1411x1411"])
def test_a_shift_of_half_a_pixel_and_a_zoom_of_half_a_percent_are_seen(name):
    """The measures above, on pictures that are shifted and zoomed by Pillow."""
    source = photograph(name)
    height, width = source.shape[:2]
    image, zoom = Image.fromarray(source), 1.006
    x, y = (n / 2 * (1 - 1 / zoom) for n in (width, height))

    def transformed(*matrix):
        options = Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
        return np.asarray(image.transform(image.size, *options))

    def flow(result):
        return affine_flow(*blurred(result, source, SIDE))

    shift, zooms = flow(transformed(1, 0, -0.55, 0, 1, 0.3))  # to the right and up
    np.testing.assert_allclose(shift, [-0.3, 0.55], atol=0.1)
    np.testing.assert_allclose(zooms, 0, atol=0.001)
    zooms = flow(transformed(1 / zoom, 0, x, 0, 1, 0))[1]
    np.testing.assert_allclose(zooms, [0, 0.006], atol=0.001)
    zooms = flow(transformed(1, 0, 0, 0, 1 / zoom, y))[1]
    np.testing.assert_allclose(zooms, [0.006, 0], atol=0.001)


def test_a_mapping_that_is_off_by_a_pixel_is_seen(pipeline, monkeypatch):
    source = photograph("640x480")
    real = geometry.from_square

    def off(square, place):
        return np.roll(real(square, place), 1, axis=0)

    monkeypatch.setattr(geometry, "from_square", off)
    result = edited(pipeline, monkeypatch, source, lambda square: square)
    moved, fixed = blurred(result, source, SIDE)
    np.testing.assert_allclose(phase_shift(moved, fixed), [1, 0], atol=0.1)
    np.testing.assert_allclose(affine_flow(moved, fixed)[0], [1, 0], atol=0.1)
