"""A rollout: images of prompts, drawn by the present weights and rewarded on the host, as the
arrays that the update reads."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import RewardError
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.parallel.activations import interleaved
from blip3o_jax.parallel.batches import (
    gathered,
    local_rows,
    put_batch,
    put_replicated,
    rows_of_host,
)
from blip3o_jax.parallel.mesh import BATCH
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.rl import grpo
from blip3o_jax.rl.diffusion import METHODS
from blip3o_jax.rl.rewards.scoring import Rewards, Score
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.condition import Sources
from blip3o_jax.text import Text, left_pad, row_length
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.sections import GrpoConfig
from blip3o_jax.tree import join

SEEDS = 1_000_003  # between those of two steps' rollouts


def encode(text: Text, asked: dict, source_codes: np.ndarray | None) -> list[int]:
    """The prompt's ids, of an instruction with the codes of its source image."""
    if "source" in asked:
        return text.encode_edit(asked["prompt"], source_codes[None])
    return text.encode_prompt(asked["prompt"])


def prompt_arrays(text: Text, model: Blip3o, metadata: list[dict], editing: bool) -> tuple:
    """(ids [B,P] padded on the left, which of them exist), and where the prompts may be edits the
    source images uint8 [B,1,H,W,3] and which of them exist [B,1]. The device makes the sources'
    codes and writes them there."""
    sources, side = model.config.ta_tok.num_tokens * editing, model.config.image_size
    ids = [encode(text, m, np.zeros(sources, int)) for m in metadata]
    arrays = left_pad(ids, text.max_prompt_tokens + sources, text.vocab.pad_token_id)
    if not editing:
        return arrays
    nothing = np.zeros((side, side, 3), np.uint8)
    images = np.stack([m.get("source", nothing) for m in metadata])[:, None]
    return *arrays, images, np.array([["source" in m] for m in metadata])


def key_numbers(metadata: list[dict], seed: int, first: int = 0) -> np.ndarray:
    """Of images of these prompts, uint32 [B,3]; a prompt that comes again has others."""
    keys = [generate.sample_key(seed, m["prompt"], first + i) for i, m in enumerate(metadata)]
    return np.array(keys, np.uint32)


def write(
    run: programs.Programs, params: Params, prompts: tuple, keys: Array, decoding: dict
) -> tuple[dict[str, Array], Sources | None]:
    """({"tokens", "hidden", "logprobs", and of edits "source_codes"}, the edits' sources)."""
    prompt, valid, *images = prompts
    codes, sources = run.encode_sources(params, *images) if images else (None, None)
    written = run.write_tokens(params, prompt, valid, keys, codes, **decoding)
    return written | ({"source_codes": codes} if images else {}), sources


def decoding(section: GrpoConfig) -> dict[str, Any]:
    """Settings of `write_tokens`: from the whole distribution, as the loss sees it."""
    return {"top_k": 0, "top_p": 1.0, "temperature": section.temperature}


def rendering(config: Blip3oConfig, section: GrpoConfig, editing: bool) -> dict[str, Any]:
    """Settings of `draw_latents`."""
    settings = programs.by_text(config, section.guidance_scale, editing) | {"shift": 1.0}
    return settings | {"num_inference_steps": section.num_inference_steps}


def gathering(mesh: Mesh, model: Blip3o) -> Callable[[dict], dict]:
    """A function of Qwen3's weights that puts together what `fsdp` cuts, in the dtype of the
    products: all of them are read for every token."""
    if mesh.shape["fsdp"] == 1:
        return lambda params: params

    # Norms and the like are small, and read as they are.
    def cast(path: tuple, leaf: Array) -> Array:
        return leaf.astype(model.dtype) if path[-1].key in ("kernel", "embedding") else leaf

    places = shardings(model.abstract(("qwen3",)), mesh, without="fsdp")["qwen3"]
    gather = functools.partial(jax.tree_util.tree_map_with_path, cast)
    return jax.jit(gather, out_shardings=places)


