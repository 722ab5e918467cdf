"""WebDataset tars, read at random: a tar's headers are read once, in order, and its offsets stored
in NAME.tar.index beside it.

A record is the members that share a key, wherever they stand in the tar: KEY.jpg|jpeg|png|webp|...,
KEY.txt and perhaps KEY.json, as BLIP3o-Pretrain-* are laid out. A key is a member's name up to its
last dot, or up to the extension that the source names (`input.png`). Other members are counted.
"""

import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from blip3o_jax.data import records
from blip3o_jax.data.captions import captions_of
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.records import FileSource, Record, RecordError, locate, read_bytes
from blip3o_jax.errors import InputError, require
from blip3o_jax.paths import write_chunks
from blip3o_jax.resources import cache_folder

VERSION = 2
BLOCK = 512
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
PARTS = dict.fromkeys(IMAGES, "image") | {"txt": "text", "json": "json"}
MISSING, SEVERAL = -1, -2  # sizes of a part that a record lacks, and of one that it has twice
KINDS = 12  # of members that are not read, told apart
INDEXERS = 8  # tars whose headers are read at once, as reading waits for the disk

Fields = tuple[str, str]  # image_field and caption_field of a source, "" where it names none

log = logging.getLogger(__name__)


class TarSource(FileSource):
    """Records of all tars of a pattern, in the order of their names."""

    def __init__(self, spec: SourceConfig):
        self.fields = spec.image_field, spec.caption_field
        paths = records.expand(spec.path)
        with ThreadPoolExecutor(INDEXERS) as pool:
            indexes = list(pool.map(functools.partial(open_index, fields=self.fields), paths))
        self.indexes = [rows for rows, _ in indexes]
        super().__init__(paths, map(len, self.indexes))
        self.notes = _notes(paths, [notes for _, notes in indexes])
        for note in self.notes:
            log.warning("%s: %s.", spec.path, note)
        # Names that mean something else than a key and a part make no complete record.
        endings = dict.fromkeys(ending for _, notes in indexes for ending in notes["endings"])
        none = f"none of the {len(self)} records of {spec.path!r} has an image and a caption"
        ends = f"their members end in {', '.join([*endings][:6])}"
        how = "name two endings as image_field and caption_field of the source"
        usable = not len(self) or any(map(_any_complete, self.indexes))
        require(usable, f"data.sources: {none}; {ends}: {how}.")

    def name(self, file: int, row: int) -> str:
        return self.indexes[file][row]["key"].decode(errors="replace")

    def __getitem__(self, i: int) -> Record:
        tar, number = locate(self.ends, i)
        row = self.indexes[tar][number]
        # A caption is a member of its own, or a field of the record's json.
        by_json = bool(self.fields[1]) and row["text"][1] == MISSING
        parts = ("image", "json" if by_json else "text")
        names = (self.fields[0] or "image", "json" if by_json else self.fields[1] or "txt")
        for part, name in zip(parts, names, strict=True):
            if row[part][1] == SEVERAL:
                raise RecordError("several images in the tar; set image_field to an extension")
            if row[part][1] == MISSING:
                has_json = part == "text" and row["json"][1] != MISSING
                hint = "; set caption_field to a field of its json" if has_json else ""
                raise RecordError(f"no {name} in the tar{hint}")
        # Both from the tar.
        spans = [tuple(map(int, row[part])) for part in parts]
        contents = read_bytes(self.paths[tar], *spans)
        if any(len(data) < size for data, (_, size) in zip(contents, spans, strict=True)):
            raise RecordError("the tar has become shorter")
        image, caption = contents
        return Record(self.key(i), self._captions(caption, by_json), image)

    def _captions(self, written: bytes, by_json: bool) -> tuple[str, ...]:
        field = self.fields[1]
        try:
            text = json.loads(written)[field] if by_json else written.decode("utf-8-sig")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"json without {field!r}" if by_json else "txt that is not UTF-8"
            raise RecordError(reason) from error
        return captions_of(text, field or "txt")


def _any_complete(rows: np.ndarray) -> bool:
    """Whether a tar has a record with an image and what may hold its caption."""
    image, text, json_ = (rows[part][:, 1] != MISSING for part in ("image", "text", "json"))
    return bool((image & (text | json_)).any())


