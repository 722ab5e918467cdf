"""Eight simulated CPU devices for every test (set before jax is imported), and what tests share."""

import functools
import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)


@pytest.fixture(scope="session", autouse=True)
def shapes_are_traced_once():
    """Keeps the shapes of every model: tracing them takes half a second, and every reader and
    writer asks for them."""
    from blip3o_jax.models.blip3o import Blip3o

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blip3o, "abstract", functools.cache(Blip3o.abstract))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded tokenizer as rows are made with it."""
    import tiny

    return tiny.text()