@functools.partial(jax.jit, static_argnames="group")
def diversity(images: Array, group: int) -> Array:
    """How much the images uint8 [B,H,W,3] of one prompt differ: the root of a pixel's variance in
    its group, in shares of white."""
    groups = images.reshape(-1, group, *images.shape[1:]).astype(jnp.float32) / 255
    variances = jnp.var(groups, axis=1, ddof=1)
    return jnp.mean(jnp.sqrt(variances.mean(axis=(1, 2, 3))))


@functools.partial(jax.jit, static_argnames="pieces")
def cut(tree: Any, pieces: int) -> list:
    """Arrays [B,...] as `pieces` trees of arrays [B/pieces,...], see `interleaved`."""
    whole = interleaved(tree, pieces)
    return [jax.tree.map(lambda x, i=i: x[i], whole) for i in range(pieces)]


def woven(parts: Sequence[Any], axis: int = 0, stack: Callable = np.stack) -> Any:
    """The arrays of which `cut` gave the parts; their rows are along `axis`."""

    def join(*xs: Any) -> Any:
        before, after = xs[0].shape[:axis], xs[0].shape[axis + 1 :]
        return stack(xs, axis + 1).reshape(*before, -1, *after)

    return jax.tree.map(join, *parts)


joined = jax.jit(functools.partial(woven, stack=jnp.stack), static_argnames="axis")


def of_all_hosts(wait: Callable[[], Rewards], images: np.ndarray, mesh: Mesh) -> Rewards:
    """What `wait` gives for this process's images, and for those of all others, in f32; RewardError
    in all processes where it fails in one."""
    # Whoever fails alone would leave the others waiting for its rewards.
    failed, answer = None, None
    try:
        answer = wait()
    except RewardError as error:
        failed = error
    if gathered(put_batch(np.full(len(images), failed is not None), mesh)).any():
        raise failed or RewardError("A reward fails in another process, whose log says why.")
    return gathered(put_batch(answer, mesh))


def mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Along an axis, of the values that are not NaN; NaN where all are."""
    count = np.sum(~np.isnan(values), axis=axis)
    total = np.nansum(values, axis=axis, dtype=np.float64)
    return np.where(count, total / np.maximum(count, 1), np.nan)


def numbers_of(named: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """What is logged of the rewards by name of several renderings."""
    means = {name: mean(np.stack([own[name] for own in named])) for name in named[0]}
    return {name: float(value) for name, value in means.items() if not np.isnan(value)}


def rollouts(
    cfg: TrainConfig,
    model: Blip3o,
    mesh: Mesh,
    text: Text,
    prompts: Callable[[int], list[dict]],
    score: Score,
) -> Callable[[int, dict, dict], tuple[dict, dict[str, float]]]:
    """(step, state, frozen) -> ({half: arrays} for the halves that the step trains, none if all
    groups are left out, and numbers to log).

    `prompts(step)` as in `run.reinforced`. For the transformer each image of a group has tokens of
    its own, rendered `decodes` times. For the diffusion part alone a group shares its tokens, so
    that its images differ by what they were rendered from, and only those of a prompt are written.
    """
    section, editing = cfg.grpo, cfg.data.edits > 0
    group, method = section.num_generations, section.diffusion and METHODS[section.diffusion.method]
    weights = np.array([*section.rewards.values()])
    run = programs.programs(model, out_shardings=NamedSharding(mesh, BATCH))
    sampling, gather = decoding(section), gathering(mesh, model)
    here = rows_of_host(cfg.batch_size // section.pieces, mesh)

    def render(params: Params, hidden: Array, keys: Array, sources: Any, path: bool) -> tuple:
        """(images, what the diffusion part's method trains on)."""
        if not path:
            settings = rendering(model.config, section, editing)
            images, latents = run.draw(params, hidden, keys, sources, **settings)
            return images, {"x0": latents}
        steps = section.num_inference_steps
        names = {"sampler": section.diffusion.sampler, "noise_level": section.diffusion.noise_level}
        drawn = run.path(params, hidden, keys, sources, num_inference_steps=steps, **names)
        return run.pictures(params, drawn["latents"][-1]), {"path": drawn["latents"]}

    def draw(now: int, state: dict, frozen: dict) -> tuple[dict, dict[str, float]]:
        began = time.perf_counter()
        halves, seed = section.halves_at(now), cfg.seed + SEEDS * now
        is_shared = halves == ("diffusion",)
        params = join(frozen, state["params"])
        metadata = prompts(now - 1)
        everyone = [m for m in metadata for _ in range(group)]

        # Tokens: of every image, or of every prompt, which is read once.
        keys = key_numbers(metadata if is_shared else everyone, seed)
        asked = prompt_arrays(text, model, metadata, editing), keys
        whole = {"qwen3": gather(params["qwen3"])}
        written, sources = write(run, params | whole, *put_replicated(asked, mesh), sampling)
        del whole  # before the images
        repeated = functools.partial(jnp.repeat, repeats=group, axis=0)
        hidden, sources = written["hidden"], jax.tree.map(repeated, sources)
        if is_shared:
            hidden = repeated(hidden)

        # Images, by the policy that the method draws with, piece by piece.
        painter = params | state.get("old", {}) if "diffusion" in halves else params
        path = "diffusion" in halves and method.stochastic
        drawn = []
        for i in range(1 if "diffusion" in halves else section.decodes):
            keys = put_replicated(key_numbers(everyone, seed, i * len(everyone)), mesh)
            parts = cut((hidden, keys, sources), section.pieces)
            drawn.append([render(painter, *part, path) for part in parts])
        first, trained = zip(*drawn[0], strict=True)
        spread = diversity(joined(first), group)
        trained = joined(trained, axis=int(path)) if "diffusion" in halves else {}
        # Each piece is rewarded while the device is at the next one, in the process that has its
        # rows.
        images, pending = [own for rendering in drawn for own, _ in rendering], []
        for place, piece in enumerate(images):
            own, rows = local_rows(piece), everyone[place % section.pieces :: section.pieces]
            pending.append((score(own, [rows[i] for i in here]), own))
        rollout_s = time.perf_counter() - began

        # Rewards of tokens are the mean over their renderings.
        began = time.perf_counter()
        answers = [of_all_hosts(wait, own, mesh) for wait, own in pending]
        starts = range(0, len(answers), section.pieces)
        answers = [woven(answers[start : start + section.pieces]) for start in starts]
        rewards = mean(np.stack([rewards for rewards, _ in answers]), axis=0)
        numbers = numbers_of([named for _, named in answers])
        gains, dropped = grpo.advantages(rewards, weights, section)
        learns = {"advantages": gains, "mask": np.float32(~np.any(list(dropped.values()), axis=0))}
        # Of groups of which a reward has something to say.
        groups = grpo.weighted(rewards, weights).reshape(-1, group)
        groups = groups[~np.isnan(groups).all(axis=1)]
        if len(groups):
            deviation = np.mean(np.nanstd(groups, axis=1))
            numbers |= {"reward": float(np.nanmean(groups)), "reward_std": float(deviation)}
        numbers = {
            **{name: float(rows.mean()) for name, rows in dropped.items()},
            "diversity": float(spread),
            **numbers,
            **{"rollout_s": rollout_s, "reward_s": time.perf_counter() - began},
        }

        # What each half reads; nothing where no group teaches anything.
        batch = {}
        if not learns["mask"].any():
            return batch, numbers
        if "transformer" in halves:
            codes = gathered(written.get("source_codes", [None] * len(metadata)))
            ids = [encode(text, m, own) for m, own in zip(metadata, codes, strict=True)]
            ids = [own for own in ids for _ in range(group)]
            length = cfg.data.row_length or row_length(model.config)
            tokens, starts = text.training_rows(ids, gathered(written["tokens"]), length)
            arrays = put_replicated({"tokens": tokens, "start": starts, **learns}, mesh)
            batch["transformer"] = arrays | {"logprobs": written["logprobs"]}
        if "diffusion" in halves:
            batch["diffusion"] = put_replicated(learns, mesh) | {"hidden": hidden, **trained}
            if sources is not None:
                batch["diffusion"]["sources"] = sources
        return batch, numbers

    return draw
