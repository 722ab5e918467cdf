"""The run that GRPO gives to the training loop: a batch is a rollout, drawn by the present weights
and rewarded on the host."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import require
from blip3o_jax.parallel.batches import put_batch
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.pixels import contact_sheet
from blip3o_jax.rl import grpo, update
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.condition import guidance
from blip3o_jax.sample.settings import Settings
from blip3o_jax.text import Text, left_pad, row_length
from blip3o_jax.train import start
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.loop import Run

# (images uint8 [B,H,W,3], what was asked for) -> (rewards [B,2], numbers to log); the second reward
# has the share `grpo.strict`
Reward = Callable[[np.ndarray, list[dict]], tuple[np.ndarray, dict[str, float]]]

SEEDS = 1_000_003  # between those of two updates' rollouts


def reinforced(
    cfg: TrainConfig,
    prompts: Callable[[int], list[dict]],
    heldout: list[dict],
    text: Text,
    reward: Reward,
    load_part: start.LoadPart,
) -> Run:
    """The run of stage `grpo`.

    `prompts(step)` are the metadata of the update after that step, batch_size / num_generations of
    them: each with its "prompt" and, where that is an instruction (a share `data.edits`), the
    "source" uint8 [H,W,3] that it edits. `heldout` are those that are drawn at every evaluation,
    batch_size at most. The time of rollouts and rewards counts as waiting for data.
    """
    mesh, model = make_mesh(cfg.mesh), start.build_model(cfg)
    group, editing = cfg.grpo.num_generations, cfg.data.edits > 0
    weights = np.array([1 - cfg.grpo.strict, cfg.grpo.strict])
    draw = programs.edit if editing else programs.text_to_image
    draw = functools.partial(draw, programs.programs(model))
    side, sources = model.config.image_size, model.config.ta_tok.num_tokens * editing
    features = "GRPO reads sources as tokens; it cannot train with use_tar_siglip_features"
    require(not (editing and model.config.use_tar_siglip_features), f"{features}.")
    show = asdict(Settings(num_inference_steps=20))
    # Drawn from the whole distribution, as the loss sees it.
    names = ("num_inference_steps", "temperature", "guidance_scale")
    rollout = show | {name: getattr(cfg.grpo, name) for name in names} | {"top_k": 0, "top_p": 1.0}
    if editing:
        # By the text alone, here the instruction; None is no guidance.
        for settings in (show, rollout):
            scale = settings["guidance_scale"]
            settings["guidance_scale"] = guidance(1.0 if scale is None else scale, 1.0)

    def encode(asked: dict, source_codes: np.ndarray) -> list[int]:
        if "source" in asked:
            return text.encode_edit(asked["prompt"], source_codes[None])
        return text.encode_prompt(asked["prompt"])

    def inputs(metadata: list[dict], seed: int) -> tuple:
        """A full batch for as many metadata as there are; the first fills what is missing."""
        rows = metadata + metadata[:1] * (cfg.batch_size - len(metadata))
        keys = [generate.sample_key(seed, m["prompt"], i) for i, m in enumerate(rows)]
        # The codes of sources are made on the device and written there.
        ids = [encode(m, np.zeros(sources, int)) for m in rows]
        prompt = left_pad(ids, text.max_prompt_tokens + sources, text.vocab.pad_token_id)
        arrays = [*prompt, np.array(keys, np.uint32)]
        if editing:
            nothing = np.zeros((side, side, 3), np.uint8)
            arrays.append(np.stack([m.get("source", nothing) for m in rows])[:, None])
            arrays.append(np.array([["source" in m] for m in rows]))
        return put_batch(tuple(arrays), mesh)

    def batch(now: int, params: dict) -> tuple[dict, dict[str, float]]:
        # A prompt that comes again is drawn with other keys.
        began = time.perf_counter()
        metadata = [m for m in prompts(now - 1) for _ in range(group)]
        asked = inputs(metadata, cfg.seed + SEEDS * now)
        drawn = jax.device_get(draw(params, *asked, **rollout))
        rollout_s = time.perf_counter() - began

        # Rewards on the host.
        began = time.perf_counter()
        rewards, numbers = reward(drawn["images"], metadata)
        gains, dropped = grpo.advantages(rewards, weights, cfg.grpo)
        numbers |= {name: float(rows.mean()) for name, rows in dropped.items()}
        reward_s = time.perf_counter() - began

        # Rows with the drawn tokens, for the update.
        codes = drawn.get("source_codes", [None] * len(metadata))
        ids = [encode(m, own) for m, own in zip(metadata, codes, strict=True)]
        length = cfg.data.row_length or row_length(model.config)
        tokens, starts = text.training_rows(ids, drawn["tokens"], length)
        arrays = {
            "tokens": tokens,
            "start": starts,
            "logprobs": drawn["logprobs"],
            "advantages": gains,
            "mask": np.float32(~np.any(list(dropped.values()), axis=0)),
        }
        total = rewards @ weights
        spread = np.mean(np.std(total.reshape(-1, group), axis=1))
        numbers = {"reward": float(total.mean()), "reward_std": float(spread), **numbers}
        return put_batch(arrays, mesh), numbers | {"rollout_s": rollout_s, "reward_s": reward_s}

    def compiled(state: dict, frozen: dict, batch: dict, shardings: dict) -> Callable:
        # The policy at the run's start, which a later state no longer holds.
        if not cfg.grpo.beta:
            reference = {}
        elif int(state["step"]) == 0:
            reference = jax.tree.map(jnp.copy, state["params"]["qwen3"])
        else:
            reference = start.initial_params(cfg, model, load_part, mesh, ("qwen3",))["qwen3"]
        program = update.compile_update(model, cfg, shardings)
        program = program.lower(state, reference, batch).compile()

        def step(state: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
            began = time.perf_counter()
            state, metrics = program(state, reference, batch)
            jax.block_until_ready(metrics)
            return state, metrics | {"update_s": time.perf_counter() - began}

        return step

    def evaluate(params: dict) -> tuple[dict[str, float], np.ndarray]:
        # The rows beyond those asked for fill the batch.
        images = np.asarray(draw(params, *inputs(heldout, cfg.seed), **show)["images"])
        images = images[: len(heldout)]
        numbers = reward(images, heldout)[1]
        return {f"heldout/{name}": value for name, value in numbers.items()}, contact_sheet(images)

    return Run(
        model=model,
        mesh=mesh,
        params=lambda: start.initial_params(cfg, model, load_part, mesh),
        batches=lambda step: batch,
        compile=compiled,
        evaluate=evaluate,
    )
