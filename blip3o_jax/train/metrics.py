"""Where numbers go: a JSONL file always, TensorBoard's event files too where `tensorboard` is
installed (extra [tensorboard]).

TensorBoard's own writer is used because clu's SummaryWriter is TensorFlow's.
"""

import contextlib
import io
import json
import pathlib
import time
from collections.abc import Iterator

import numpy as np

from blip3o_jax.errors import InputError
from blip3o_jax.parallel.processes import is_process_zero


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}; make room and start again."
        ) from error


class MetricWriter:
    """Appends one JSON line per `write`, on process 0 of a run that goes on from `step`: lines of
    later steps, which are done again, go. InputError when the workdir cannot be written."""

    def __init__(self, workdir, step: int = 0):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self.silent = not is_process_zero()
        self.board = None
        if self.silent:
            return
        if self.path.exists():
            self._forget(step)
        with contextlib.suppress(ImportError), _writing(self.path.with_name("tensorboard")):
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self.board = EventFileWriter(str(self.path.parent / "tensorboard"))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars of one step; values are rounded to 8 significant digits in the file, where null
        is what is not finite."""
        if self.silent:
            return
        values = {name: float(f"{float(value):.8g}") for name, value in scalars.items()}
        line = json.dumps(
            {
                "step": step,
                **{name: value if np.isfinite(value) else None for name, value in values.items()},
            }
        )
        with _writing(self.path), self.path.open("a") as file:
            file.write(line + "\n")
            self._show(
                step, [{"tag": name, "simple_value": value} for name, value in values.items()]
            )

    def write_text(self, name: str, text: str) -> None:
        """A file of the workdir, anew."""
        if self.silent:
            return
        path = self.path.with_name(name)
        with _writing(path):
            path.write_text(text + "\n")

    def _forget(self, step: int) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # its writer was killed
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        new = self.path.with_suffix(".new")
        with _writing(new):
            new.write_text("".join(kept))
            new.replace(self.path)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 [H,W,3] picture as `name-STEP.png`, and on the board."""
        if self.silent:
            return
        from PIL import Image

        file, (height, width, _) = io.BytesIO(), image.shape
        Image.fromarray(image).save(file, "png")
        picture = self.path.with_name(f"{name}-{step:06d}.png")
        with _writing(picture):
            picture.write_bytes(file.getvalue())
            image = {
                "height": height,
                "width": width,
                "colorspace": 3,
                "encoded_image_string": file.getvalue(),
            }
            self._show(step, [{"tag": name, "image": image}])

    def _show(self, step: int, values: list[dict]) -> None:
        if self.board is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.board.add_event(
            Event(
                step=step,
                wall_time=time.time(),
                summary=Summary(value=[Summary.Value(**v) for v in values]),
            )
        )
        self.board.flush()
