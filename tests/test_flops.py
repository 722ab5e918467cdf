"""The formulas against XLA's count of the lowered programs, on stacks without loops: scan bodies
are counted once there.

XLA also counts norms, activations and softmax, which the formulas leave out: up to 5 % at these
widths, which are wide for their depth.
"""

import jax
import jax.numpy as jnp
import pytest

from blip3o_jax import flops
from blip3o_jax.config import DcAeConfig, replace
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.models.dc_ae import DcAe
from blip3o_jax.presets import preset
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.condition import edit_options
from blip3o_jax.sample.settings import EditSettings
from blip3o_jax.text import row_length
from blip3o_jax.train import losses
from blip3o_jax.train.distill import distill_loss
from blip3o_jax.train.sections import DistillConfig, JointConfig
from blip3o_jax.train.stages import STAGES

TOLERANCE = 0.05


def small():
    """Single layers, widths at which matrix products are nearly all."""
    return replace(
        preset("mid_128"),
        **{
            "qwen3.num_hidden_layers": 1,
            "sana.num_layers": 1,
            "ta_tok.encoder.num_hidden_layers": 2,
        },
    )


def counted(function, *shapes) -> float:
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def close(formula: int, count: float):
    """XLA's count is the formula's and a little more; the taps on padding a little less."""
    assert formula <= count * 1.01
    assert count <= formula * (1 + TOLERANCE)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture(scope="module")
def model():
    return Blip3o(small())


@pytest.fixture(scope="module")
def params(model):
    return model.abstract()


def test_qwen3_with_logits(model, params):
    batch, length, cfg = 2, 96, model.config.qwen3
    ids = shape(batch, length, dtype=jnp.int32)

    def forward(params, ids, positions, valid):
        hidden, _ = model.qwen3.apply({"params": params}, ids, positions, valid)
        return model.qwen3.apply({"params": params}, hidden, 10, 1000, method="logits")

    # XLA computes the whole square of attention and masks it.
    formula = flops.qwen3(cfg, batch * length, length, 1000)
    close(formula, counted(forward, params["qwen3"], ids, ids, shape(batch, length, dtype=bool)))


def test_connector_and_condition(model, params):
    states = shape(2, 65, model.config.qwen3.hidden_size)
    close(
        flops.connector(model.config, 130),
        counted(
            lambda p, x: model.connector.apply({"params": p}, x),
            params["diffusion_connector"],
            states,
        ),
    )
    captions = shape(2, 65, model.config.sana.caption_channels)
    encode = counted(
        lambda p, x: model.sana.apply({"params": p}, x, method="keys_values"),
        params["sana"],
        captions,
    )
    close(flops.sana_condition(model.config.sana, 130), encode)


def test_sana(model, params):
    cfg = model.config.sana

    def forward(params, x, t, condition):
        return model.sana.apply({"params": params}, x, t, condition, method="step")

    kept = shape(
        cfg.num_layers, 2, 257, cfg.num_cross_attention_heads, cfg.cross_attention_head_dim
    )
    given = shape(2, 16, 16, cfg.in_channels), shape(2), (kept, kept)
    close(flops.sana(cfg, 2, 257), counted(forward, params["sana"], *given))


@pytest.mark.parametrize("positions", [False, True])
def test_denoise(positions):
    model = Blip3o(
        replace(small(), **{"sana.condition_positions": positions, "sana.interpolation_scale": 1.0})
    )
    cfg, params = model.config, model.abstract()
    states = shape(2, cfg.num_condition_tokens, cfg.qwen3.hidden_size)
    noise = shape(2, cfg.sana.sample_size, cfg.sana.sample_size, cfg.sana.in_channels)

    def sample(params, states, noise):
        return generate.denoise(model, params, states, noise, 1, 2.0, 1.0)

    close(sum(flops.denoise(cfg, 2)), counted(sample, params, states, noise))