def _notes(paths: list[str], notes: list[dict]) -> list[str]:
    """What the headers of a source's tars say besides its records, as phrases."""
    dropped: dict[str, list] = {}
    for path, note in zip(paths, notes, strict=True):
        for what, (count, name) in note["dropped"].items():
            dropped.setdefault(what, [0, f"{os.path.basename(path)}: {name}"])[0] += count
    phrases = [
        f"ignored members, {what}: {count} (the first: {name})"
        for what, (count, name) in sorted(dropped.items())
    ]
    cut = [os.path.basename(path) for path, n in zip(paths, notes, strict=True) if n["no_end"]]
    if cut:
        kind = "tars without the blocks that end one, perhaps cut between two members"
        phrases.append(f"{kind}: {len(cut)} (the first: {cut[0]})")
    return phrases


def open_index(tar: str, fields: Fields = ("", "")) -> tuple[np.ndarray, dict]:
    """The offsets of a tar's records and notes, as `read_headers`, from its index file, or from the
    tar if the index is not of this state of it. InputError for a damaged tar."""
    version, places = _version(tar, fields), _index_files(tar, fields)
    for file in places:
        if (index := _load(file, version)) is not None:
            return index
    # Stored in the first place that can be written, in memory where none can.
    index = read_headers(tar, fields)
    for file in places:
        try:
            _store(file, version, *index)
            return _load(file, version) or index
        except OSError:
            continue
    log.warning("The index of %s cannot be stored; every run makes it again.", tar)
    return index


