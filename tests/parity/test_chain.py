"""From prompt ids to pixels, and from images to gradients: this package against transformers +
diffusers + the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from against_torch import TOLERANCE, close, close_gradients, last
from reading import load
from tiny import SMALL, TEXT_ONLY

from blip3o_jax.config import replace
from blip3o_jax.convert.published import published_rules
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.convert.rules import to_torch
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.sample import decode, flow, generate
from blip3o_jax.train import losses, optimizer
from blip3o_jax.train.config import JointConfig, OptimizerConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
STEPS, GUIDANCE = 5, 2.0


def published_like():
    """All that the published presets have and emoji_64 has not (attention in the autoencoder,
    pooling off, no positions), small."""
    return replace(
        preset("emoji_64"),
        name="small",
        **SMALL
        | {
            "qwen3.num_hidden_layers": 2,
            "sana.num_layers": 2,
            "ta_tok.encoder.num_hidden_layers": 3,
            "dc_ae.attention_head_dim": 8,
            "sana.interpolation_scale": None,
            "sana.condition_positions": False,
            "ta_tok.select_layer_id": -2,
            "dc_ae.block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            "dc_ae.encoder_layers_per_block": (1, 1, 1, 1),
            "dc_ae.decoder_layers_per_block": (1, 1, 1, 1),
            "dc_ae.qkv_multiscales": ((), (), (), (5,)),
            "dc_ae.downsample_block_type": "Conv",
            "dc_ae.upsample_block_type": "interpolate",
            "dc_ae.scaling_factor": 0.41407,
        },
    )


@pytest.fixture(scope="module", params=["emoji_64", "published-like"])
def sides(request, tmp_path_factory):
    """(model, params, reference), of the embedded model without editing and of another."""
    from blip3o_jax.reference import modules

    torch.set_num_threads(2)
    text_only = replace(preset("emoji_64"), **TEXT_ONLY)
    folder = tmp_path_factory.mktemp("chain") / "small"
    random_checkpoint(folder, text_only if request.param == "emoji_64" else published_like())
    cfg, params = load(folder)
    return Blip3o(cfg), params, modules.load(folder)


def prompts(cfg):
    """Three prompts of 5, 9 and 7 ids, padded on the left: (ids [3,9], valid)."""
    rng, lengths = np.random.default_rng(1), np.array([5, 9, 7])
    valid = np.arange(9) >= 9 - lengths[:, None]
    ids = np.where(valid, rng.integers(10, 500, valid.shape), cfg.vocab.pad_token_id).astype(
        np.int32
    )
    ids[:, -1] = cfg.vocab.scale_start_token_id
    return ids, valid


def test_from_prompt_ids_to_pixels(sides):
    """Greedy tokens are identical; states, condition, velocity, latents and pixels agree, stage by
    stage from one's own inputs."""
    from blip3o_jax.reference import pipeline

    model, params, ref = sides
    cfg = model.config
    ids, valid = prompts(cfg)
    keys = jax.random.split(jax.random.key(0), len(ids))

    @jax.jit
    def write(params, ids, valid):
        return decode.generate_tokens(
            model.qwen3,
            params["qwen3"],
            cfg.vocab,
            cfg.ta_tok.num_tokens,
            ids,
            valid,
            keys,
            0,
            jnp.float32(1),
            jnp.float32(0),
        )

    made = write(params, ids, valid)
    prompt, mask = torch.from_numpy(ids).long(), torch.from_numpy(valid)
    codes, states = pipeline.greedy_tokens(ref, prompt, mask)
    np.testing.assert_array_equal(made["tokens"], codes.numpy())
    close(made["hidden"], states)
    close(made["hidden"], pipeline.forward_states(ref, prompt, mask, codes))

    side, channels = cfg.sana.sample_size, cfg.sana.in_channels
    noise = (
        np.random.default_rng(2)
        .standard_normal((len(ids), side, side, channels))
        .astype(np.float32)
    )
    theirs = torch.from_numpy(noise).movedim(-1, 1)

    @jax.jit
    def render(params, hidden, noise):
        both = flow.alternating(jnp.zeros_like(hidden), hidden)
        condition = model.connector.apply({"params": params["diffusion_connector"]}, both)
        keys_values = model.sana.apply({"params": params["sana"]}, condition, method="keys_values")

        def velocity(x, t):
            return model.sana.apply({"params": params["sana"]}, x, t, keys_values, method="step")

        first = velocity(flow.alternating(noise, noise), jnp.full(2 * len(noise), 600.0))
        latents = generate.denoise(model, params, hidden, noise, STEPS, GUIDANCE, shift=1.0)
        return (
            condition,
            first,
            latents,
            model.dc_ae.apply({"params": params["dc_ae"]}, latents, method="decode_scaled"),
        )

    condition, first, latents, pixels = render(params, made["hidden"], noise)
    with torch.no_grad():
        given = ref.connector(torch.stack([torch.zeros_like(states), states], dim=1).flatten(0, 1))
        close(condition, given)
        t = torch.full((2 * len(ids),), 600.0)
        close(
            first,
            last(
                ref.sana(
                    theirs.repeat_interleave(2, dim=0),
                    encoder_hidden_states=given,
                    timestep=t,
                    return_dict=False,
                )[0]
            ),
        )
    expected = pipeline.denoise(ref, states, theirs, STEPS, GUIDANCE)
    close(latents, last(expected))
    close(jnp.clip(pixels / 2 + 0.5, 0, 1), last(pipeline.decode(ref, expected)))
    again = pipeline.denoise(ref, states, theirs, STEPS, GUIDANCE, connector_each_step=True)
    assert torch.allclose(again, expected, atol=1e-5)


