"""The tiny editing model, loaded once for each file that asks for it."""

import json
import pathlib

import jax
import pytest
from asking import PROMPTS
from editing import CHANNELS, checkpoint, picture
from PIL import Image

import blip3o_jax
from blip3o_jax.jobs import work


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


@pytest.fixture
def small(loaded, monkeypatch):
    """Shards of three requests, so that a few make several."""
    monkeypatch.setattr(work, "SHARD", 3)
    rows = [json.dumps({"prompt": prompt, "id": f"p{i}"}) for i, prompt in enumerate(PROMPTS)]
    pathlib.Path("prompts.jsonl").write_text("\n".join(rows))


@pytest.fixture
def never(monkeypatch):
    """No weights may be loaded."""

    def load_for(_):
        raise AssertionError("loaded")

    return lambda: monkeypatch.setattr(work, "load_for", load_for)
