"""A folder of pictures with their captions beside them, read at random."""

import glob
import itertools
import os

from blip3o_jax.data import records
from blip3o_jax.data.captions import captions_of
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import Record, RecordError
from blip3o_jax.data.tars import IMAGES
from blip3o_jax.errors import require


def list_folder(spec: SourceConfig) -> tuple[dict[str, str], list[str]]:
    """({picture: its caption's file, whether that exists or not}, other files) of a folder and
    those below it, by their paths in order; hidden files are left out."""
    folder, caption = spec.path, f".{spec.caption_field or 'txt'}"
    remote = "is in a bucket; a folder is read from a disk: copy it, or pack it into tars"
    require("://" not in folder, f"data.sources: {folder!r} {remote}.")
    require(os.path.isdir(folder), f"data.sources: {folder!r} is not a folder of pictures.")
    files = sorted(glob.glob("**/*", root_dir=folder, recursive=True))
    files = [path for path in files if os.path.isfile(os.path.join(folder, path))]
    # An extension that the source names is the only one of pictures.
    names = [spec.image_field.lower()] if spec.image_field else IMAGES
    pairs = {}
    for path, name in itertools.product(files, names):
        if path.lower().endswith(f".{name}"):
            pairs[path] = path[: -len(name) - 1] + caption
    return pairs, sorted(set(files) - pairs.keys() - set(pairs.values()))


class FolderSource:
    """Pictures in the order of their paths; the caption of NAME.jpg is in NAME.txt."""

    blocks = None

    def __init__(self, spec: SourceConfig):
        self.folder = spec.path
        pairs, others = list_folder(spec)
        self.pairs = list(pairs.items())
        self.notes = [f"ignored files: {len(others)} (the first: {path})" for path in others[:1]]

    def __len__(self) -> int:
        return len(self.pairs)

    def key(self, i: int) -> str:
        """The picture's path in the folder."""
        return self.pairs[i][0]

    def __getitem__(self, i: int) -> Record:
        paths = (os.path.join(self.folder, path) for path in self.pairs[i])
        image, written = (records.read_bytes(path, (0, -1))[0] for path in paths)
        try:
            caption = written.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(f"{self.pairs[i][1]} is not UTF-8") from error
        return Record(self.key(i), captions_of(caption, self.pairs[i][1]), image)
