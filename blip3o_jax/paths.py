"""Local files and objects in buckets through one function: `path(name)` for a local name, gs:// or
s3://. What the two do not share is here and in buckets.py, and nowhere else.

A local file appears whole because it is written beside its place and renamed; an object appears
whole with the request that ends its upload, so nothing is renamed in a bucket. A folder there is
complete when its marker is there, an object that its writer adds last, and that is removed first
when the folder is deleted (docs/pods.md).
"""

import contextlib
import importlib.util
import os
import shutil
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from blip3o_jax.buckets import READ_AHEAD, BucketPath, is_clients
from blip3o_jax.errors import InputError, first_line, require

NEW = ".new-"  # how the name of a file begins that is being written
CLIENTS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # scheme -> extra, module that it brings
REMOVERS = 16  # objects that are removed at once
UNFINISHED = "unfinished.txt"  # first and while a folder is copied into a bucket


def is_bucket(name: str | os.PathLike) -> bool:
    """Whether the name is of an object or folder in a bucket."""
    return os.fspath(name).startswith(tuple(f"{scheme}://" for scheme in CLIENTS))


def path(name: str | os.PathLike) -> "AnyPath":
    """The path of that name; InputError for an unknown scheme, a missing extra or no bucket."""
    if isinstance(name, BucketPath):
        return name
    text = os.fspath(name)
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, separator, rest = text.partition(":")
        slash = f"{text} is no path; write {scheme}://{rest.lstrip('/')}."
        require(not separator or scheme not in CLIENTS, slash)
        return Path(text)
    if scheme == "file":
        require(rest.startswith("/"), f"{text} names another host; write file:///folder/file.")
        return Path(urllib.parse.unquote(rest))
    known = f"{text}: paths are local, or begin with gs:// or s3://, not with {scheme}://."
    require(scheme in CLIENTS, known)
    require(rest.strip("/") == rest.rstrip("/") != "", f"{text} names no bucket.")
    extra, module = CLIENTS[scheme]
    install = f"install it with: pip install 'blip3o-jax[{extra}]'"
    is_there = importlib.util.find_spec(module) is not None
    require(is_there, f"{text} needs the extra [{extra}]; {install}")
    return BucketPath(text)


AnyPath: TypeAlias = Path | BucketPath


@contextlib.contextmanager
def remote_errors(what: str) -> Iterator[None]:
    """Puts an InputError, `what` and the reason, in place of a file's or a bucket's errors, also
    where a library asks the bucket."""
    try:
        yield
    except Exception as error:
        if not (is_clients(error) or isinstance(error, OSError)):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{what}: {reason[:300].rstrip('.')}.") from error


def read_ranges(file: AnyPath, places: Iterable[tuple[int, int]]) -> list[bytes]:
    """The bytes of a file at each (start, stop), fewer where it ends before; a start is before the
    end."""
    if is_bucket(file):
        return [file.read_range(*place) for place in places]
    contents = []
    with file.open("rb") as stream:
        for start, stop in places:
            stream.seek(start)
            contents.append(stream.read(stop - start))
    return contents


def read_range(file: AnyPath, start: int, stop: int) -> bytes:
    """The same of one place."""
    return read_ranges(file, [(start, stop)])[0]


def read_into(file: AnyPath, start: int, buffer: memoryview) -> int:
    """As `read_range`, into a buffer, as much as fits; returns how much that was."""
    if is_bucket(file):
        data = read_range(file, start, start + len(buffer))
        buffer[: len(data)] = data
        return len(data)
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.readinto(buffer)