def read_headers(tar: str, fields: Fields = ("", "")) -> tuple[np.ndarray, dict]:
    """Reads a tar's headers in order -> (key and, of each part, (offset, size), size `MISSING` or
    `SEVERAL` where there is not one; notes).

    Notes are `dropped`, {what: (members, name of the first)}, `endings` of members that no record
    is made of, and `no_end`, whether the blocks that end a tar are missing.
    """
    # The members, and what follows the last one.
    members, end = _Members(fields), 0
    try:
        with records.open_binary(tar) as raw, tarfile.open(fileobj=raw, mode="r:") as headers:
            for member in headers:
                headers.members = []  # it would store them all
                size = 0
                if member.isfile():
                    members.add(member)
                    size = -(-member.size // BLOCK) * BLOCK
                elif not member.isdir():
                    members.drop("links and devices", member.name)
                end = member.offset_data + size
            raw.seek(end)
            beyond = raw.read(BLOCK)
            rest = iter(functools.partial(raw.read, 1 << 20), b"")
            more = not beyond.strip(b"\0") and any(chunk.strip(b"\0") for chunk in rest)
    except (tarfile.TarError, EOFError) as error:
        kind = f"truncated or not an uncompressed tar ({error})"
        raise InputError(f"{tar} is {kind}; copy or decompress it.") from error
    except OSError as error:
        raise InputError(f"{tar} cannot be read: {error.strerror or error}.") from error
    # tarfile takes a damaged header for the end
    damaged = beyond.strip(b"\0") or (end % BLOCK and members.rows)
    where = f"at byte {end}, after {len(members.rows)} records"
    require(not damaged, f"{tar} is damaged {where}; copy it again.")
    joined = f"{tar} goes on after its end at byte {end}, as joined tars do; split it there."
    require(not more, joined)
    rows, endings = members.finish()
    notes = {"dropped": members.dropped, "endings": endings, "no_end": not beyond}
    # One array of them.
    width = max((len(key) for key, _ in rows), default=1)
    parts = ("image", "text", "json")
    dtype = [("key", f"S{width}"), *((part, "<i8", 2) for part in parts)]
    lacking = (MISSING, MISSING)
    values = [(key, *(spans.get(part, lacking)[:2] for part in parts)) for key, spans in rows]
    return np.array(values, dtype), notes


class _Members:
    """A tar's members on their way into records: `rows` of (key, {part: (offset, size,
    extension)})."""

    def __init__(self, fields: Fields):
        self.fields = fields
        self.rows: list[tuple[bytes, dict]] = []
        self.dropped: dict[str, list] = {}
        self._latest: dict[bytes, dict] = {}

    def add(self, member: tarfile.TarInfo) -> None:
        """Puts a member into the latest record of its key, or into a new one where that has a
        member of this name already, as in tars that were appended to each other."""
        key, part, extension = self._split(member.name)
        if not key:
            self.drop(extension, member.name)
            return
        parts = self._latest.get(key)
        if parts is None or (part in parts and parts[part][2] == extension):
            parts = self._latest[key] = {}
            self.rows.append((key, parts))
        several = (SEVERAL, SEVERAL, extension)
        parts[part] = several if part in parts else (member.offset_data, member.size, extension)

    def drop(self, what: str, name: str) -> None:
        """Counts a member that is not read; kinds beyond `KINDS` together."""
        if len(self.dropped) >= KINDS and what not in self.dropped:
            what = "others"
        self.dropped.setdefault(what, [0, name])[0] += 1

    def finish(self) -> tuple[list, list[str]]:
        """The rows without those that are further parts of another, such as KEY.seg.png beside
        KEY.png and KEY.txt; and endings of members that are incomplete records."""
        rows, endings = [], {}
        for key, parts in self.rows:
            folder, slash, name = key.rpartition(b"/")
            pieces = name.split(b".")
            complete = "image" in parts and len(parts) > 1
            shorter = (folder + slash + b".".join(pieces[:n]) for n in range(1, len(pieces)))
            owner = next((k for k in shorter if k in self._latest), None)
            if complete or owner is None:
                rows.append((key, parts))
            for _, _, extension in () if complete else parts.values():
                after = b".".join([*pieces[1:], extension.encode()]).decode(errors="replace")
                endings.setdefault(after)
                if owner is not None:
                    rest = key[len(owner) + 1 :].decode(errors="replace")
                    self.drop(f"{rest}.{extension}", key.decode(errors="replace"))
        return rows, list(endings)[:6]

    def _split(self, name: str) -> tuple[bytes, str, str]:
        """A member's name -> (key, part, extension); key b"" for one that is not read."""
        folder, slash, last = name.rpartition("/")
        extension = last.rpartition(".")[2].lower()
        part = PARTS.get(extension, "")
        # An extension that the source names is the only one of its part.
        given = {"image": self.fields[0].lower(), "text": self.fields[1].lower()}
        named = [p for p, field in given.items() if field and last.lower().endswith(f".{field}")]
        if named:
            part = max(named, key=lambda p: len(given[p]))
            extension = given[part]
        elif given.get(part):
            part = ""
        base = last[: -len(extension) - 1]
        hidden = last.startswith(".")
        if hidden or not part or not base:
            ending = f".{extension}" if "." in last else "names without an extension"
            return b"", "", "hidden files" if hidden else ending
        # names may be of other encodings than UTF-8
        key = f"{folder}{slash}{base}".lstrip("/")
        return key.encode(errors="surrogateescape"), part, extension


def _version(tar: str, fields: Fields) -> dict:
    """The state of a tar and how its names are read, which its index must have been made from."""
    size, mtime = records.state(tar)
    return {"version": VERSION, "size": size, "mtime": mtime, "fields": list(fields)}


def _index_files(tar: str, fields: Fields) -> list[pathlib.Path]:
    """The file beside the tar, and the one in the user's cache for where that is not writable."""
    remote = "://" in tar
    suffix = "".join(f".{re.sub(r'[^a-zA-Z0-9._-]', '_', field)}" for field in fields if field)
    whole = f"{tar if remote else os.path.abspath(tar)}{suffix}"
    name = hashlib.sha256(whole.encode()).hexdigest()[:32]
    cached = cache_folder() / "tars" / f"{name}.index"
    return [cached] if remote else [pathlib.Path(f"{tar}{suffix}.index"), cached]


def _load(file: pathlib.Path, version: dict) -> tuple[np.ndarray, dict] | None:
    """The index in a file, a line of JSON with its notes and the array; None when it is missing or
    of another state of the tar."""
    try:
        with file.open("rb") as stream:
            head, offset = json.loads(stream.readline()), stream.tell()
        count = head["records"]
        dtype = np.dtype([(name, kind, *map(tuple, shape)) for name, kind, *shape in head["dtype"]])
        whole = file.stat().st_size == offset + count * dtype.itemsize
        if head["version_of"] != version or not whole:
            return None
        # an empty file cannot be mapped
        mapped = np.memmap(file, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)
        return mapped, head["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(file: pathlib.Path, version: dict, index: np.ndarray, notes: dict) -> None:
    """Writes the index atomically, also when other processes write it at the same time."""
    head = {"version_of": version, "records": len(index), "dtype": index.dtype.descr}
    head["notes"] = notes
    write_chunks(file, [json.dumps(head).encode(), b"\n", index.tobytes()])
