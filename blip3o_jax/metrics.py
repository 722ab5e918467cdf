"""Where numbers go: a JSONL file always, TensorBoard too when TensorFlow is installed (clu's writers need it)."""

import importlib.util
import json
import pathlib

import numpy as np


class MetricWriter:
    """Appends one JSON line per `write`; on process 0 of a run."""

    def __init__(self, workdir):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self.board = None
        if importlib.util.find_spec("tensorflow"):
            from clu.metric_writers import SummaryWriter

            self.board = SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars of one step; values are rounded to 6 significant digits in the file."""
        values = {name: float(f"{float(value):.6g}") for name, value in scalars.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            self.board.write_scalars(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 [H,W,3] picture as `name-STEP.png`, and on the board."""
        from PIL import Image

        Image.fromarray(image).save(self.path.parent / f"{name}-{step:06d}.png")
        if self.board:
            self.board.write_images(step, {name: image[None]})


def sheet(images: np.ndarray, columns: int = 8, margin: int = 4) -> np.ndarray:
    """uint8 [B,H,W,3] -> one picture, row by row, on white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = margin + (i // columns) * (height + margin), margin + (i % columns) * (width + margin)
        canvas[y : y + height, x : x + width] = image
    return canvas
