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
    """Random inputs by name.

    prompt int32 [2,12] with valid bool (the second has padding on its left), states [1,n+1,D],
    noise [2,Y,X,C], images and view [1,H,W,3] at the sizes of autoencoder and tokenizer.
    """
    rng, vocab = np.random.default_rng(seed), cfg.vocab
    words = min(vocab.pad_token_id, vocab.image_start_tag_id)
    ids = rng.integers(0, words, (2, PROMPT)).astype(np.int32)
    ids[:, -2:] = vocab.image_start_tag_id, vocab.scale_start_token_id
    valid = np.ones(ids.shape, bool)
    valid[1, :3], ids[1, :3] = False, vocab.pad_token_id

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    side, size, view = cfg.sana.sample_size, cfg.image_size, cfg.ta_tok.encoder.image_size
    return {
        "prompt": ids,
        "valid": valid,
        "states": normal(1, cfg.num_condition_tokens, cfg.qwen3.hidden_size),
        "noise": normal(2, side, side, cfg.sana.in_channels),
        "images": np.clip(0.5 * normal(1, size, size, 3), -1, 1),
        "view": np.clip(0.5 * normal(1, view, view, 3), -1, 1),
    }


def run_stages(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The results of a checkpoint's model in float32."""
    config = checkpoint.config
    return stage_outputs(Blip3o(config), checkpoint.load(), stage_inputs(config))


def stage_outputs(model: Blip3o, params, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each stage's result by name.

    The hidden states and logits of a prompt, the condition, a velocity, latents, a picture, codes;
    then greedy `tokens` [2,n] and the `pixels` [2,H,W,3] that follow from them with the given
    noise.
    """
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

    def text_to_image(params, prompt, valid, noise):
        keys, one = jax.random.split(jax.random.key(0), len(prompt)), jnp.float32(1)
        n = cfg.ta_tok.num_tokens
        decoded = decode.generate_tokens(
            model.qwen3, params["qwen3"], vocab, n, prompt, valid, keys, 0, one, jnp.float32(0)
        )
        latents = generate.denoise(
            model, params, decoded["hidden"], noise, NUM_STEPS, GUIDANCE, 1.0
        )
        return decoded["tokens"], to_zero_one(vae(params, latents, "decode_scaled"))

    def run(stage, *inputs):
        return jit(stage)(params, *inputs)

    # One program a stage, each with inputs of its own.
    noise, outputs = inputs["noise"][:1], {}
    outputs["hidden"], outputs["logits"] = run(transformer, prompt[:1])
    outputs["condition"] = run(connect, inputs["states"])
    outputs["velocity"] = run(sana, noise, np.full(1, TIMESTEP, np.float32), outputs["condition"])
    outputs["latents"] = run(functools.partial(vae, method="encode_scaled"), inputs["images"])
    outputs["picture"] = run(functools.partial(vae, method="decode_scaled"), noise)
    outputs["codes"] = run(codes, inputs["view"])
    outputs["tokens"], outputs["pixels"] = run(text_to_image, prompt, valid, inputs["noise"])
    return {name: np.asarray(value) for name, value in outputs.items()}
