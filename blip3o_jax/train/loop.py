"""The loop around the step, from top to bottom, and the supervised run that it is given.

The order of initialisation: the job connects the processes; the run has the mesh and the model's
modules; then comes the state, from the newest checkpoint or from initial parameters, then the first
batch after it, and the compiled step last, since it needs the shardings of both.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blip3o_jax import paths, training_checkpoint
from blip3o_jax.errors import InputError, RewardError, require
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.batches import put_batch
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.parallel.processes import barrier
from blip3o_jax.paths import AnyPath
from blip3o_jax.train import start, steps, stop
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.meter import Meter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What one kind of training brings to the loop; its functions are called on the mesh."""

    model: Blip3o
    mesh: Mesh
    params: Callable[[], dict]  # initial parameters of the stage's parts
    # the last step -> a function for the steps after it, one by one:
    # (step, state, frozen) -> (batch on the mesh, numbers to log)
    batches: Callable[[int], Callable[[int, dict, dict], tuple[dict, dict]]]
    # (state, frozen, batch, shardings of the state) -> (state, frozen, batch) -> (state, metrics)
    compile: Callable[[dict, dict, dict, dict], Callable]
    # parameters -> (held-out numbers, an image)
    evaluate: Callable[[dict], tuple[dict[str, float], np.ndarray | None]]
    # a step's metrics -> why the run must end with it, or nothing
    halt: Callable[[dict], str] = lambda metrics: ""


def run(cfg: TrainConfig, workdir: str | AnyPath, run: Run) -> dict[str, float]:
    """Trains to `cfg.num_steps` and returns the last evaluation; resumes when the workdir holds a
    checkpoint.

    Raises InputError before compilation for anything the config gets wrong, and when too many
    steps are skipped, the workdir cannot be written, a reward fails or the run's own reason to
    `halt` occurs; `stop.Preempted` after a SIGTERM. State and notes are saved before the last
    three.
    """
    began = time.time()
    start.check_batches(cfg, run.mesh)
    manager = training_checkpoint.open_manager(workdir, cfg.keep_checkpoints)

    with jax.set_mesh(run.mesh), stop.watch() as stopping:
        # The newest whole checkpoint, or a new run.
        state, frozen, shardings, notes = start.begin(cfg, run.model, run.mesh, manager, run.params)
        done = int(state["step"])
        meter = Meter(cfg, paths.path(workdir), done, {"began": began, **notes})
        # What is trained, part by part; every parameter with its shape and sharding.
        parts, mesh = start.overview(state, frozen), dict(run.mesh.shape)
        log.info("Stage %s on mesh %s.\n%s", cfg.stage, mesh, parts)
        meter.writer.write_text("parameters.txt", start.parameters(state, frozen))

        batch_of = run.batches(done)
        step, result = None, {}
        if done >= cfg.num_steps:
            sentence = "The run in %s is finished, at step %d; docs/data.md says how to train on."
            log.info(sentence, workdir, done)
            result, _ = run.evaluate(steps.weights(state, frozen))
        try:
            for now in range(done + 1, cfg.num_steps + 1):
                with meter.phase("data"):
                    batch, numbers = batch_of(now, state, frozen)
                if step is None:
                    # A process that compiles slower is waited for here, not in a collective with a
                    # time limit of its own.
                    with meter.phase("other"):
                        step = run.compile(state, frozen, batch, shardings)
                        barrier("the first step")
                with meter.step(now):
                    state, metrics = step(state, frozen, batch)
                meter.add(now, batch, metrics | numbers)
                leave, reason = stopping(now), run.halt(metrics)
                ends = leave or bool(reason)
                result = after_step(run, meter, manager, state, frozen, now, ends) or result
                require(not reason, f"{reason} Step {now} is saved.")
                if leave and now < cfg.num_steps:
                    log.info("Saved step %d; the same command resumes from it.", now)
                    raise stop.Preempted(now)
        except RewardError as error:
            last = int(state["step"])
            save_last(manager, cfg, state, frozen, meter, last)
            if stop.is_asked():
                raise stop.Preempted(last) from error
            where = f" Step {last} is saved." if last else ""
            raise InputError(f"{error}{where}") from error
        training_checkpoint.finish(manager)
    return result


def save_last(
    manager: Any, cfg: TrainConfig, state: dict, frozen: dict, meter: Meter, step: int
) -> None:
    """Saves `step`, which is on disk when this returns, unless it is there already."""
    training_checkpoint.finish(manager)
    if step > (manager.latest_step() or 0):
        training_checkpoint.save(manager, cfg, state, frozen, meter.clock())
        training_checkpoint.finish(manager)


def after_step(
    run: Run, meter: Meter, manager: Any, state: dict, frozen: dict, now: int, leave: bool
) -> dict[str, float]:
    """What follows step `now` where it is due: log, checkpoint, evaluation. Returns the held-out
    numbers, if any. When the run is to `leave`, everything is saved.
    """
    cfg, result = meter.cfg, {}
    last = now == cfg.num_steps
    # Each at its interval, and at the end.
    if now % cfg.log_every == 0 or last or leave:
        meter.log(now, state)
    if now % cfg.checkpoint_every == 0 or last or leave:
        with meter.phase("other"):
            training_checkpoint.save(manager, cfg, state, frozen, meter.clock())
            if leave:  # on disk before anything that takes longer than a scheduler may wait
                training_checkpoint.finish(manager)
    if now % cfg.eval_every == 0 or last:
        with meter.phase("other"):
            result, image = run.evaluate(steps.weights(state, frozen))
            meter.writer.write(now, result)
            if image is not None:
                meter.writer.write_image(now, "sheet", image)
        log.info("held out at step %d: %s", now, json.dumps(result))
    return result


def supervised(
    cfg: TrainConfig,
    batches: Callable[[int], Iterator[dict]],
    heldout: dict,
    load_part: start.LoadPart,
    words: np.ndarray | None = None,
) -> Run:
    """The run of a stage with a loss of its own.

    `batches(step)` iterates over this process's rows of the batches after that step; `heldout` is
    one host batch, the same in every process; `load_part` and `words` as in `start.initial_params`.
    """
    mesh, model = make_mesh(cfg.mesh), start.build_model(cfg)
    evaluate = cfg.record.evaluate(model, cfg.section, mesh)

    def batches_after(step: int) -> Callable[[int, dict, dict], tuple[dict, dict]]:
        iterator = batches(step)
        return lambda now, state, frozen: (put_batch(next(iterator), mesh), {})

    def compiled(state: dict, frozen: dict, batch: dict, shardings: dict) -> Callable:
        return steps.compile_step(model, cfg, shardings).lower(state, frozen, batch).compile()

    return Run(
        model=model,
        mesh=mesh,
        params=lambda: start.initial_params(cfg, model, load_part, mesh, words=words),
        batches=batches_after,
        compile=compiled,
        evaluate=lambda params: evaluate(params, heldout),
    )
