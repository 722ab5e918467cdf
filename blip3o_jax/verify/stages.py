"""What each stage of a model gives for fixed inputs, so that two copies can be compared stage by
stage. Inputs do not come from the stage before, so that a difference shows where it arises; only
`tokens` and `pixels` go the whole way."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, default_matmul_precision, tree

from blip3o_jax.checkpoints import Checkpoint
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.sample import condition, generate

NUM_STEPS, GUIDANCE, TIMESTEP, PROMPT = 5, 2.0, 600.0, 12
NUM_SOURCES = 2  # at most


def edit_guidance(cfg: Blip3oConfig) -> tuple[float, float]:
    """The scales of the text and of the source image, which are one for a model of few steps."""
    return (GUIDANCE, GUIDANCE) if cfg.sana.few_steps else (GUIDANCE, 1.5)


def stage_inputs(cfg: Blip3oConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs by name.

    prompt int32 [2,12] with valid bool (the second has padding on its left), states [1,n+1,D],
    noise [2,Y,X,C], images and view [1,H,W,3] at the sizes of autoencoder and tokenizer. Of a model
    that edits also edit_prompt int32 [1,T], in which N source images have open places, their codes
    (or features) source_ids [1,N*n] (f32 [1,N*n,D]) and source_latents [1,N,Y,X,C].
    """
    rng, vocab = np.random.default_rng(seed), cfg.vocab
    words = min(vocab.pad_token_id, vocab.image_start_tag_id)
    ids = rng.integers(0, words, (2, PROMPT)).astype(np.int32)
    ids[:, -2:] = vocab.image_start_tag_id, vocab.scale_start_token_id
    valid = np.ones(ids.shape, bool)
    valid[1, :3], ids[1, :3] = False, vocab.pad_token_id

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    # Pictures within the range that the networks know.
    side, size, view = cfg.sana.sample_size, cfg.image_size, cfg.ta_tok.encoder.image_size
    inputs = {
        "prompt": ids,
        "valid": valid,
        "states": normal(1, cfg.num_condition_tokens, cfg.qwen3.hidden_size),
        "noise": normal(2, side, side, cfg.dc_ae.latent_channels),
        "images": np.clip(0.5 * normal(1, size, size, 3), -1, 1),
        "view": np.clip(0.5 * normal(1, view, view, 3), -1, 1),
    }
    if not cfg.max_sources:
        return inputs
    # The sources of an edit, with their places within its prompt.
    count = min(cfg.max_sources, NUM_SOURCES)
    places = count * cfg.ta_tok.num_tokens
    codes = rng.integers(0, cfg.ta_tok.codebook_size, (1, places)).astype(np.int32)
    features = normal(1, places, cfg.ta_tok.encoder.hidden_size)
    return inputs | {
        "edit_prompt": np.insert(ids[:1], [PROMPT // 2] * places, vocab.image_start_token_id, 1),
        "source_ids": features if cfg.use_tar_siglip_features else codes,
        "source_latents": normal(1, count, side, side, cfg.dc_ae.latent_channels),
    }


def run_stages(checkpoint: Checkpoint, rounded: str = "float32") -> dict[str, np.ndarray]:
    """The results of a checkpoint's model in float32, its weights rounded to a dtype first."""
    config = checkpoint.config
    params = checkpoint.load()
    if rounded != "float32":
        dtype = jnp.dtype(rounded)
        params = tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
    with default_matmul_precision("highest"):  # GPUs and TPUs round the factors of products
        return stage_outputs(Blip3o(config), params, stage_inputs(config))


def _read(
    model: Blip3o, params: Params, prompt: Array, source_ids: Array | None = None
) -> tuple[Array, Array]:
    """Hidden states and logits of token ids [B,T], all of them valid, with the source images of an
    edit in their places."""
    positions, valid = jnp.arange(prompt.shape[1])[None], jnp.ones_like(prompt, bool)
    given = None
    if source_ids is not None:
        start = jnp.full(len(prompt), prompt.shape[1] - 1)
        prompt, given = generate.write_sources(model, params, prompt, start, source_ids)
    hidden, _ = model.apply(params, "qwen3", prompt, positions, valid, given=given)
    return hidden, model.apply(params, "qwen3", hidden, method="logits")


def _text_to_image(
    model: Blip3o, params: Params, prompt: Array, valid: Array, noise: Array
) -> tuple[Array, Array]:
    """Greedy tokens, and the pixels that follow from them with the given noise."""
    keys = jnp.zeros((len(prompt), 3), jnp.uint32)
    greedy = {"top_k": 0, "top_p": jnp.float32(1), "temperature": jnp.float32(0)}
    written = generate.write_tokens(model, params, prompt, valid, keys, **greedy)
    steps = (NUM_STEPS, GUIDANCE, 1.0)
    latents = generate.denoise(model, params, written["hidden"], noise, *steps)
    return written["tokens"], generate.pixels(model, params, latents)


def stage_outputs(
    model: Blip3o, params: Params, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Each stage's result by name: the hidden states and logits of a prompt, the condition, a
    velocity, latents, a picture, codes; then greedy `tokens` [2,n] and the `pixels` [2,H,W,3] that
    follow from them with the given noise. Of a model that edits also `edit_outputs`."""

    def run(stage: Callable, *inputs: Any) -> Any:
        return jit(functools.partial(stage, model))(params, *inputs)

    def part(name: str, method: str, x: Array) -> Array:
        return jit(lambda params, x: model.apply(params, name, x, method=method))(params, x)

    # One program a stage, each with inputs of its own.
    prompt, noise, time = inputs["prompt"], inputs["noise"][:1], np.full(1, TIMESTEP, np.float32)
    outputs = {}
    outputs["hidden"], outputs["logits"] = run(_read, prompt[:1])
    given = run(condition.build, inputs["states"])
    outputs["condition"] = given.tokens
    outputs["velocity"] = run(condition.velocity, noise, time, given)
    outputs["latents"] = part("dc_ae", "encode_scaled", inputs["images"])
    outputs["picture"] = part("dc_ae", "decode_scaled", noise)
    outputs["codes"] = part("ta_tok", "encode", inputs["view"])
    whole = run(_text_to_image, prompt, inputs["valid"], inputs["noise"])
    outputs["tokens"], outputs["pixels"] = whole
    if model.config.max_sources:
        outputs |= edit_outputs(model, params, inputs)
    return {name: np.asarray(value) for name, value in outputs.items()}


def edit_outputs(
    model: Blip3o, params: Params, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The stages that source images reach: the hidden states of an edit's prompt, the condition, a
    velocity, latents by guidance; and the features that some models read."""
    # The prompt, with the codes or features of its sources.
    ids, outputs = inputs["source_ids"], {}
    read = jit(functools.partial(_read, model))
    outputs["edit_hidden"] = read(params, inputs["edit_prompt"], ids)[0]
    if model.config.use_tar_siglip_features:
        features = jit(lambda params, x: model.apply(params, "ta_tok", x, method="pooled"))
        outputs["features"] = features(params, inputs["view"])

    # The diffusion part, with their latents.
    @jit
    def run(params: Params, states: Array, latents: Array, noise: Array, time: Array):
        sources = condition.Sources(latents, jnp.ones(latents.shape[:2], bool))
        given = condition.build(model, params, states, sources)
        velocity = condition.velocity(model, params, noise, time, given)
        guidance = condition.guidance(*edit_guidance(model.config))
        how = NUM_STEPS, guidance, 1.0, sources
        return given.tokens, velocity, generate.denoise(model, params, states, noise, *how)

    noise, time = inputs["noise"][:1], np.full(1, TIMESTEP, np.float32)
    results = run(params, inputs["states"], inputs["source_latents"], noise, time)
    names = ("edit_condition", "edit_velocity", "edit_guided")
    return outputs | dict(zip(names, results, strict=True))
