"""Where numbers go: always a JSONL file, also TensorBoard's event files where `tensorboard` is
installed (extra [tensorboard]) and the workdir is on a disk.

TensorBoard's own writer is used because clu's SummaryWriter needs TensorFlow; it cannot write to a
bucket.
"""

import contextlib
import io
import json
import time
from collections.abc import Iterator

import numpy as np

from blip3o_jax import paths
from blip3o_jax.errors import InputError
from blip3o_jax.parallel.processes import is_process_zero
from blip3o_jax.paths import AnyPath


@contextlib.contextmanager
def _writing(path: AnyPath) -> Iterator[None]:
    """Turns what the disk refuses into an InputError."""
    try:
        yield
    except OSError as error:
        room = "" if paths.is_bucket(path) else "; make room and start again"
        raise InputError(f"{path} cannot be written: {error.strerror}{room}.") from error


class MetricWriter:
    """Appends one JSON line per `write`, on process 0 of a run that resumes from `step`; lines of
    later steps, which are repeated, are removed. InputError when the workdir cannot be written."""

    def __init__(self, workdir: str | AnyPath, step: int = 0):
        self.path = paths.path(workdir) / "metrics.jsonl"
        self.silent = not is_process_zero()
        self.board = None
        if self.silent:
            return
        if self.path.exists():
            self._forget(step)
        if paths.is_bucket(self.path):
            return
        with contextlib.suppress(ImportError), _writing(self.path.with_name("tensorboard")):
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self.board = EventFileWriter(str(self.path.parent / "tensorboard"))
            # What earlier files have of the steps from here on is not shown.
            self._add(step + 1, session_log={"status": 1})  # START

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of a step, rounded to 8 significant digits; in the file, null is what
        is not finite."""
        if self.silent:
            return
        values = {name: float(f"{float(value):.8g}") for name, value in scalars.items()}
        finite = {name: x if np.isfinite(x) else None for name, x in values.items()}
        with _writing(self.path):
            paths.append_text(self.path, json.dumps({"step": step, **finite}) + "\n")
            self._show(step, [{"tag": name, "simple_value": x} for name, x in values.items()])

    def write_text(self, name: str, text: str) -> None:
        """Writes or replaces a file of the workdir."""
        if self.silent:
            return
        path = self.path.with_name(name)
        with _writing(path):
            paths.write_text(path, text + "\n")

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 [H,W,3] image as `name-STEP.png`, and to the board."""
        if self.silent:
            return
        from PIL import Image

        path = self.path.with_name(f"{name}-{step:06d}.png")
        height, width, _ = image.shape
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "png")
        shown = {"height": height, "width": width, "colorspace": 3}
        shown["encoded_image_string"] = encoded.getvalue()
        with _writing(path):
            paths.write_bytes(path, encoded.getvalue())
            self._show(step, [{"tag": name, "image": shown}])

    def _forget(self, step: int) -> None:
        lines, kept = self.path.read_bytes().splitlines(keepends=True), []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # its writer was killed
        for line in lines:
            with contextlib.suppress(ValueError):  # of a line that a crash has spoilt
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        with _writing(self.path):
            paths.write_bytes(self.path, b"".join(kept))

    def _show(self, step: int, values: list[dict]) -> None:
        if self.board is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, summary=Summary(value=[Summary.Value(**value) for value in values]))

    def _add(self, step: int, **content) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.board.add_event(Event(step=step, wall_time=time.time(), **content))
        self.board.flush()
