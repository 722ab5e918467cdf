"""Local files and objects in buckets through one function: `path(name)` for a local name, gs:// or
s3://.

Local paths are pathlib's, those in buckets etils.epath's, which have the same methods but for
sizes, recursion and exclusive creation: these are here. A local file appears whole because it is
written beside its place and renamed; an object appears whole with the request that writes it, so
nothing is renamed in a bucket. A folder in a bucket is complete when its marker is there, an object
that its writer adds last (docs/pods.md). Retries are those of the clients, gcsfs and s3fs.
"""

import contextlib
import importlib.util
import os
import shutil
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from blip3o_jax.errors import InputError, first_line, require

if TYPE_CHECKING:
    from etils import epath

AnyPath: TypeAlias = "Path | epath.Path"

NEW = ".new-"  # how the name of a file begins that is being written
CLIENTS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # scheme -> extra, module that it brings
# Whose exceptions tell of a server, not of a mistake in a program.
CLIENT_MODULES = ("gcsfs", "s3fs", "fsspec", "aiohttp", "botocore", "aiobotocore", "google")
CLIENT_MODULES += ("requests", "urllib3")


def is_bucket(name: str | os.PathLike) -> bool:
    """Whether the name is of an object or folder in a bucket."""
    return os.fspath(name).startswith(tuple(f"{scheme}://" for scheme in CLIENTS))


def path(name: str | os.PathLike) -> AnyPath:
    """The path of that name; InputError for an unknown scheme, a missing extra or no bucket."""
    text = os.fspath(name)
    scheme, separator, rest = text.partition("://")
    if not separator:
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
    return _bucket_path(text)


def _bucket_path(text: str) -> AnyPath:
    # TensorFlow, where it is installed, would be taken for buckets, and cannot read S3.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils import epath
    from fsspec.config import conf

    # Other processes, and TensorStore, write to the same folders.
    for protocol in ("gcs", "s3"):
        conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    return epath.Path(text)


def _filesystem(file: AnyPath) -> tuple[Any, str]:
    """The client of a bucket, and its own name of the path."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.fspath(file))


@contextlib.contextmanager
def remote_errors(what: str) -> Iterator[None]:
    """Puts an InputError, `what` and the reason, in place of a file's or a bucket's errors: what is
    missing, forbidden, or does not answer after the client's retries."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        is_clients = type(error).__module__.partition(".")[0] in CLIENT_MODULES
        if not is_clients and not isinstance(error, OSError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{what}: {reason[:300].rstrip('.')}.") from error


def write_chunks(file: AnyPath, chunks: Iterable[bytes], beside: "AnyPath | None" = None) -> None:
    """Writes a file that is whole, old or new, also where the process is killed, and makes its
    folder.

    A local one begins in the folder `beside`, by default its own, of the same disk, under a name
    that no other process on any host has, and which `is_left_over` knows.
    """
    new_file = file
    if not is_bucket(file):
        new_file = (beside or file.parent) / f"{NEW}{uuid.uuid4().hex}"
    try:
        for folder in (new_file.parent, file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with new_file.open("wb") as stream:
            stream.writelines(chunks)
        if new_file != file:
            new_file.replace(file)
    finally:
        if new_file != file:
            new_file.unlink(missing_ok=True)


def is_left_over(file: AnyPath) -> bool:
    """Whether this is what a killed `write_chunks` left."""
    return file.name.startswith(NEW)


def write_bytes(file: AnyPath, data: bytes) -> None:
    """As `write_chunks`, all at once."""
    write_chunks(file, [data])


def write_text(file: AnyPath, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(file, text.encode())


def absolute(folder: AnyPath) -> AnyPath:
    """The same path, of a local one from the root; links are followed by neither."""
    return folder if is_bucket(folder) else folder.absolute()


def size(file: AnyPath) -> int:
    """Bytes of a file."""
    stat = file.stat()
    return stat.length if is_bucket(file) else stat.st_size


def state(file: AnyPath) -> tuple[int, str]:
    """(bytes, what changes with them: a local file's time, an object's ETag)."""
    if not is_bucket(file):
        stat = file.stat()
        return stat.st_size, str(stat.st_mtime_ns)
    filesystem, name = _filesystem(file)
    info = filesystem.info(name)
    return info["size"], str(info.get("ETag") or info.get("etag"))


def files_below(folder: AnyPath) -> list[AnyPath]:
    """All files in a folder and its folders, sorted; none for a folder that is not there."""
    if not is_bucket(folder):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    filesystem, name = _filesystem(folder)
    return sorted(path(filesystem.unstrip_protocol(file)) for file in filesystem.find(name))


def clear_folder(folder: AnyPath) -> None:
    """Removes all that is in a folder, which may be a link; its marker must go first."""
    if is_bucket(folder):
        folder.rmtree()
        return
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
