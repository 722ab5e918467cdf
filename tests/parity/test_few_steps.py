"""SANA with spans against diffusers' with the same addition, and what is left without it."""

import jax
import numpy as np
import pytest
from against_torch import close, first, last
from reading import load
from tiny import SMALL

from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.sample import condition

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")


def test_velocities_over_spans(tmp_path):
    from blip3o_jax.reference import modules

    config = replace(preset("emoji_64"), **SMALL | {"sana.few_steps": 4, "sana.num_layers": 2})
    random_checkpoint(tmp_path / "few", config)
    cfg, params = load(tmp_path / "few")
    assert cfg.sana.few_steps == 4
    model, ref = Blip3o(cfg), modules.load(tmp_path / "few")
    rng, side = np.random.default_rng(0), cfg.sana.sample_size
    x = rng.standard_normal((3, side, side, cfg.dc_ae.latent_channels), np.float32)
    hidden = rng.standard_normal((3, cfg.num_condition_tokens, 32), np.float32)
    t, span = np.float32([900, 500, 20]), rng.uniform(size=(3, 4)).astype(np.float32)
    given = condition.build(model, params, hidden)

    @jax.jit
    def ours(span):
        return condition.velocity(model, params, x, t, given, span)

    with torch.no_grad():
        tokens = ref.connector(torch.from_numpy(hidden))
        inputs = first(x), torch.from_numpy(t), tokens
        plain = ref.velocity(*inputs)
        ref.sana.span_embed.span = torch.from_numpy(span)
        moved = ref.velocity(*inputs)
    close(ours(span), last(moved))
    close(ours(np.float32([[0, 0, 0, 1]])), last(plain))
    close(ours(None), last(plain))
    assert (moved - plain).abs().max() > 0.01 * plain.abs().max()