@pytest.mark.parametrize("name", ["mid_128", "emoji_64"])
def test_dc_ae_both_ways(name):
    cfg = preset(name).dc_ae
    if name == "emoji_64":  # its shuffling forms, wide enough
        cfg = DcAeConfig(**(vars(cfg) | {"block_out_channels": (96, 96, 192, 384)}))
    module = DcAe(cfg)
    params = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, cfg.factor, cfg.factor, 3))
    )
    # XLA does not count the taps that fall on padding, which at the presets' own sides are up to a
    # tenth
    side = 96
    latents, images = (
        shape(1, side, side, cfg.latent_channels),
        shape(1, side * cfg.factor, side * cfg.factor, 3),
    )
    close(
        flops.dc_ae_decode(cfg, 1, side),
        counted(lambda p, x: module.apply(p, x, method="decode"), params, latents),
    )
    close(
        flops.dc_ae_encode(cfg, 1, side),
        counted(lambda p, x: module.apply(p, x, method="encode"), params, images),
    )


def test_ta_tok_encode(model, params):
    cfg = model.config.ta_tok
    images = shape(2, cfg.encoder.image_size, cfg.encoder.image_size, 3)
    counts = counted(
        lambda p, x: model.ta_tok.apply({"params": p}, x, method="encode"), params["ta_tok"], images
    )
    close(flops.ta_tok_encode(cfg, 2), counts)


TOKENS = {"use_und_image_vae": True, "max_sources": 2}
BOTH = {"use_und_image_vae": True, "use_und_image_vae_as_noise": True, "max_sources": 1}


@pytest.mark.parametrize("way", [TOKENS, BOTH])
def test_sources_cost_what_xla_counts(way):
    """The loss of cached edits, less that of cached images, forwards."""
    cfg = replace(small(), **way)
    model, rows, sources = Blip3o(cfg), 2, cfg.max_sources
    params, length, side = model.abstract(), row_length(cfg), cfg.sana.sample_size
    row, latents = shape(rows, dtype=jnp.int32), (side, side, cfg.dc_ae.latent_channels)
    batch = {"tokens": shape(rows, length, dtype=jnp.int32), "start": row}
    batch["codes"] = shape(rows, cfg.ta_tok.num_tokens, dtype=jnp.int32)
    batch["latents"] = shape(rows, *latents)
    codes = shape(rows, sources, cfg.ta_tok.num_tokens, dtype=jnp.int32)
    given = {"source_codes": codes, "source_latents": shape(rows, sources, *latents)}
    edits = batch | given | {"num_sources": row}

    def loss(params, batch):
        return losses.joint_loss(model, JointConfig(), params, batch, jax.random.key(0))[0]

    def step(batch):
        return STAGES["joint"].flops(cfg, JointConfig(trainable_sana="all"), batch)

    # What is trained is passed three times in all.
    count = counted(loss, params, edits) - counted(loss, params, batch)
    close((step(edits) - step(batch)) / 3, count)


def test_a_distillation_step_costs_what_xla_counts():
    cfg = replace(small(), **{"sana.few_steps": 4})
    model, rows, length, side = Blip3o(cfg), 2, row_length(cfg), cfg.sana.sample_size
    params, n = model.abstract(), cfg.ta_tok.num_tokens
    batch = {"tokens": shape(rows, length, dtype=jnp.int32), "start": shape(rows, dtype=jnp.int32)}
    batch["codes"] = shape(rows, n, dtype=jnp.int32)
    batch["latents"] = shape(rows, side, side, cfg.dc_ae.latent_channels)

    def step(own, params, batch):
        def loss(own):
            key = jax.random.key(0)
            return distill_loss(model, DistillConfig(), params | own, batch, key)[0]

        return jax.grad(loss)(own)

    own = {part: params[part] for part in ("sana", "diffusion_connector")}
    close(STAGES["distill"].flops(cfg, DistillConfig(), batch), counted(step, own, params, batch))


