"""The loop around the step, from top to bottom: mesh, state, compiled step, then batches, numbers,
pictures and checkpoints."""

import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from blip3o_jax import training_checkpoint
from blip3o_jax.parallel.batches import check_batch, put_batch
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.parallel.processes import barrier
from blip3o_jax.train import evaluation, start, steps, stop
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.meter import Meter
from blip3o_jax.train.start import build_model

log = logging.getLogger(__name__)


def run(
    cfg: TrainConfig,
    workdir,
    batches: Callable[[int], Iterator[dict]],
    heldout: dict,
    load_parts: Callable[[str, str], dict],
    words: np.ndarray | None = None,
) -> dict[str, float]:
    """Trains to `cfg.num_steps` and returns the last evaluation; resumes when the workdir holds a
    checkpoint.

    `batches(step)` iterates over this process's rows of the batches from that step on; `heldout` is
    one host batch, the same in every process; `load_parts(directory, part)` gives a part's params;
    `words` as in `start.initial_params`. Raises InputError before compilation for anything the
    config gets wrong, and when too many steps are skipped or the workdir cannot be written;
    `stop.Preempted` after a SIGTERM.
    """
    began, workdir, mesh = time.time(), pathlib.Path(workdir), make_mesh(cfg.mesh)
    check_batch(cfg.batch_size, mesh, cfg.accumulate)
    model, manager = (
        build_model(cfg),
        training_checkpoint.open_manager(workdir, cfg.keep_checkpoints),
    )

    def make_params():
        return start.initial_params(cfg, model, load_parts, mesh, words)

    with jax.set_mesh(mesh), stop.watch() as stopping:
        state, frozen, shardings, notes = start.begin(cfg, model, mesh, manager, make_params)

        done = int(state["step"])
        iterator, evaluate = batches(done), evaluation.make_evaluate(model, cfg, mesh)
        step = steps.compile_step(model, cfg, shardings)
        meter = Meter(cfg, workdir, done, {"began": began, **notes})
        announce(cfg, meter, mesh, state, frozen)
        result = {}

        def held_out():
            return evaluate(steps.weights(state, frozen), heldout)

        for now in range(done + 1, cfg.num_steps + 1):
            with meter.phase("data"):
                batch = put_batch(next(iterator), mesh)
            if now == done + 1:
                with meter.phase("other"):
                    step = step.lower(state, frozen, batch).compile()
                    barrier(
                        "the first step"
                        # whoever compiles slower is waited for here, not in a collective with a
                        # time limit of its own
                    )
            with meter.step(now):
                state, values = step(state, frozen, batch)
            meter.add(now, batch, values)
            result = (
                after_step(cfg, meter, manager, now, state, frozen, held_out, stopping(now))
                or result
            )
        training_checkpoint.finish(manager)
    return result


def announce(cfg: TrainConfig, meter: Meter, mesh, state, frozen) -> None:
    """Logs what is trained, part by part, and writes every parameter with its shape and sharding to
    WORKDIR/parameters.txt."""
    log.info("Stage %s on mesh %s.\n%s", cfg.stage, dict(mesh.shape), start.overview(state, frozen))
    meter.writer.write_text("parameters.txt", start.parameters(state, frozen))


def after_step(
    cfg: TrainConfig,
    meter: Meter,
    manager,
    now: int,
    state,
    frozen,
    evaluate: Callable,
    leave: bool,
) -> dict[str, float]:
    """What follows step `now` where it is due: log, `evaluate()` -> (numbers, picture or None),
    checkpoint. Gives the numbers, if any.

    Raises `stop.Preempted` with everything saved when the run is to `leave` before its end.
    """
    last, result = now == cfg.num_steps, {}
    if now % cfg.log_every == 0 or last or leave:
        meter.log(now, state)
    if now % cfg.eval_every == 0 or last:
        with meter.phase("other"):
            result, picture = evaluate()
            meter.writer.write(now, result)
            if picture is not None:
                meter.writer.write_image(now, "sheet", picture)
        log.info("held out at step %d: %s", now, json.dumps(result))
    if now % cfg.checkpoint_every == 0 or last or leave:
        with meter.phase("other"):
            training_checkpoint.save(manager, cfg, state, frozen, meter.clock())
    if leave and not last:
        training_checkpoint.finish(manager)
        log.info("Saved step %d; the same command goes on from it.", now)
        raise stop.Preempted(now)
    return result
