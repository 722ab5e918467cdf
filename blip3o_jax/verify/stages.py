"""What each stage of a model gives for fixed inputs, so that two copies of a model can be compared
stage by stage.

Inputs do not come from the stage before, so that a difference shows where it arises; only `tokens`
and `pixels` go the whole way.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.checkpoints import Checkpoint
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.pixels import to_zero_one
from blip3o_jax.sample import decode, generate

NUM_STEPS, GUIDANCE, TIMESTEP, PROMPT = 5, 2.0, 600.0, 12


def stage_inputs(cfg: Blip3oConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """prompt int32 [2,12] with valid bool (the second has padding on its left), states [1,n+1,D],
    noise [2,Y,X,C], images [1,H,W,3]."""
    rng, vocab, side = np.random.default_rng(seed), cfg.vocab, cfg.sana.sample_size
    ids = rng.integers(0, min(vocab.pad_token_id, vocab.image_start_tag_id), (2, PROMPT)).astype(
        np.int32
    )
    ids[:, -2:] = vocab.image_start_tag_id, vocab.scale_start_token_id
    valid = np.ones(ids.shape, bool)
    valid[1, :3], ids[1, :3] = False, vocab.pad_token_id

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    states = normal(1, cfg.num_condition_tokens, cfg.qwen3.hidden_size)
    noise = normal(2, side, side, cfg.sana.in_channels)
    images = np.clip(0.5 * normal(1, cfg.image_size, cfg.image_size, 3), -1, 1)
    view = np.clip(
        0.5 * normal(1, cfg.ta_tok.encoder.image_size, cfg.ta_tok.encoder.image_size, 3), -1, 1
    )
    return {
        "prompt": ids,
        "valid": valid,
        "states": states,
        "noise": noise,
        "images": images,
        "view": view,
    }


def run_stages(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The results of a checkpoint's model in float32."""
    config = checkpoint.config
    return stage_outputs(Blip3o(config), checkpoint.load(), stage_inputs(config))


def stage_outputs(model: Blip3o, params, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each stage's result by name: the hidden states and logits of a prompt, the condition, a
    velocity, latents, a picture, codes; then greedy `tokens` [2,n] and the `pixels` [2,H,W,3] that
    follow from them with the given noise."""
    cfg, vocab = model.config, model.config.vocab
    prompt, valid = inputs["prompt"], inputs["valid"]

    def sana(params, x, t, condition):
        return model.sana.apply({"params": params["sana"]}, x, t, condition)

    def connect(params, states):
        return model.connector.apply({"params": params["diffusion_connector"]}, states)

    def vae(params, x, method):
        return model.dc_ae.apply({"params": params["dc_ae"]}, x, method=method)

    def transformer(params, prompt):
        hidden, _ = model.qwen3.apply(
            {"params": params["qwen3"]},
            prompt,
            jnp.arange(prompt.shape[1])[None],
            jnp.ones_like(prompt, bool),
        )
        return hidden, model.qwen3.apply({"params": params["qwen3"]}, hidden, method="logits")

    def codes(params, x):
        return model.ta_tok.apply({"params": params["ta_tok"]}, x, method="encode")

    def whole(params, prompt, valid, noise):
        keys, one = jax.random.split(jax.random.key(0), len(prompt)), jnp.float32(1)
        n = cfg.ta_tok.num_tokens
        made = decode.generate_tokens(
            model.qwen3, params["qwen3"], vocab, n, prompt, valid, keys, 0, one, jnp.float32(0)
        )
        latents = generate.denoise(model, params, made["hidden"], noise, NUM_STEPS, GUIDANCE, 1.0)
        return made["tokens"], to_zero_one(vae(params, latents, "decode_scaled"))

    def run(stage, *inputs):
        return jit(stage)(params, *inputs)

    noise, found = inputs["noise"][:1], {}
    found["hidden"], found["logits"] = run(transformer, prompt[:1])
    found["condition"] = run(connect, inputs["states"])
    found["velocity"] = run(sana, noise, np.full(1, TIMESTEP, np.float32), found["condition"])
    found["latents"] = run(functools.partial(vae, method="encode_scaled"), inputs["images"])
    found["picture"] = run(functools.partial(vae, method="decode_scaled"), noise)
    found["codes"] = run(codes, inputs["view"])
    found["tokens"], found["pixels"] = run(whole, prompt, valid, inputs["noise"])
    return {name: np.asarray(value) for name, value in found.items()}