def write_chunks(file: AnyPath, chunks: Iterable[bytes], beside: "AnyPath | None" = None) -> None:
    """Writes a file that is whole, old or new, also where the process is killed, and makes its
    folder.

    A local one begins in the folder `beside`, by default its own, of the same disk, under a name
    that no other process on any host has, and which `is_left_over` knows.
    """
    if is_bucket(file):
        file.write_chunks(chunks)
        return
    new_file = (beside or file.parent) / f"{NEW}{uuid.uuid4().hex}"
    try:
        for folder in (new_file.parent, file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with new_file.open("wb") as stream:
            stream.writelines(chunks)
        new_file.replace(file)
    finally:
        new_file.unlink(missing_ok=True)


def is_left_over(file: AnyPath) -> bool:
    """Whether this is what a killed `write_chunks` left."""
    return file.name.startswith(NEW)


def write_bytes(file: AnyPath, data: bytes) -> None:
    """As `write_chunks`, all at once."""
    if is_bucket(file):
        file.write_bytes(data)
    else:
        write_chunks(file, [data])


def write_text(file: AnyPath, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(file, text.encode())


def create(file: AnyPath, data: bytes) -> bool:
    """Writes a file unless there is one; whether it did. Of several processes one does."""
    try:
        if is_bucket(file):
            file.ask("pipe_file", data, mode="create")
        else:
            with file.open("xb") as stream:
                stream.write(data)
        return True
    except FileExistsError:
        return False


def touch(file: AnyPath) -> None:
    """Changes the state of a file, not its bytes."""
    if is_bucket(file):
        file.write_bytes(file.read_bytes())
    else:
        os.utime(file)


def append_text(file: AnyPath, text: str) -> None:
    """Adds to the end of a file; an object, which has no end, is written again with it."""
    if is_bucket(file):
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(before + text.encode())
        return
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)


def join(folder: AnyPath, name: str) -> AnyPath:
    """The path of a name that stands in a file of `folder`: beside it, or somewhere else."""
    return path(name) if "://" in name or name.startswith("/") else folder / name


def size(file: AnyPath) -> int:
    """Bytes of a file."""
    return file.stat().st_size


def state(file: AnyPath) -> tuple[int, str]:
    """(bytes, what every write changes: a local file's time, an object's version)."""
    stat = file.stat()
    return stat.st_size, stat.version if is_bucket(file) else str(stat.st_mtime_ns)


def files_below(folder: AnyPath) -> list[AnyPath]:
    """All files in a folder and its folders, sorted; none for a folder that is not there."""
    return sorted(file for file in folder.rglob("*") if is_bucket(file) or file.is_file())


def remove_folder(folder: AnyPath, marker: str = "") -> None:
    """Removes a folder with all in it, if it is there, beginning with its marker."""
    if marker:
        (folder / marker).unlink(missing_ok=True)
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    # One by one, by name: clients take a folder for a pattern, and by run[1] would remove run1.
    with ThreadPoolExecutor(REMOVERS) as pool:
        for _ in pool.map(lambda file: file.unlink(missing_ok=True), files_below(folder)):
            pass


def clear_folder(folder: AnyPath, marker: str) -> None:
    """Removes all that is in a folder, which may be a link; the marker last, so that who is killed
    here can go on."""
    with ThreadPoolExecutor(REMOVERS) as pool:
        others = (file for file in files_below(folder) if file != folder / marker)
        for _ in pool.map(lambda file: file.unlink(missing_ok=True), others):
            pass
    (folder / marker).unlink()
    if is_bucket(folder):
        return
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copies a file, which appears whole."""
    with source.open("rb") as stream:
        write_chunks(target, iter(lambda: stream.read(READ_AHEAD), b""))


def move_folder(source: AnyPath, target: AnyPath, marker: str) -> None:
    """Gives a folder another name; in a bucket, its objects."""
    if is_bucket(source):
        copy_folder(source, target, marker)
        remove_folder(source, marker)
    else:
        source.rename(target)


def copy_folder(source: AnyPath, target: AnyPath, marker: str = "") -> None:
    """Copies all files of a folder. With a marker, that comes last, and until then the copy
    `is_unfinished`."""
    if marker:
        write_text(target / UNFINISHED, "Its writer had not come to the end.\n")
    files = sorted(files_below(source), key=lambda file: file == source / marker)
    for file in files:
        copy = target / file.relative_to(source).as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, copy)
    if marker:
        (target / UNFINISHED).unlink()


def is_unfinished(folder: AnyPath) -> bool:
    """Whether a folder in a bucket is being written, or its writer was killed."""
    return is_bucket(folder) and (folder / UNFINISHED).is_file()