@pytest.mark.parametrize("way", [TOKENS, BOTH])
def test_an_edit_costs_what_xla_counts(way):
    """All of it but the image tokens, which are written in a loop."""
    cfg, rows = replace(small(), **way), 2
    model, size = Blip3o(cfg), cfg.image_size
    params, steps = model.abstract(), EditSettings(num_inference_steps=1)
    images = shape(rows, cfg.max_sources, size, size, 3, dtype=jnp.uint8)
    given = params, images, shape(rows, cfg.max_sources, dtype=bool)
    hidden = shape(rows, cfg.num_condition_tokens, cfg.qwen3.hidden_size)
    keys, options = shape(rows, 3, dtype=jnp.uint32), edit_options(steps)
    drawing = {name: x for name, x in options.items() if name not in programs.DECODING}

    def sample(params, images, exists, hidden, keys):
        codes, sources = generate.encode_sources(model, params, images, exists)
        latents = generate.draw_latents(model, params, hidden, keys, sources, **drawing)
        return codes, generate.pictures(model, params, latents)

    prompt = 64 + cfg.max_sources * cfg.ta_tok.num_tokens
    formula = flops.edit(cfg, rows, prompt, 1) - flops.decode(cfg, rows, prompt)
    close(formula, counted(sample, *given, hidden, keys))
    again = flops.edit(cfg, rows, prompt, 3) - flops.edit(cfg, rows, prompt, 2)
    assert again == flops.edit(cfg, rows, prompt, 2) - flops.edit(cfg, rows, prompt, 1) > 0


def test_encoders_of_sources(model, params):
    """Features are of the layers alone; a model that reads no latents encodes none."""
    cfg, size = model.config, model.config.ta_tok.encoder.image_size
    pooled = counted(
        lambda p, x: model.ta_tok.apply({"params": p}, x, method="pooled"),
        params["ta_tok"],
        shape(2, size, size, 3),
    )
    features = replace(cfg, use_tar_siglip_features=True, max_sources=2)
    close(flops.image_encoders(features, 1, 2) - flops.image_encoders(features, 1), pooled)
    both, codes = replace(cfg, **BOTH), flops.ta_tok_encode(cfg.ta_tok, 8)
    latents = flops.dc_ae_encode(cfg.dc_ae, 8, cfg.sana.sample_size)
    assert flops.image_encoders(both, 4, 1) == codes + latents
    vision = cfg.ta_tok.encoder.hidden_size
    connector = Blip3o(features).siglip_connector
    states = shape(3, cfg.ta_tok.num_tokens, vision)
    weights = jax.eval_shape(connector.init, jax.random.key(0), jnp.zeros((1, 1, vision)))
    close(flops.source_connectors(features, 3), counted(connector.apply, weights, states))
    # In the step they are trained, on every row's places.
    step, none = (flops.joint_step(features, 4, 323, sources=n) for n in (2, 0))
    encoders = flops.image_encoders(features, 4, 2) - flops.image_encoders(features, 4)
    assert step - none == 3 * flops.source_connectors(features, 8) + encoders


def test_layers_and_tokens_add_up():
    """What single layers cannot show: each further layer costs the same, and decoding is prefill
    and growing contexts."""
    cfg = preset("mid_128")
    one, two, three = (
        flops.qwen3(replace(cfg.qwen3, num_hidden_layers=n), 8, 100) for n in (1, 2, 3)
    )
    assert three - two == two - one == one
    n, batch, prompt = cfg.ta_tok.num_tokens, 4, 64
    steps = sum(
        flops.qwen3(cfg.qwen3, batch, prompt + i + 1, cfg.vocab.num_image_tokens) for i in range(n)
    )
    prefill = sum(flops.qwen3(cfg.qwen3, batch, i + 1) for i in range(prompt))
    assert flops.decode(cfg, batch, prompt) == steps + prefill
    assert (
        flops.joint_step(cfg, 8, 323)
        == 2 * flops.joint_step(cfg, 4, 323)
        - 2 * cfg.ta_tok.codebook_size * cfg.ta_tok.bottleneck_dim**2
    )


def test_frozen_blocks_are_passed_twice():
    cfg = preset("mid_128")
    n = cfg.num_condition_tokens
    once = flops.sana(cfg.sana, 4, n) + flops.sana_condition(cfg.sana, 4 * n)
    assert flops.joint_step(cfg, 4, 323) - flops.joint_step(cfg, 4, 323, whole_sana=False) == once
