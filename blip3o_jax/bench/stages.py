"""The stages of `blip3o-jax bench`: inputs, our side, and what each must compute and read."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import flops
from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import BATCH
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.sample import condition, decode, flow, generate, programs
from blip3o_jax.sample.settings import Settings
from blip3o_jax.train import losses, steps
from blip3o_jax.train.config import JointConfig, OptimizerConfig, TrainConfig

GUIDANCE, LEARNING_RATE, WEIGHT_DECAY = 2.0, 1e-5, 0.1
GUIDED_STEPS = Settings().num_inference_steps  # that few steps are measured against
# What a checkpoint of few steps does besides, each with the stage of guided steps that it is.
FEW_STEPS = {"few_steps_denoise": "denoise", "few_steps_text_to_image": "text_to_image"}


@dataclass(frozen=True)
class Workload:
    """Inputs of all stages for one batch; prompts of many lengths are padded on the left."""

    config: Blip3oConfig  # as published: guided steps, two forwards each
    few_steps: int  # of the checkpoint, 0 if it has none
    batch_size: int
    num_inference_steps: int
    prompt: np.ndarray  # int32 [B,P], ends in <S0>
    valid: np.ndarray  # bool [B,P]
    edit_prompt: np.ndarray  # int32 [B,n+P], the same with the tokens of a source open
    states: np.ndarray  # f32 [B,n+1,D]
    noise: np.ndarray  # f32 [B,Y,X,C]
    images: np.ndarray  # uint8 [B,H,W,3]
    tokens: np.ndarray  # int32 [B,T], training rows with the codes open
    start: np.ndarray  # int32 [B]
    sigma: np.ndarray  # f32 [B], of the first training step
    training_noise: np.ndarray  # f32 [B,Y,X,C], of the first training step


def make(cfg: Blip3oConfig, batch_size: int, num_inference_steps: int, seed: int = 0) -> Workload:
    """Random inputs of a fixed seed, for a checkpoint with this config."""
    rng, vocab, n = np.random.default_rng(seed), cfg.vocab, cfg.ta_tok.num_tokens
    longest, side = cfg.max_prompt_tokens, cfg.sana.sample_size
    lengths = np.linspace(longest / 2, longest, batch_size).astype(np.int32)
    words = min(vocab.pad_token_id, vocab.image_start_tag_id)
    ids = rng.integers(10, words, (batch_size, longest)).astype(np.int32)
    ids[:, -2:] = vocab.image_start_tag_id, vocab.scale_start_token_id
    valid = np.arange(longest) >= longest - lengths[:, None]
    # The same prompts as training rows, padded on the right.
    tokens = np.full((batch_size, longest + n + 2), vocab.pad_token_id, np.int32)
    for row, prompt, length in zip(tokens, ids, lengths, strict=True):
        row[:length] = prompt[longest - length :]
        row[length : length + n] = vocab.image_start_token_id
        row[length + n : length + n + 2] = vocab.image_end_tag_id, vocab.eos_token_id
    # The same prompts with a source image before their first word.
    edit_ids = np.full((batch_size, n + longest), vocab.pad_token_id, np.int32)
    for row, prompt, length in zip(edit_ids, ids, lengths, strict=True):
        row[longest - length :][:n] = vocab.image_start_token_id
        row[-length:] = prompt[-length:]
    # The first step's noise and levels, as losses.joint_loss draws them from the run's seed.
    _, _, time_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 4)
    latents = (batch_size, side, side, cfg.dc_ae.latent_channels)
    pixels = (batch_size, cfg.image_size, cfg.image_size, 3)
    return Workload(
        replace(cfg, sana={"few_steps": 0}),
        cfg.sana.few_steps,
        batch_size,
        num_inference_steps,
        prompt=np.where(valid, ids, vocab.pad_token_id),
        valid=valid,
        edit_prompt=edit_ids,
        states=rng.standard_normal((batch_size, n + 1, cfg.qwen3.hidden_size), np.float32),
        noise=rng.standard_normal(latents, np.float32),
        images=rng.integers(0, 256, pixels, np.uint8),
        tokens=tokens,
        start=lengths - 1,
        sigma=np.asarray(flow.sample_timesteps(time_key, batch_size)[1]),
        training_noise=np.asarray(jax.random.normal(noise_key, latents)),
    )


def without_spans(sana: dict) -> dict:
    """SANA's parameters as the published one has them, which takes no spans."""
    return {name: value for name, value in sana.items() if name != "span_embed"}


