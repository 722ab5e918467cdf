"""The measurements of a run: where time goes, speed, and the lines of metrics.jsonl."""

import contextlib
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from blip3o_jax import paths
from blip3o_jax.chips import peak_flops
from blip3o_jax.errors import require
from blip3o_jax.kernels.platform import jit
from blip3o_jax.paths import AnyPath
from blip3o_jax.train import steps
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.metrics import MetricWriter

log = logging.getLogger(__name__)

AHEAD = 2  # steps that may be dispatched before one is done: a SIGTERM must wait for all of them
LAST = ("learning_rate", "skipped")  # of the interval's steps the last one's value, not the mean

# What a line of the log shows first; metrics.jsonl has all of it.
FIRST = ("loss", "reward", "score", "ce", "flow", "accuracy", "accuracy_image", "images_per_s")
FIRST += ("mfu", "learning_rate", "step_ms", "goodput")
COLUMNS = 120 - len("00:00:00 ")  # that are left of a line


def step_line(step: int, num_steps: int, numbers: dict[str, float], minutes: float) -> str:
    """As many of a step's numbers as fit a line of the log, and the minutes that are left."""
    start, end = f"step {step}/{num_steps}", f" eta {minutes:.0f} min"
    others = [
        name for name in numbers if name not in FIRST and (name != "skipped" or numbers[name])
    ]
    for name in [name for name in FIRST if name in numbers] + others:
        item = f" {name} {numbers[name]:.4g}"
        if len(start) + len(item) + len(end) <= COLUMNS:
            start += item
    return start + end


class Meter:
    """The clock and the log of one run; `notes` are those of `clock`, from the checkpoint that the
    run resumes from.

    Goodput is the share of the time since the run's first start, pauses and lost steps included,
    that went into steps that still count.
    """

    def __init__(self, cfg: TrainConfig, workdir: AnyPath, step: int, notes: dict):
        self.cfg = cfg
        self.workdir, self.folder = workdir, workdir / "profile"
        self.writer = MetricWriter(workdir, step)
        self.began = notes.get("began", time.time())
        self.stepping = notes.get("stepping", 0.0)
        self.flops = None
        self.profiling = False
        self.update_ratios = jit(functools.partial(steps.update_ratios, cfg))
        self._start_interval(step)

    def _start_interval(self, step: int) -> None:
        self.logged, self.tick = step, time.perf_counter()
        self.metrics = []
        self.seconds = {"data": 0.0, "other": 0.0}

    def clock(self) -> dict[str, float]:
        """What a checkpoint keeps: when the run began (Unix time), and the seconds of the steps
        until now."""
        return {"began": self.began, "stepping": self.stepping + self._elapsed()}

    def _elapsed(self) -> float:
        """Seconds of the interval that went into steps, waiting for their data included."""
        return time.perf_counter() - self.tick - self.seconds["other"]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the body as "data" (waiting for the batch), or as "other" than
        stepping, when the steps so far are done."""
        if name == "other":
            jax.block_until_ready(self.metrics)
        before = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - before

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surrounds the dispatch of a step, counted from 1: marks it in profiles, and starts the
        profile that the config asks for."""
        if self.cfg.profile.steps and step == self.cfg.profile.start:
            # The profiler writes to a disk.
            self.traces = Path(tempfile.mkdtemp()) if paths.is_bucket(self.workdir) else self.folder
            jax.profiler.start_trace(str(self.traces))
            self.profiling = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def add(self, step: int, batch: dict, metrics: dict) -> None:
        """Takes a step's metrics; waits for the step `AHEAD` before it, and at the end of a profile
        for this one."""
        cfg, window = self.cfg, self.cfg.profile
        self.flops = self.flops or cfg.record.flops(cfg.blip3o(), cfg.section, batch)
        self.metrics.append(metrics)
        if len(self.metrics) > AHEAD:
            jax.block_until_ready(self.metrics[-1 - AHEAD])
        if self.profiling and step == min(window.start + window.steps - 1, cfg.num_steps):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.profiling = False
            if self.traces != self.folder:
                paths.copy_folder(self.traces, self.folder)
                shutil.rmtree(self.traces)
            log.info("Profile of steps %d to %d: %s", window.start, step, self.folder)

    def log(self, step: int, state: dict) -> None:
        """Writes the means since the last time, over the steps that were not skipped, and the size
        of the last update. Waits for the device.

        Raises InputError after `cfg.guard.max_skipped` skipped steps in a row.
        """
        rows = jax.device_get(self.metrics)
        elapsed, count = self._elapsed(), step - self.logged
        self.stepping += elapsed

        # The losses and what else the steps gave.
        good = [row for row in rows if row["skipped_in_a_row"] == 0] or rows[-1:]
        # Steps may differ in what they give.
        names = dict.fromkeys(name for row in good for name in row)
        numbers = {x: float(np.mean([row[x] for row in good if x in row])) for x in names}
        numbers |= {name: float(good[-1][name]) for name in LAST}
        numbers["skipped"] = float(rows[-1]["skipped"])
        del numbers["skipped_in_a_row"]
        ratios = jax.device_get(self.update_ratios(state))
        numbers |= {name: float(value) for name, value in ratios.items()}

        # Speed.
        numbers |= {
            "step_ms": 1e3 * elapsed / count,
            "data_wait_ms": 1e3 * self.seconds["data"] / count,
            "images_per_s": self.cfg.batch_size * count / elapsed,
            "goodput": self.stepping / max(time.time() - self.began, 1e-9),
        }
        peak = peak_flops(jax.devices()[0].device_kind)
        if self.flops and peak:
            numbers["mfu"] = self.flops * count / elapsed / (peak * jax.device_count())
        self.writer.write(step, numbers)
        minutes = elapsed / count * (self.cfg.num_steps - step) / 60
        log.info("%s", step_line(step, self.cfg.num_steps, numbers, minutes))

        # What was skipped.
        longest = max(int(row["skipped_in_a_row"]) for row in rows)
        if longest:
            sentence = "%d steps were skipped by step %d, up to %d in a row."
            log.warning(sentence, numbers["skipped"], step, longest)
        require(
            longest < self.cfg.guard.max_skipped,
            f"{longest} steps in a row until step {step} had a loss or gradient that is not "
            f"finite, or a spike; the newest checkpoint in {self.workdir} is without them. Lower "
            "the learning rate or look at the data, and start from it in a new workdir.",
        )
        self._start_interval(step)
