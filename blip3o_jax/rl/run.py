"""The run that reinforcement gives to the training loop: a batch is a rollout."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import require
from blip3o_jax.parallel.batches import gathered, local_rows, put_replicated, rows_of_host
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.pixels import contact_sheet
from blip3o_jax.rl import rollout, update
from blip3o_jax.rl.rewards.scoring import Score
from blip3o_jax.sample import programs
from blip3o_jax.sample.settings import Settings
from blip3o_jax.text import Text
from blip3o_jax.train import start
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.loop import Run


def reinforced(
    cfg: TrainConfig,
    prompts: Callable[[int], list[dict]],
    heldout: list[dict],
    text: Text,
    score: Score,
    load_part: start.LoadPart,
) -> Run:
    """The run of stage `grpo`.

    `prompts(step)` are the metadata of the update after that step, batch_size / num_generations of
    them: each with its "prompt" and, where that is an instruction (a share `data.edits`), the
    "source" uint8 [H,W,3] that it edits. `heldout` are those that are drawn at every evaluation,
    batch_size at most. `score` gives the rewards of `grpo.rewards`. The time of rollouts and
    rewards counts as waiting for data.
    """
    mesh, model = make_mesh(cfg.mesh), start.build_model(cfg)
    editing = cfg.data.edits > 0
    features = "GRPO reads sources as tokens; it cannot train with use_tar_siglip_features"
    require(not (editing and model.config.use_tar_siglip_features), f"{features}.")
    run = programs.programs(model, out_shardings=jax.NamedSharding(mesh, BATCH))
    show = asdict(Settings(num_inference_steps=model.config.sana.few_steps or 20))
    show |= programs.by_text(model.config, show["guidance_scale"], editing)
    decoding = {name: show.pop(name) for name in programs.DECODING}
    rollouts = rollout.rollouts(cfg, model, mesh, text, prompts, score)

    def compiled(state: dict, frozen: dict, batch: dict, shardings: dict) -> Callable:
        # The policy at the run's start, which a later state no longer holds.
        parts = update.reference_parts(cfg, state)
        if int(state["step"]) == 0:
            reference = {part: jax.tree.map(jnp.copy, state["params"][part]) for part in parts}
        else:
            reference = start.initial_params(cfg, model, load_part, mesh, parts) if parts else {}
        compiled_for = {}

        def step(state: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
            if not batch:
                return update.unchanged(cfg, state)
            # A program for each set of halves, compiled when it is first needed.
            halves = tuple(sorted(batch))
            if halves not in compiled_for:
                program = update.compile_update(model, cfg, shardings)
                lowered = program.lower(state, frozen, reference, batch)
                compiled_for[halves] = lowered.compile()
            began = time.perf_counter()
            state, metrics = compiled_for[halves](state, frozen, reference, batch)
            jax.block_until_ready(metrics)
            return state, metrics | {"update_s": time.perf_counter() - began}

        return step

    def evaluate(params: dict) -> tuple[dict[str, float], np.ndarray]:
        # The first of the prompts fills the batch, and is not counted again.
        rows = heldout + heldout[:1] * (cfg.batch_size - len(heldout))
        arrays = rollout.prompt_arrays(text, model, rows, editing)
        prompts, keys = put_replicated((arrays, rollout.key_numbers(rows, cfg.seed)), mesh)
        written, sources = rollout.write(run, params, prompts, keys, decoding)
        parts = rollout.cut((written["hidden"], keys, sources), cfg.grpo.pieces)
        images = rollout.joined([run.draw(params, *part, **show)[0] for part in parts])
        own = local_rows(images)
        wait = score(own, [rows[i] for i in rows_of_host(len(rows), mesh)])
        _, named = rollout.of_all_hosts(wait, own, mesh)
        named = {name: values[: len(heldout)] for name, values in named.items()}
        numbers = rollout.numbers_of([named])
        sheet = contact_sheet(gathered(images)[: len(heldout)])
        return {f"heldout/{name}": value for name, value in numbers.items()}, sheet

    return Run(
        model=model,
        mesh=mesh,
        params=lambda: start.initial_params(cfg, model, load_part, mesh),
        batches=lambda step: rollouts,
        compile=compiled,
        evaluate=evaluate,
        halt=functools.partial(beyond, cfg),
    )


def beyond(cfg: TrainConfig, metrics: dict) -> str:
    """Which of the ceilings of the divergence a step is above, in a sentence; else nothing."""
    limits = {"kl": ("grpo", cfg.grpo.max_kl)}
    if cfg.grpo.diffusion:
        limits["diffusion/kl"] = "grpo.diffusion", cfg.grpo.diffusion.max_kl
    for name, (section, limit) in limits.items():
        if limit is not None and name in metrics and not float(metrics[name]) <= limit:
            kl = f"{name} is {float(metrics[name]):.4g}, above {section}.max_kl {limit}"
            return f"{kl}: lower the learning rate, or raise {section}.beta."
    return ""
