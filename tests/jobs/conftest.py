"""The tiny editing model, loaded once for each file that asks for it."""

import jax
import pytest
from editing import CHANNELS, checkpoint, picture
from PIL import Image

import blip3o_jax


@pytest.fixture(scope="module")
def channels(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("edit") / "channels", CHANNELS)


@pytest.fixture(scope="module")
def pipeline(channels):
    return blip3o_jax.load(channels, devices=jax.devices()[:1], batch_size=2)


@pytest.fixture
def loaded(pipeline, monkeypatch, tmp_path):
    """The command runs in an empty folder with a model that is loaded already."""
    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", lambda _: pipeline)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(20, 30)).save("a.png")
    Image.fromarray(picture(16, 16, 1)).save("b.png")