@pytest.fixture(scope="module")
def training(sides):
    """One joint step on both sides with the same noise: (ours: loss, metrics, grads), (theirs: ce,
    flow), params, grads by torch name."""
    from blip3o_jax.reference.training import joint_loss

    model, params, ref = sides
    cfg, vocab, n = model.config, model.config.vocab, model.config.ta_tok.num_tokens
    joint = JointConfig(trainable_sana="all", condition_dropout=0.0)
    rng, length = np.random.default_rng(3), 12 + n + 3
    tokens = np.full((2, length), vocab.pad_token_id, np.int32)
    start = np.array([11, 7], np.int32)
    for row, at in zip(tokens, start, strict=True):
        row[:at] = rng.integers(10, 500, at)
        row[at] = vocab.scale_start_token_id
        row[at + 1 : at + 1 + n] = vocab.image_start_token_id
        row[at + 1 + n : at + 4 + n] = (vocab.image_end_tag_id, vocab.eos_token_id, 11)
    batch = {
        "images": rng.integers(0, 256, (2, cfg.image_size, cfg.image_size, 3), np.uint8),
        "tokens": tokens,
        "start": start,
    }
    key = jax.random.key(5)
    trained = {part: params[part] for part in ("qwen3", "diffusion_connector", "sana")}

    def loss(trained):
        return losses.joint_loss(model, joint, {**params, **trained}, batch, key)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)

    _, _, time_key, noise_key = jax.random.split(key, 4)
    side = cfg.sana.sample_size
    sigma = torch.from_numpy(np.array(flow.sample_timesteps(time_key, 2)[1]))
    noise = torch.from_numpy(
        np.array(jax.random.normal(noise_key, (2, side, side, cfg.sana.in_channels)))
    ).movedim(-1, 1)
    images = torch.from_numpy(batch["images"]).movedim(-1, 1).float() / 127.5 - 1
    view = torch.from_numpy(
        np.array(
            losses.tokenizer_view(losses.to_unit(batch["images"]), cfg.ta_tok.encoder.image_size)
        )
    )
    with torch.no_grad():
        codes = ref.ta_tok.encode(view.movedim(-1, 1))
        x0 = ref.vae.encode(images, return_dict=False)[0] * cfg.dc_ae.scaling_factor
    for module in (ref.ar, ref.connector, ref.sana):
        module.zero_grad()
    ce, mse = joint_loss(
        ref, torch.from_numpy(tokens).long(), torch.from_numpy(start), codes, x0, noise, sigma
    )
    (ce + mse).backward()
    theirs = {f"{name}": p.grad for name, p in ref.ar.named_parameters()}
    theirs |= {
        f"model.diffusion_connector.{name}": p.grad for name, p in ref.connector.named_parameters()
    }
    theirs |= {f"model.sana.{name}": p.grad for name, p in ref.sana.named_parameters()}
    return (value, metrics, grads), (ce, mse), trained, theirs


def rules_of(model):
    return [
        r
        for r in published_rules(model.config)
        if r.path.split("/")[0] in ("qwen3", "diffusion_connector", "sana")
    ]


def test_training_losses_and_gradients(sides, training):
    """Cross-entropy, velocity error, and the gradient of every parameter of the three trained
    parts."""
    (_, metrics, grads), (ce, mse), _, theirs = training
    np.testing.assert_allclose(metrics["ce"], ce.item(), rtol=TOLERANCE)
    np.testing.assert_allclose(metrics["flow"], mse.item(), rtol=TOLERANCE)
    ours = to_torch(rules_of(sides[0]), grads)
    assert set(ours) == set(theirs) - {"lm_head.weight"}
    for part in (
        "model.layers.",
        "model.diffusion_connector.",
        "model.sana.",
        "model.embed_tokens.",
        "model.norm.",
    ):
        names = [name for name in ours if name.startswith(part)]
        assert close_gradients(ours, theirs, names) > 0


def test_one_adamw_step(sides, training):
    """Clipping to norm 1 and AdamW from the same gradients."""
    (_, _, grads), _, trained, _ = training
    cfg = OptimizerConfig(
        learning_rate=1e-3, final_learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0, eps=1e-6
    )

    @jax.jit
    def step(trained, grads):
        moments = optimizer.moments(cfg, grads, optimizer.norm(grads), optimizer.init(trained))
        return optax.apply_updates(trained, optimizer.updates(cfg, 10, moments, trained))

    rules = rules_of(sides[0])
    trees = (step(trained, grads), trained, grads)
    ours, before, gradients = (to_torch(rules, tree) for tree in trees)
    parameters = {
        name: torch.nn.Parameter(torch.from_numpy(np.array(value)))
        for name, value in before.items()
    }
    for name, parameter in parameters.items():
        parameter.grad = torch.from_numpy(np.array(gradients[name]))
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    # As in HF's trainer, norms and biases are not decayed; SANA's tables are neither kernels nor
    # embeddings, and are not either.
    decays = {
        name: p.ndim > 1 and "scale_shift_table" not in name for name, p in parameters.items()
    }
    groups = [
        {"params": [p for n, p in parameters.items() if decays[n] is on], "weight_decay": 0.1 * on}
        for on in (True, False)
    ]
    torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-6).step()
    for name, parameter in parameters.items():
        moved = parameter.detach().numpy() - before[name]
        np.testing.assert_allclose(
            ours[name] - before[name], moved, atol=1e-6 + 1e-4 * np.abs(moved).max(), err_msg=name
        )
