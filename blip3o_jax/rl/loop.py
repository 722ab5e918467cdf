"""The loop around rollouts and updates: the only part of reinforcement learning that touches clock,
disk and devices."""

import functools
import pathlib
import time
from collections.abc import Callable
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import training_checkpoint
from blip3o_jax.parallel.batches import check_batch, put_batch
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.pixels import contact_sheet
from blip3o_jax.rl import grpo
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.settings import Settings
from blip3o_jax.text import Text, row_length
from blip3o_jax.train import start, steps, stop
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.loop import after_step, announce
from blip3o_jax.train.meter import Meter
from blip3o_jax.tree import join

Reward = Callable[[np.ndarray, list[dict]], tuple[np.ndarray, dict[str, float]]]


def run(
    cfg: TrainConfig,
    workdir,
    prompts: Callable[[int], list[dict]],
    heldout: list[dict],
    text: Text,
    reward: Reward,
    load_parts: Callable[[str, str], dict],
) -> dict[str, float]:
    """Trains to `cfg.num_steps` and returns the last held-out numbers; resumes when the workdir
    holds a checkpoint.

    `prompts(step)` are the metadata (with their "prompt") of that update, batch_size /
    num_generations of them; `heldout` those that are drawn at every evaluation, batch_size at most;
    `reward(images, metadata)` gives rewards and numbers to log. Raises InputError for what the
    config gets wrong and as the supervised loop does; rewards count as waiting for data.
    """
    began, workdir, mesh = time.time(), pathlib.Path(workdir), make_mesh(cfg.mesh)
    check_batch(cfg.batch_size, mesh)
    model, manager = (
        start.build_model(cfg),
        training_checkpoint.open_manager(workdir, cfg.keep_checkpoints),
    )

    with jax.set_mesh(mesh), stop.watch() as stopping:
        params = start.initial_params(cfg, model, load_parts, mesh)
        reference = jax.tree.map(jnp.copy, params["qwen3"])  # the state's own buffers are donated
        state, frozen, shardings, notes = start.begin(
            cfg, model, mesh, manager, functools.partial(dict, params)
        )
        del params

        update = grpo.compile_update(model, cfg, shardings)
        draw = programs.text_to_image(model)
        show = asdict(Settings(num_inference_steps=20))
        rollout = show | {  # drawn from the whole distribution, as the loss sees it
            "num_inference_steps": cfg.grpo.num_inference_steps,
            "top_k": 0,
            "top_p": 1.0,
            "temperature": cfg.grpo.temperature,
            "guidance_scale": cfg.grpo.guidance_scale,
        }

        def inputs(metadata: list[dict], seed: int):
            """A full batch for as many metadata as there are; what is missing repeats the first."""
            rows = [m["prompt"] for m in metadata] + [metadata[0]["prompt"]] * (
                cfg.batch_size - len(metadata)
            )
            numbers = np.array(
                [generate.sample_key(seed, prompt, i) for i, prompt in enumerate(rows)], np.uint32
            )
            return put_batch((*text.encode_prompts(rows, text.max_prompt_tokens), numbers), mesh)

        def evaluate() -> tuple[dict[str, float], np.ndarray]:
            made = draw(steps.weights(state, frozen), *inputs(heldout, cfg.seed), **show)
            images = np.asarray(made["images"])[: len(heldout)]
            return {
                f"heldout/{name}": value for name, value in reward(images, heldout)[1].items()
            }, contact_sheet(images)

        done = int(state["step"])
        meter, result = Meter(cfg, workdir, done, {"began": began, **notes}), {}
        announce(cfg, meter, mesh, state, frozen)
        for now in range(done + 1, cfg.num_steps + 1):
            clock = time.perf_counter()
            metadata = [m for m in prompts(now - 1) for _ in range(cfg.grpo.num_generations)]
            # Rollouts of an update have keys of their own, so that a prompt that comes again is
            # drawn anew.
            asked = inputs(metadata, cfg.seed + 1_000_003 * now)
            made = jax.device_get(draw(join(frozen, state["params"]), *asked, **rollout))
            drawn = time.perf_counter()
            with meter.phase("data"):
                rewards, numbers = reward(made["images"], metadata)
            judged = time.perf_counter()
            tokens, begins = text.training_rows(
                [text.encode_prompt(m["prompt"]) for m in metadata],
                made["tokens"],
                cfg.data.row_length or row_length(cfg.blip3o()),
            )
            batch = {"tokens": tokens, "start": begins, "logprobs": made["logprobs"]}
            batch["advantages"] = np.asarray(grpo.advantages(rewards, cfg.grpo.num_generations))
            with meter.step(now):
                state, metrics = update(state, reference, put_batch(batch, mesh))
            jax.block_until_ready(metrics)
            spread = float(np.mean(np.std(rewards.reshape(-1, cfg.grpo.num_generations), axis=1)))
            metrics |= {"reward": float(rewards.mean()), "reward_std": spread, **numbers}
            metrics |= {
                "rollout_s": drawn - clock,
                "reward_s": judged - drawn,
                "update_s": time.perf_counter() - judged,
            }
            meter.add(now, batch, metrics)
            result = (
                after_step(cfg, meter, manager, now, state, frozen, evaluate, stopping(now))
                or result
            )
        training_checkpoint.finish(manager)
    return result
