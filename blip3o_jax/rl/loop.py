"""The loop around rollouts and updates: the only part of reinforcement learning that touches clock, disk and devices."""

import functools
import logging
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import checkpoint, generate
from blip3o_jax.compilation import jit
from blip3o_jax.config import ConfigError
from blip3o_jax.mesh import batch_shards, make_mesh, put_batch
from blip3o_jax.metrics import MetricWriter, sheet
from blip3o_jax.rl import grpo
from blip3o_jax.sharding import join, shardings
from blip3o_jax.text import Text
from blip3o_jax.train import loop, steps
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.optimizer import schedule

log = logging.getLogger(__name__)

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
    """Trains to `cfg.num_steps` and returns the last held-out numbers; resumes when the workdir holds a checkpoint.

    `prompts(step)` are the metadata (with their "prompt") of that update, batch_size / num_generations of them; `heldout` those that are
    drawn at every evaluation, batch_size at most; `reward(images, metadata)` gives rewards and numbers to log. Raises ConfigError for
    what the config gets wrong, and when the loss stops being finite.
    """
    if jax.process_count() > 1:
        raise ConfigError("GRPO runs in one process; rewards are not yet gathered from several.")
    workdir, mesh = pathlib.Path(workdir), make_mesh(cfg.mesh)
    if cfg.batch_size % batch_shards(mesh):
        raise ConfigError(f"batch_size {cfg.batch_size} does not divide by the mesh's {batch_shards(mesh)} batch shards.")
    model, writer = loop.build_model(cfg), MetricWriter(workdir)
    manager = checkpoint.open_manager(workdir, cfg.keep_checkpoints)

    params = loop.initial_params(cfg, model, load_parts, mesh)
    placed = shardings(jax.eval_shape(lambda p: steps.init_state(cfg, p), params), mesh)
    state, frozen = jax.jit(lambda p: steps.init_state(cfg, p), out_shardings=placed)(params)
    reference = jax.tree.map(jnp.copy, params["qwen3"])  # the state's own buffers are donated
    del params
    if manager.latest_step() is not None:
        state, frozen = checkpoint.restore(manager, state, frozen)
        log.info("Resumed %s at step %d.", workdir, int(state["step"]))

    update = grpo.compile_update(model, cfg, placed[0])
    draw = jit(functools.partial(_draw, model, cfg))
    show = jit(functools.partial(generate.text_to_image, model, num_inference_steps=20, top_k=1200))
    sampling = {"top_p": 0.95, "temperature": 1.0, "guidance_scale": 2.0, "shift": 1.0}

    def inputs(metadata: list[dict], seed: int):
        """A full batch for as many metadata as there are; what is missing repeats the first."""
        rows = [m["prompt"] for m in metadata] + [metadata[0]["prompt"]] * (cfg.batch_size - len(metadata))
        numbers = np.array([generate.sample_key(seed, prompt, i) for i, prompt in enumerate(rows)], np.uint32)
        return put_batch((*text.encode_prompts(rows, text.max_prompt_tokens), numbers), mesh)

    def evaluate() -> tuple[dict[str, float], np.ndarray]:
        made = show(steps.weights(state, frozen), *inputs(heldout, cfg.seed), **sampling)
        images = np.asarray(made["images"])[: len(heldout)]
        return {f"heldout/{name}": value for name, value in reward(images, heldout)[1].items()}, sheet(images)

    rate, result = schedule(cfg.optimizer, cfg.num_steps), {}
    for now in range(int(state["step"]) + 1, cfg.num_steps + 1):
        began = time.perf_counter()
        metadata = [m for m in prompts(now - 1) for _ in range(cfg.grpo.num_generations)]
        # Rollouts of an update have keys of their own, so that a prompt that comes again is drawn anew.
        made = jax.device_get(draw(join(frozen, state["params"]), *inputs(metadata, cfg.seed + 1_000_003 * now)))
        drawn = time.perf_counter()
        rewards, numbers = reward(made["images"], metadata)
        judged = time.perf_counter()
        tokens, start = text.training_rows([text.encode_prompt(m["prompt"]) for m in metadata], made["tokens"], _length(cfg, text))
        batch = {"tokens": tokens, "start": start, "logprobs": made["logprobs"]}
        batch["advantages"] = np.asarray(grpo.advantages(rewards, cfg.grpo.num_generations))
        state, metrics = update(state, reference, put_batch(batch, mesh))
        metrics = {name: float(value) for name, value in metrics.items()}
        ended = time.perf_counter()
        spread = float(np.mean(np.std(rewards.reshape(-1, cfg.grpo.num_generations), axis=1)))
        metrics |= {"reward": float(rewards.mean()), "reward_std": spread, **numbers, "learning_rate": float(rate(now))}
        metrics |= {"rollout_s": drawn - began, "reward_s": judged - drawn, "update_s": ended - judged}
        writer.write(now, metrics)
        if not np.isfinite(metrics["loss"]):
            raise ConfigError(f"The loss is not finite at step {now}; the newest checkpoint in {workdir} is from before.")
        if now % cfg.log_every == 0:
            log.info("step %d/%d %s", now, cfg.num_steps, " ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if now % cfg.eval_every == 0 or now == cfg.num_steps:
            result, picture = evaluate()
            writer.write(now, result)
            writer.write_image(now, "sheet", picture)
            log.info("held out at step %d: %s", now, result)
        if now % cfg.checkpoint_every == 0 or now == cfg.num_steps:
            checkpoint.save(manager, cfg, state, frozen)
    manager.wait_until_finished()
    return result


def _draw(model, cfg: TrainConfig, params, prompt, valid, numbers):
    """Pictures drawn from the whole distribution, as the loss sees it."""
    return generate.text_to_image(
        model,
        params,
        prompt,
        valid,
        numbers,
        num_inference_steps=cfg.grpo.num_inference_steps,
        top_k=0,
        top_p=jnp.float32(1),
        temperature=jnp.float32(cfg.grpo.temperature),
        guidance_scale=cfg.grpo.guidance_scale,
        shift=1.0,
    )


def _length(cfg: TrainConfig, text: Text) -> int:
    return cfg.data.row_length or text.max_prompt_tokens + cfg.blip3o().ta_tok.num_tokens + 3