def train_config() -> TrainConfig:
    """All of the diffusion part is trained; no condition is dropped, so that both sides see one."""
    optimizer = OptimizerConfig(LEARNING_RATE, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    joint = JointConfig(trainable_sana="all", condition_dropout=0.0)
    return TrainConfig(stage="joint", joint=joint, optimizer=optimizer)


def ours(work: Workload, params, mesh) -> dict[str, dict[str, Callable[[], dict]]]:
    """{"ours" | "guided": {stage: function that gives its results as numpy arrays when they are
    there}}; params lie on the mesh, the batch is cut by it. The guided side are the stages of few
    steps in guided ones, where the checkpoint has few.

    Tokens are greedy, so that both sides write the same. A training step goes on from the one
    before it; its first call gives the losses of the given weights.
    """
    model, cfg, place = Blip3o(work.config), work.config, jax.NamedSharding(mesh, BATCH)
    n, spans = cfg.ta_tok.num_tokens, params
    params = {**spans, "sana": without_spans(spans["sana"])}
    # The three programs of `generate`, compiled once for all stages that need them.
    compiled = functools.partial(jit, generates=cfg, out_shardings=place)

    @functools.partial(compiled, writes_tokens=True)
    def write(params, prompt, valid):
        keys = jax.random.split(jax.random.key(0), len(prompt))
        one, greedy = jnp.float32(1), jnp.float32(0)
        return decode.generate_tokens(
            model.qwen3, params["qwen3"], cfg.vocab, n, prompt, valid, keys, 1, one, greedy
        )

    def denoiser(model, num_steps):
        def denoise(params, states, noise):
            return generate.denoise(model, params, states, noise, num_steps, GUIDANCE, 1.0)

        return compiled(denoise)

    @compiled
    def pixels(params, latents):
        return generate.pixels(model, params, latents)

    def whole(denoise, name, params, prompt, valid, noise):
        written = write(params, prompt, valid)
        images = pixels(params, denoise(params, written["hidden"], noise))
        return {"tokens": written["tokens"], "rounds": written["rounds"], name: images}

    # An edit as `blip3o-jax edit` makes it: the pipeline's own programs.
    run_edit, guidance = programs.programs(model, place), condition.guidance(GUIDANCE, 1.0)
    settings = {"top_k": 1, "top_p": 1.0, "temperature": 0.0, "shift": 1.0}
    settings |= {"num_inference_steps": work.num_inference_steps, "guidance_scale": guidance}

    def edit(params, prompt, images, exists, keys):
        valid = prompt != cfg.vocab.pad_token_id
        edited = programs.edit(run_edit, params, prompt, valid, keys, images, exists, **settings)
        return {name: edited[name] for name in ("tokens", "rounds", "images")}

    # What runs a program on given arrays; `name` is that of a result which is one array.
    def stage(function, name="", weights=params, **inputs):
        arrays = jax.device_put(inputs, place)

        def run():
            with jax.set_mesh(mesh):
                result = function(weights, **arrays)
                return jax.device_get({name: result} if name else result)

        return run

    prompts = {"prompt": work.prompt, "valid": work.valid}
    given, drawn = {"states": work.states, "noise": work.noise}, prompts | {"noise": work.noise}
    sources = {"images": work.images[:, None], "exists": np.ones((work.batch_size, 1), bool)}
    sources["keys"] = np.array([generate.sample_key(0, "", i) for i in range(work.batch_size)])
    denoise = denoiser(model, work.num_inference_steps)
    sides = {
        "ours": {
            "decode": stage(write, **prompts),
            "denoise": stage(denoise, "latents", **given),
            "autoencoder": stage(pixels, "pixels", latents=work.noise),
            "text_to_image": stage(functools.partial(whole, denoise, "pixels"), **drawn),
            "edit": stage(edit, prompt=work.edit_prompt, **sources),
            "train_step": _training(model, params, work, mesh, cached=False),
            "cached_train_step": _training(model, params, work, mesh, cached=True),
        }
    }
    if not work.few_steps:
        return sides
    # Both ways of a checkpoint of few steps. Latents and pixels of different ways have names of
    # their own, since nobody should compare them.
    few = Blip3o(replace(cfg, sana={"few_steps": work.few_steps}))
    ways = {
        "ours": (denoiser(few, work.few_steps), spans, "few_steps_"),
        "guided": (denoiser(model, GUIDED_STEPS), params, ""),
    }
    for side, (way, weights, prefix) in ways.items():
        image = functools.partial(whole, way, prefix + "pixels")
        sides[side] = sides.get(side, {}) | {
            "few_steps_denoise": stage(way, prefix + "latents", weights, **given),
            "few_steps_text_to_image": stage(image, "", weights, **drawn),
        }
    return sides


def _training(model: Blip3o, params, work: Workload, mesh, cached: bool) -> Callable[[], dict]:
    """A function that makes a step; `cached`: codes and latents come with the batch."""
    cfg, batch = train_config(), {"images": work.images, "tokens": work.tokens, "start": work.start}
    training: dict = {}

    # Begun when it is first measured, so that the state takes no memory before.
    def begin():
        state, frozen = steps.init_state(cfg, params)
        placed = shardings(state, mesh)
        training["step"] = steps.compile_step(model, cfg, placed)
        # A copy, since the step donates its state.
        training["state"] = jax.tree.map(lambda x, s: jax.device_put(jnp.copy(x), s), state, placed)
        if cached:
            # What `data cache` would have made of the images.
            images = batch.pop("images")
            codes = jit(functools.partial(losses.encode_codes, model))
            batch["codes"] = codes(params, {"images": images})
            batch["latents"] = jit(functools.partial(generate.encode_latents, model))(
                params, images
            )
        training["inputs"] = frozen, jax.device_put(batch, jax.NamedSharding(mesh, BATCH))

    def run():
        with jax.set_mesh(mesh):
            if not training:
                begin()
            state, metrics = training["step"](training["state"], *training["inputs"])
            training["state"] = jax.block_until_ready(state)
        return {name: np.asarray(metrics[name]) for name in ("ce", "flow")}

    return run


def steps_of_sides(work: Workload, stage: str, sides: Iterable[str]) -> dict[str, str]:
    """How each side samples, where they differ in it, or begins."""
    if stage == "first_picture":
        return {"ours": "compiled before", "cold": "nothing compiled"}
    if stage not in FEW_STEPS:
        return {}
    guided = dict.fromkeys(sides, f"{GUIDED_STEPS} guided steps")
    return guided | {"ours": f"{work.few_steps} steps"}


def amount(work: Workload, stage: str) -> tuple[float, str]:
    """(work done by one call, its unit): what a rate counts. Seconds have no amount."""
    return {
        "decode": (work.batch_size * work.config.ta_tok.num_tokens, "tokens/s"),
        "denoise": (work.num_inference_steps, "steps/s"),
        "autoencoder": (work.batch_size, "images/s"),
    }.get(stage, (0, "s"))


@dataclass(frozen=True)
class Phase:
    """`passes` times `flops`, each over `bytes` that are read (and, in training, written)."""

    passes: float
    flops: float
    bytes: float


def phases(
    work: Workload, stage: str, sizes: dict[str, int], rounds: float | None = None
) -> list[Phase]:
    """What a stage must at least do, in f32.

    `sizes` are parameters by name, see `parameter_counts`; `rounds` is how often decoding reads the
    weights, by default once a token. Activations are not counted.
    """
    cfg, batch, qwen3 = work.config, work.batch_size, work.config.qwen3
    n, prompt = cfg.ta_tok.num_tokens, work.prompt.shape[1]
    if stage == "first_picture":  # most of it is no arithmetic
        return []
    if stage in FEW_STEPS:
        few = replace(cfg, sana={"few_steps": work.few_steps})
        work = dataclasses.replace(work, config=few, num_inference_steps=work.few_steps)
        sizes = sizes | {"sana": sizes["sana"] + sizes["span_embed"]}
        return phases(work, FEW_STEPS[stage], sizes, rounds)
    if stage == "text_to_image":
        parts = ("decode", "denoise", "autoencoder")
        return [phase for part in parts for phase in phases(work, part, sizes, rounds)]
    if stage == "edit":
        encoders = flops.image_encoders(cfg, batch)
        read = 4 * (sizes["ta_tok_encoder"] + sizes["encoder"])
        work = dataclasses.replace(work, prompt=work.edit_prompt)
        return [Phase(1, encoders, read), *phases(work, "text_to_image", sizes, rounds)]
    if stage == "decode":
        # A token sees half of the image on average, and reads keys and values of every layer.
        context = prompt + (n + 1) / 2
        keys = qwen3.num_hidden_layers * qwen3.num_key_value_heads * qwen3.head_dim
        logits = cfg.vocab.num_image_tokens * qwen3.hidden_size
        read = sizes["layers"] + logits + 2 * batch * context * keys
        prefill = flops.qwen3(qwen3, batch * prompt, (prompt + 1) / 2)
        token = flops.qwen3(qwen3, batch, context, cfg.vocab.num_image_tokens)
        rounds = rounds or n
        return [Phase(1, prefill, 4 * sizes["layers"]), Phase(rounds, token * n / rounds, 4 * read)]
    if stage == "denoise":
        once, step = flops.denoise(cfg, batch)
        return [Phase(1, once, 0), Phase(work.num_inference_steps, step, 4 * sizes["sana"])]
    if stage == "autoencoder":
        pixels = flops.dc_ae_decode(cfg.dc_ae, batch, cfg.sana.sample_size)
        return [Phase(1, pixels, 4 * sizes["decoder"])]
    # Weights are read forwards and backwards; gradients are written; AdamW reads four numbers a
    # parameter and writes three.
    trained = sizes["qwen3"] + sizes["sana"] + sizes["diffusion_connector"]
    frozen = sizes["ta_tok_encoder"] + sizes["encoder"]
    arithmetic = flops.joint_step(cfg, batch, work.tokens.shape[1])
    if stage == "cached_train_step":
        arithmetic, frozen = arithmetic - flops.image_encoders(cfg, batch), 0
    return [Phase(1, arithmetic, 4 * (10 * trained + frozen))]


def parameter_counts(params) -> dict[str, int]:
    """By part, and of those pieces that a stage uses alone."""
    tokenizer, autoencoder = params["ta_tok"], params["dc_ae"]
    pieces = {
        **params,
        "sana": without_spans(params["sana"]),
        "span_embed": params["sana"].get("span_embed", ()),
        "layers": params["qwen3"]["layers"],
        "encoder": autoencoder["encoder"],
        "decoder": autoencoder["decoder"],
        "ta_tok_encoder": (tokenizer["encoder"], tokenizer["bottleneck"]),
    }
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in pieces.items()}
