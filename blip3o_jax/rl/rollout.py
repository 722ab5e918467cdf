"""A rollout: images of prompts, drawn by the present weights and rewarded on the host, as the
arrays that the update reads."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.parallel.batches import put_batch, put_replicated
from blip3o_jax.rl import grpo
from blip3o_jax.rl.diffusion import METHODS
from blip3o_jax.rl.rewards.scoring import Score
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.condition import Sources
from blip3o_jax.text import Text, left_pad, row_length
from blip3o_jax.train.config import TrainConfig
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


def diversity(images: np.ndarray, group: int) -> float:
    """How much the images uint8 [B,H,W,3] of one prompt differ: the root of a pixel's variance in
    its group, in shares of white."""
    groups = images.reshape(-1, group, *images.shape[1:]).astype(np.float32) / 255
    variances = np.var(groups, axis=1, ddof=1)
    return float(np.mean(np.sqrt(variances.mean(axis=(1, 2, 3)))))


def over_renderings(rewards: np.ndarray) -> np.ndarray:
    """The mean [B,R] of the rewards [renderings,B,R] that are not NaN; NaN where all are."""
    counts = np.sum(~np.isnan(rewards), axis=0)
    return np.where(counts, np.nansum(rewards, axis=0) / np.maximum(counts, 1), np.nan)


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each number, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


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
    weights, run = np.array([*section.rewards.values()]), programs.programs(model)
    # Drawn from the whole distribution, as the loss sees it.
    decoding = {"top_k": 0, "top_p": 1.0, "temperature": section.temperature}
    scale = section.guidance_scale

    def render(params: Params, hidden: Array, keys: Array, sources: Any, path: bool) -> tuple:
        """(images, what the diffusion part's method trains on)."""
        steps = section.num_inference_steps
        if not path:
            settings = programs.by_text(scale, editing) | {"num_inference_steps": steps}
            images, latents = run.draw(params, hidden, keys, sources, shift=1.0, **settings)
            return images, {"x0": latents}
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

        # Tokens: of every image, or of every prompt.
        rows = metadata if is_shared else everyone
        asked = prompt_arrays(text, model, rows, editing), key_numbers(rows, seed)
        written, sources = write(run, params, *put_replicated(asked, mesh), decoding)
        hidden = written["hidden"]
        if is_shared:
            repeated = [jnp.repeat(x, group, axis=0) for x in jax.tree.leaves((hidden, sources))]
            structure = jax.tree.structure((hidden, sources))
            hidden, sources = jax.tree.unflatten(structure, repeated)

        # Images, by the policy that the method draws with.
        painter = params | state.get("old", {}) if "diffusion" in halves else params
        path = "diffusion" in halves and method.stochastic
        renderings = []
        for i in range(1 if "diffusion" in halves else section.decodes):
            keys = put_batch(key_numbers(everyone, seed, i * len(everyone)), mesh)
            images, trained = render(painter, hidden, keys, sources, path)
            renderings.append(images)
        # Each is rewarded while the device is at the next one.
        pending = []
        for i, images in enumerate(renderings):
            renderings[i] = np.asarray(images)
            pending.append(score(renderings[i], everyone))
        rollout_s = time.perf_counter() - began

        # Rewards of tokens are the mean over their renderings.
        began = time.perf_counter()
        answers = [wait() for wait in pending]
        rewards = over_renderings(np.stack([rewards for rewards, _ in answers]))
        numbers = means([numbers for _, numbers in answers])
        gains, dropped = grpo.advantages(rewards, weights, section)
        learns = {"advantages": gains, "mask": np.float32(~np.any(list(dropped.values()), axis=0))}
        # Of groups of which a reward has something to say.
        groups = grpo.weighted(rewards, weights).reshape(-1, group)
        groups = groups[~np.isnan(groups).all(axis=1)]
        if len(groups):
            spread = np.mean(np.nanstd(groups, axis=1))
            numbers |= {"reward": float(np.nanmean(groups)), "reward_std": float(spread)}
        numbers = {
            **{name: float(rows.mean()) for name, rows in dropped.items()},
            "diversity": diversity(renderings[0], group),
            **numbers,
            **{"rollout_s": rollout_s, "reward_s": time.perf_counter() - began},
        }

        # What each half reads; nothing where no group teaches anything.
        batch = {}
        if not learns["mask"].any():
            return batch, numbers
        if "transformer" in halves:
            codes = jax.device_get(written.get("source_codes", [None] * len(everyone)))
            ids = [encode(text, m, own) for m, own in zip(everyone, codes, strict=True)]
            length = cfg.data.row_length or row_length(model.config)
            tokens, starts = text.training_rows(ids, jax.device_get(written["tokens"]), length)
            arrays = {"tokens": tokens, "start": starts, **learns}
            batch["transformer"] = put_batch(arrays, mesh) | {"logprobs": written["logprobs"]}
        if "diffusion" in halves:
            batch["diffusion"] = put_batch(learns, mesh) | {"hidden": hidden, **trained}
            if sources is not None:
                batch["diffusion"]["sources"] = sources
        return batch, numbers

    return draw
