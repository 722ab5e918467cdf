"""Files and batches of a server, in a folder, so that they outlive the process.

FOLDER/files/ID, ID.json      a file and what is said of it
FOLDER/batches/ID.json        a batch
FOLDER/batches/ID.output.jsonl, ID.errors.jsonl   its results so far, a line for each of the batch's
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import uuid
from pathlib import Path

from blip3o_jax import paths
from blip3o_jax.errors import InputError
from blip3o_jax.files import read_json
from blip3o_jax.serve.answers import Refusal

log = logging.getLogger(__name__)
PURPOSES = ("batch", "user_data", "vision")
OUTPUT = "batch_output"
CHOICES = {"purpose": (*PURPOSES, OUTPUT), "order": ("asc", "desc")}  # of a list of files
MOST_METADATA = 16  # texts of a batch
KINDS = {"files": "file", "batches": "batch"}
RESULTS = ("output", "errors")


class Store:
    """The files and batches of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        for kind in KINDS:
            (folder / kind).mkdir(parents=True, exist_ok=True)

    def new_id(self, kind: str) -> str:
        """An id that no other object has; later ones sort behind earlier ones."""
        dash = "-" if kind == "files" else "_"
        return f"{KINDS[kind]}{dash}{time.time_ns():019d}{uuid.uuid4().hex[:8]}"

    def read(self, kind: str, id_: str) -> dict:
        """What is said of a file or batch; a Refusal if there is none of this id."""
        path = self._path(kind, id_, ".json")
        if path is None or not path.is_file():
            raise Refusal(404, f"There is no {KINDS[kind]} {id_!r}.", param="id")
        return read_json(path)

    def write(self, kind: str, fields: dict) -> None:
        """Says it, whole or not at all."""
        paths.write_text(self._path(kind, fields["id"], ".json"), json.dumps(fields))

    def list(self, kind: str) -> list[dict]:
        """All of a kind, the newest first; what is damaged is named in the log and left out."""
        rows = []
        for path in sorted((self.folder / kind).glob(f"{KINDS[kind]}*.json"), reverse=True):
            try:
                rows.append(read_json(path))
            except InputError as error:
                log.error("Left out: %s", error)
        return rows

    def add_file(self, data: bytes | Path, filename: str, purpose: str) -> dict:
        """Keeps bytes, or a file that is moved here, and says what they are."""
        id_ = self.new_id("files")
        path = self._path("files", id_)
        if isinstance(data, bytes):
            paths.write_bytes(path, data)
        else:
            data.replace(path)
        size = path.stat().st_size
        fields = {"id": id_, "object": "file", "bytes": size, "created_at": int(time.time())}
        fields |= {"filename": filename, "purpose": purpose, "status": "processed"}
        self.write("files", fields)
        return fields

    def file(self, id_: str) -> Path:
        """Where the bytes of a file are; a Refusal if there is none."""
        self.read("files", id_)
        return self._path("files", id_)

    def delete_file(self, id_: str) -> None:
        """A file that is there."""
        # What says that it is there goes first.
        path = self.file(id_)
        path.with_name(f"{id_}.json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def results(self, id_: str, kind: str) -> Path:
        """Where the results of a batch are until it ends."""
        return self.folder / "batches" / f"{id_}.{kind}.jsonl"

    def done(self, id_: str) -> dict[str, int]:
        """The HTTP status of the lines of a batch that are done, by custom_id; what a process that
        was killed left half written is cut off."""
        statuses = {}
        for kind in RESULTS:
            path = self.results(id_, kind)
            if not path.is_file():
                continue
            # A line ends with its newline, which is written last.
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            os.truncate(path, len(whole))
            for line in whole.splitlines():
                row = json.loads(line)
                statuses[row["custom_id"]] = row["response"]["status_code"]
        return statuses

    def _path(self, kind: str, id_: str, suffix: str = "") -> Path | None:
        """Of an id as `new_id` makes them, which is a name and never a path."""
        is_id = re.fullmatch(rf"{KINDS[kind]}[-_][0-9a-f]{{27}}", id_)
        return self.folder / kind / f"{id_}{suffix}" if is_id else None
