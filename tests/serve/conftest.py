"""The tiny editing model and one server of it for each file that asks for them."""

import jax
import pytest
from editing import CHANNELS, checkpoint

import blip3o_jax


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("serve") / "tiny", CHANNELS)


@pytest.fixture(scope="module")
def pipeline(folder):
    """Two images at once; nobody but the server may run it."""
    return blip3o_jax.load(folder, devices=jax.devices()[:1], batch_size=2)


@pytest.fixture(scope="module")
def plain(pipeline):
    """The same model without a server, as `generate` and `edit` run it."""
    from blip3o_jax.pipeline import Pipeline

    own = pipeline
    return Pipeline(own.model, own.params, own.text, own.mesh, own.identity, own.batch_size)


@pytest.fixture(scope="module")
def served(pipeline, tmp_path_factory):
    import serving

    with serving.served(pipeline, tmp_path_factory.mktemp("files")) as running:
        yield running
