"""The measurements of a run: where time goes, speed, and the lines of metrics.jsonl."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator

import jax
import numpy as np

from blip3o_jax import flops
from blip3o_jax.chips import peak_flops
from blip3o_jax.errors import InputError
from blip3o_jax.kernels.platform import jit
from blip3o_jax.train import steps
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.metrics import MetricWriter

log = logging.getLogger(__name__)

LAST = ("learning_rate", "skipped")  # of the interval's steps the last one's value, not the mean


def step_flops(cfg: TrainConfig, batch) -> int | None:
    """Of a joint step on a global batch, encoders included where it holds images; None for other
    stages, which nobody plans."""
    if cfg.stage != "joint":
        return None
    model, (rows, length) = cfg.blip3o(), batch["tokens"].shape
    encoders = flops.ta_tok_encode(model.ta_tok, rows) + flops.dc_ae_encode(
        model.dc_ae, rows, model.sana.sample_size
    )
    return flops.joint_step(model, rows, length, cfg.trainable_sana == "all") - (
        encoders if "latents" in batch else 0
    )


class Meter:
    """The clock and the log of one run.

    `notes` are those of `clock`, from the checkpoint that the run goes on from.

    Goodput is the share of the time since the run's first start, pauses and lost steps included,
    that went into steps that still count.
    """

    def __init__(self, cfg: TrainConfig, workdir, step: int, notes: dict):
        self.cfg, self.workdir, self.writer = cfg, workdir, MetricWriter(workdir, step)
        self.began, self.stepping = notes.get("began", time.time()), notes.get("stepping", 0.0)
        self.seconds = dict.fromkeys(("data", "other"), 0.0)
        self.metrics, self.flops, self.profiling = [], None, False
        self.update_ratios = jit(functools.partial(steps.update_ratios, cfg))
        self.logged, self.tick = step, time.perf_counter()

    def clock(self) -> dict[str, float]:
        """What a checkpoint keeps: when the run began (Unix time), and the seconds of the steps
        until now."""
        return {
            "began": self.began,
            "stepping": self.stepping + time.perf_counter() - self.tick - self.seconds["other"],
        }

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the body as "data" (waiting for the host), or as "other" than
        stepping, when the steps so far are done."""
        if name == "other":
            jax.block_until_ready(self.metrics)
        before = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - before

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of a step, counted from 1: marks it in profiles, and starts the one
        that the config asks for."""
        if self.cfg.profile.steps and step == self.cfg.profile.start:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def add(self, step: int, batch, metrics) -> None:
        """Takes a step's metrics, which are waited for at the end of a profile only."""
        self.flops = self.flops or step_flops(self.cfg, batch)
        self.metrics.append(metrics)
        window = self.cfg.profile
        if self.profiling and step == min(window.start + window.steps - 1, self.cfg.num_steps):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.profiling = False
            log.info("Profile of steps %d to %d: %s", window.start, step, self.workdir / "profile")

    def log(self, step: int, state) -> None:
        """Writes the means since the last time, of the steps that were not skipped, and the size of
        the last update. Waits for the device.

        Raises InputError after `cfg.guard.max_skipped` skipped steps in a row.
        """
        values = jax.device_get(self.metrics)
        elapsed, count = time.perf_counter() - self.tick - self.seconds["other"], step - self.logged
        self.stepping += elapsed
        rows = [v for v in values if v["skipped_in_a_row"] == 0] or values[-1:]
        found = {
            name: float(rows[-1][name] if name in LAST else np.mean([r[name] for r in rows]))
            for name in rows[0]
        }
        found["skipped"], longest = (
            float(values[-1]["skipped"]),
            max(int(v["skipped_in_a_row"]) for v in values),
        )
        del found["skipped_in_a_row"]
        found |= {
            name: float(value) for name, value in jax.device_get(self.update_ratios(state)).items()
        }
        found |= {
            "step_ms": 1e3 * elapsed / count,
            "data_wait_ms": 1e3 * self.seconds["data"] / count,
            "images_per_s": self.cfg.batch_size * count / elapsed,
            "goodput": self.stepping / max(time.time() - self.began, 1e-9),
        }
        peak = peak_flops(jax.devices()[0].device_kind)
        if self.flops and peak:
            found["mfu"] = self.flops * count / elapsed / (peak * jax.device_count())
        self.writer.write(step, found)
        eta = elapsed / count * (self.cfg.num_steps - step) / 60
        log.info(
            "step %d/%d %s eta %.0f min",
            step,
            self.cfg.num_steps,
            " ".join(f"{k} {v:.4g}" for k, v in found.items()),
            eta,
        )
        if longest:
            log.warning(
                "%d steps were skipped by step %d, up to %d in a row.",
                int(found["skipped"]),
                step,
                longest,
            )
        if longest >= self.cfg.guard.max_skipped:
            raise InputError(
                f"{longest} steps in a row until step {step} had a loss or gradient that "
                "is not finite, or a spike; the newest checkpoint "
                f"in {self.workdir} is without them. Lower the learning rate or look at "
                "the data, and start from it in a new workdir."
            )
        self.metrics, self.logged, self.tick = [], step, time.perf_counter()
        self.seconds = dict.fromkeys(self.seconds, 0.0)
