"""bfloat16 stage by stage: finite and near float32, with SANA's large activations too (its
published weights reach 1e5 to 1e6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reading import load

from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.resources import ASSETS
from blip3o_jax.verify.stages import TIMESTEP, stage_inputs, stage_outputs


@pytest.fixture(scope="module")
def embedded():
    """(config, float32 params, inputs)."""
    cfg, params = load(ASSETS / "emoji_64")
    return cfg, params, stage_inputs(cfg)


def cast(params, dtype):
    return jax.tree.map(lambda x: np.asarray(x, dtype), params)


def test_every_stage_is_finite_and_near_float32(embedded):
    cfg, params, inputs = embedded
    exact = stage_outputs(Blip3o(cfg), params, inputs)
    rough = stage_outputs(Blip3o(cfg, dtype=jnp.bfloat16), cast(params, jnp.bfloat16), inputs)
    assert set(exact) == set(rough)
    for name, values in exact.items():
        if name in ("codes", "tokens"):
            assert np.mean(values == rough[name]) > 0.95, name
            continue
        found = rough[name].astype(np.float32)
        assert np.isfinite(found).all(), name
        # Guidance on two scales adds three velocities, with as much error as all together.
        limit = 0.06 if name == "edit_guided" else 0.02
        assert np.linalg.norm(found - values) <= limit * np.linalg.norm(values), name


def test_large_activations_overflow_float16_and_not_bfloat16(embedded):
    cfg, params, inputs = embedded
    sana = jax.tree.map(np.array, params["sana"])
    sana["transformer_blocks"]["ff"]["conv_point"]["kernel"][2] *= 1e5
    condition = (
        np.random.default_rng(0)
        .standard_normal((1, cfg.num_condition_tokens, cfg.sana.caption_channels))
        .astype(np.float32)
    )

    # The noisy latents and, as more channels, those of a source.
    latents = np.concatenate([inputs["noise"][:1], inputs["source_latents"][0, :1]], axis=-1)

    def velocity(dtype):
        model = Blip3o(cfg, dtype=dtype).sana
        run = jax.jit(lambda params, x, t, c: model.apply({"params": params}, x, t, c))
        return np.asarray(
            run(cast(sana, dtype), latents, jnp.full(1, TIMESTEP), condition), np.float32
        )

    exact = velocity(np.float32)
    assert not np.isfinite(velocity(np.float16)).all()
    found = velocity(jnp.bfloat16)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - exact) <= 0.05 * np.linalg.norm(exact)
