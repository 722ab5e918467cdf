"""The stages that `blip3o-jax bench` measures: their inputs, our side of them, and what each must
at least compute and read."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import flops
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import BATCH
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.sample import decode, flow, generate
from blip3o_jax.train import losses, steps
from blip3o_jax.train.config import JointConfig, OptimizerConfig, TrainConfig

GUIDANCE, LEARNING_RATE, WEIGHT_DECAY = 2.0, 1e-5, 0.1


@dataclass(frozen=True)
class Workload:
    """Inputs of all stages for one batch, numpy.

    Prompts are of every length up to the longest, padded on the left.
    """

    config: Blip3oConfig
    batch_size: int
    num_inference_steps: int
    prompt: np.ndarray  # int32 [B,P], ends in <S0>
    valid: np.ndarray  # bool [B,P]
    states: np.ndarray  # f32 [B,n+1,D]
    noise: np.ndarray  # f32 [B,Y,X,C]
    images: np.ndarray  # uint8 [B,H,W,3]
    tokens: np.ndarray  # int32 [B,T], training rows with the codes open
    start: np.ndarray  # int32 [B]
    sigma: np.ndarray  # f32 [B], of the first training step
    training_noise: np.ndarray  # f32 [B,Y,X,C], of the first training step


def make(cfg: Blip3oConfig, batch_size: int, num_inference_steps: int, seed: int = 0) -> Workload:
    """Random inputs of a fixed seed."""
    rng, vocab, n = np.random.default_rng(seed), cfg.vocab, cfg.ta_tok.num_tokens
    longest, side = cfg.max_prompt_tokens, cfg.sana.sample_size
    lengths = np.linspace(longest / 2, longest, batch_size).astype(np.int32)
    ids = rng.integers(
        10, min(vocab.pad_token_id, vocab.image_start_tag_id), (batch_size, longest)
    ).astype(np.int32)
    ids[:, -2:] = vocab.image_start_tag_id, vocab.scale_start_token_id
    valid = np.arange(longest) >= longest - lengths[:, None]
    tokens = np.full((batch_size, longest + n + 2), vocab.pad_token_id, np.int32)
    for row, prompt, length in zip(tokens, ids, lengths, strict=True):
        row[:length] = prompt[longest - length :]
        row[length : length + n] = vocab.image_start_token_id
        row[length + n : length + n + 2] = vocab.image_end_tag_id, vocab.eos_token_id

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    # The first step's noise and levels, as losses.joint_loss draws them from the run's seed.
    _, _, time_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 4)
    latents = (batch_size, side, side, cfg.sana.in_channels)
    return Workload(
        cfg,
        batch_size,
        num_inference_steps,
        prompt=np.where(valid, ids, vocab.pad_token_id),
        valid=valid,
        states=normal(batch_size, n + 1, cfg.qwen3.hidden_size),
        noise=normal(*latents),
        images=rng.integers(0, 256, (batch_size, cfg.image_size, cfg.image_size, 3), np.uint8),
        tokens=tokens,
        start=lengths - 1,
        sigma=np.asarray(flow.sample_timesteps(time_key, batch_size)[1]),
        training_noise=np.asarray(jax.random.normal(noise_key, latents)),
    )


def train_config() -> TrainConfig:
    """All of the diffusion part is trained, as for the embedded model; no condition is dropped, so
    that both sides see the same."""
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, final_learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    joint = JointConfig(trainable_sana="all", condition_dropout=0.0)
    return TrainConfig(stage="joint", joint=joint, optimizer=optimizer)


def ours(work: Workload, params, mesh) -> dict[str, Callable[[], dict]]:
    """Each stage as a function that gives its results as numpy arrays when they are there; params
    lie on the mesh, the batch is cut by it.

    Tokens are greedy, so that both sides write the same. A training step goes on from the one
    before it; its first call gives the losses of the given weights.
    """
    model, cfg, place = Blip3o(work.config), work.config, jax.NamedSharding(mesh, BATCH)
    n, steps_ = cfg.ta_tok.num_tokens, work.num_inference_steps

    # The three programs of `generate`, and what runs each on given arrays.
    def write(params, prompt, valid):
        keys = jax.random.split(jax.random.key(0), len(prompt))
        one, greedy = jnp.float32(1), jnp.float32(0)
        return decode.generate_tokens(
            model.qwen3, params["qwen3"], cfg.vocab, n, prompt, valid, keys, 1, one, greedy
        )

    def denoise(params, states, noise):
        return generate.denoise(model, params, states, noise, steps_, GUIDANCE, 1.0)

    def pixels(params, latents):
        return generate.pixels(model, params, latents)

    def compiled(function):
        return jit(function, cfg, out_shardings=place)

    def stage(function, **inputs):
        arrays = jax.device_put(inputs, place)

        def run():
            with jax.set_mesh(mesh):
                return jax.device_get(function(params, **arrays))

        return run

    # From here on each program is compiled once, for all stages that need it.
    written, denoised, decoded = compiled(write), compiled(denoise), compiled(pixels)

    def whole(params, prompt, valid, noise):
        made = written(params, prompt, valid)
        return {
            "tokens": made["tokens"],
            "pixels": decoded(params, denoised(params, made["hidden"], noise)),
        }

    return {
        "decode": stage(written, prompt=work.prompt, valid=work.valid),
        "denoise": stage(
            lambda *a, **k: {"latents": denoised(*a, **k)}, states=work.states, noise=work.noise
        ),
        "autoencoder": stage(lambda *a, **k: {"pixels": decoded(*a, **k)}, latents=work.noise),
        "text_to_image": stage(whole, prompt=work.prompt, valid=work.valid, noise=work.noise),
        "train_step": _training(model, params, work, mesh, cached=False),
        "cached_train_step": _training(model, params, work, mesh, cached=True),
    }


def _training(model: Blip3o, params, work: Workload, mesh, cached: bool) -> Callable[[], dict]:
    """`cached`: codes and latents come with the batch, as `blip3o-jax data cache` makes them, and
    no image is encoded."""
    cfg, batch = train_config(), {"images": work.images, "tokens": work.tokens, "start": work.start}
    kept: dict = {}

    def begin():
        """Here, so that the state takes memory only when this stage is measured."""
        # A copy, since the step donates its state.
        state, kept["frozen"] = steps.init_state(cfg, params)
        placed = shardings(state, mesh)
        kept["state"] = jax.tree.map(lambda x, s: jax.device_put(jnp.copy(x), s), state, placed)
        kept["step"] = steps.compile_step(model, cfg, placed)
        if cached:
            # What `data cache` would have made of the images.
            images = batch.pop("images")
            batch["codes"] = jit(functools.partial(losses.encode_codes, model))(
                params, {"images": images}
            )
            batch["latents"] = jit(functools.partial(losses.encode_latents, model))(params, images)
        kept["batch"] = jax.device_put(batch, jax.NamedSharding(mesh, BATCH))

    def run():
        with jax.set_mesh(mesh):
            if not kept:
                begin()
            kept["state"], metrics = kept["step"](kept["state"], kept["frozen"], kept["batch"])
            jax.block_until_ready(kept["state"])
        return {name: np.asarray(metrics[name]) for name in ("ce", "flow")}

    return run


def amount(work: Workload, stage: str) -> tuple[float, str]:
    """(work done by one call, its unit): what a rate counts. Seconds have no amount."""
    return {
        "decode": (work.batch_size * work.config.ta_tok.num_tokens, "tokens/s"),
        "denoise": (work.num_inference_steps, "steps/s"),
        "autoencoder": (work.batch_size, "images/s"),
    }.get(stage, (0, "s"))


@dataclass(frozen=True)
class Phase:
    """`passes` times `flops`, each over `bytes` of weights and caches that are read (and, in
    training, written)."""

    passes: int
    flops: float
    bytes: float


def phases(work: Workload, stage: str, sizes: dict[str, int]) -> list[Phase]:
    """What a stage must at least do, in f32.

    `sizes` are parameters by name, see `parameter_counts`. Activations are not counted.
    """
    cfg, batch, steps_ = work.config, work.batch_size, work.num_inference_steps
    n, prompt = cfg.ta_tok.num_tokens, work.prompt.shape[1]
    if stage == "text_to_image":
        return [
            phase
            for part in ("decode", "denoise", "autoencoder")
            for phase in phases(work, part, sizes)
        ]
    if stage == "decode":
        context = prompt + (n + 1) / 2
        token = flops.qwen3(cfg.qwen3, batch, context, cfg.vocab.num_image_tokens)
        cache = (
            2
            * batch
            * context
            * cfg.qwen3.num_hidden_layers
            * cfg.qwen3.num_key_value_heads
            * cfg.qwen3.head_dim
        )
        logits = cfg.vocab.num_image_tokens * cfg.qwen3.hidden_size
        prefill = Phase(
            1, flops.qwen3(cfg.qwen3, batch * prompt, (prompt + 1) / 2), 4 * sizes["layers"]
        )
        return [prefill, Phase(n, token, 4 * (sizes["layers"] + logits + cache))]
    if stage == "denoise":
        once, step = flops.denoise(cfg, batch)
        return [Phase(1, once, 0), Phase(steps_, step, 4 * sizes["sana"])]
    if stage == "autoencoder":
        return [
            Phase(
                1, flops.dc_ae_decode(cfg.dc_ae, batch, cfg.sana.sample_size), 4 * sizes["decoder"]
            )
        ]
    trained, frozen = (
        sizes["qwen3"] + sizes["sana"] + sizes["diffusion_connector"],
        sizes["ta_tok_encoder"] + sizes["encoder"],
    )
    arithmetic = flops.joint_step(cfg, batch, work.tokens.shape[1])
    if stage == "cached_train_step":
        arithmetic -= flops.ta_tok_encode(cfg.ta_tok, batch) + flops.dc_ae_encode(
            cfg.dc_ae, batch, cfg.sana.sample_size
        )
        frozen = 0
    # Weights are read forwards and backwards; gradients are written; AdamW reads four numbers a
    # parameter and writes three.
    return [Phase(1, arithmetic, 4 * (10 * trained + frozen))]


def parameter_counts(params) -> dict[str, int]:
    """By part, and of those pieces that a stage uses alone."""
    pieces = {
        **params,
        "layers": params["qwen3"]["layers"],
        "encoder": params["dc_ae"]["encoder"],
        "decoder": params["dc_ae"]["decoder"],
        "ta_tok_encoder": {
            "encoder": params["ta_tok"]["encoder"],
            "bottleneck": params["ta_tok"]["bottleneck"],
        },
    }
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in pieces.items()}
