"""Objects in buckets, gs:// and s3://, with the methods and the errors of local files.

What a bucket's client raises (gcsfs, s3fs, through fsspec) arrives as the OSError that a disk would
give, after the client's own retries. `blip3o_jax.paths` gives a path of either kind.
"""

import contextlib
import datetime
import errno
import io
import itertools
import logging
import os
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from blip3o_jax.errors import first_line

SCHEMES = ("gs", "s3")
READ_AHEAD = 8 << 20  # bytes of an object that a reader from its beginning fetches at once
NUMBERS = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST}
NUMBERS |= {PermissionError: errno.EACCES}
# How often TensorStore asks a bucket again: for half a minute, as gcsfs does.
RETRIES = {
    f"{kind}_request_retries": {"max_retries": 5, "initial_delay": "1s", "max_delay": "32s"}
    for kind in ("gcs", "s3")
}


def is_clients(error: Exception) -> bool:
    """Whether an exception is a bucket's client's, which tells of a server, not of a mistake."""
    clients = {"gcsfs", "s3fs", "fsspec", "aiohttp", "botocore", "aiobotocore", "google"}
    return type(error).__module__.partition(".")[0] in clients | {"requests", "urllib3"}


@contextlib.contextmanager
def disk_errors(file: PurePosixPath, is_written: bool) -> Iterator[None]:
    """Puts the OSError that a disk would raise in place of what a bucket's client raises."""
    try:
        yield
    except Exception as error:
        is_named = isinstance(error, OSError) and error.filename  # of this or another file
        if is_named or not (is_clients(error) or isinstance(error, OSError | TimeoutError)):
            raise
        number = NUMBERS.get(type(error)) or getattr(error, "errno", None) or errno.EIO
        reason = (getattr(error, "strerror", None) or first_line(error))[:300].rstrip(".")
        # Clients repeat the name alone. Whatever the object, where one is written only its bucket
        # can be missing.
        if isinstance(error, FileNotFoundError | FileExistsError):
            is_missing = is_written and number == errno.ENOENT
            reason = "there is no such bucket" if is_missing else os.strerror(number)
        raise OSError(number, reason, str(file)) from error


def _filesystem(protocol: str) -> Any:
    """fsspec's filesystem, for us and for those who ask it later, as Orbax does through etils."""
    from fsspec import filesystem
    from fsspec.config import conf

    # Other processes, and TensorStore, write to the same folders, so none may be remembered.
    conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    # TensorFlow, where it is installed, would be taken by etils, and cannot read S3.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # What it logs with a traceback is raised again, and arrives as one sentence.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return filesystem(protocol)


class BucketPath(PurePosixPath):
    """An object in a bucket, or a folder: what the names of several objects begin with.

    Without mkdir's effect, since a bucket holds no folders; written whole, by `write_bytes` or
    `write_chunks`, never through `open`. Not etils.epath 1.15 or universal_pathlib 0.3.10, which
    stand on the same clients, because both keep half of an upload that an exception ends, take
    `run[1]` for a pattern and remove `run1`, and replace an object of gs:// that is only to be
    created if there is none, or know no such mode.
    """

    def __str__(self) -> str:
        return re.sub(r"^(gs|s3):/(?!/)", r"\1://", super().__str__())

    def __fspath__(self) -> str:
        return str(self)

    @property
    def _client(self) -> Any:
        """fsspec's filesystem of this bucket."""
        return _filesystem("gcs" if self.parts[0] == "gs:" else "s3")

    @property
    def _name(self) -> str:
        """BUCKET/OBJECT, as clients name it."""
        return "/".join(self.parts[1:])

    def ask(self, method: str, *args, **options) -> Any:
        """What a method of the client gives for this object; OSError as a disk's."""
        with disk_errors(self, is_written=method in ("pipe_file", "open")):
            return getattr(self._client, method)(self._name, *args, **options)

    def _info(self) -> dict:
        """What the bucket says of the object, {} where there is none."""
        try:
            return self.ask("info")
        except FileNotFoundError:
            return {}

    def exists(self) -> bool:
        return bool(self._info())

    def is_file(self) -> bool:
        return self._info().get("type") == "file"

    def is_dir(self) -> bool:
        return self._info().get("type") == "directory"

    def stat(self) -> types.SimpleNamespace:
        """Its `st_size` and `st_mtime_ns`, as os.stat names them, and the `version`, which every
        write changes."""
        info = self.ask("info")
        time = info.get("mtime") or info.get("LastModified") or datetime.datetime.fromtimestamp(0)
        version = info.get("generation") or f"{info.get('ETag')} {time}"
        nanoseconds = int(time.timestamp() * 1e6) * 1000
        return types.SimpleNamespace(
            st_size=info["size"], st_mtime_ns=nanoseconds, version=str(version)
        )

    def iterdir(self) -> Iterator["BucketPath"]:
        inner = (name.rstrip("/") for name in self.ask("ls", detail=False))
        return iter([self / PurePosixPath(name).name for name in inner if name != self._name])

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """As pathlib's; `**` stands for files of all folders."""
        first, _, rest = pattern.partition("/")
        if first == "**":
            return self.rglob(rest or "*")
        try:
            children = self.iterdir()
        except FileNotFoundError:
            children = iter(())
        matching = [child for child in children if child.match(first)]
        inner = (child.glob(rest) for child in matching)
        return itertools.chain.from_iterable(inner) if rest else iter(matching)

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """The files alone of all folders below this one; none where there is no folder."""
        files = (type(self)(f"{self.parts[0]}//{name}") for name in self.ask("find"))
        return iter([file for file in files if file.match(pattern)])

    def open(self, mode: str) -> io.BufferedReader:
        """The object for reading bytes, mode "rb"; fetched as it is read, much at once."""
        if mode != "rb":
            raise ValueError(f"{self} is read as bytes; `write_bytes` and `write_chunks` write it.")
        return io.BufferedReader(_Reader(self), READ_AHEAD)

    def read_bytes(self) -> bytes:
        return self.ask("cat_file")

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, stop: int) -> bytes:
        """As `paths.read_ranges` of one place."""
        return self.ask("cat_file", start=start, end=stop) if start < stop else b""

    def write_bytes(self, data: bytes) -> None:
        self.ask("pipe_file", data)

    def write_chunks(self, chunks: Iterable[bytes]) -> None:
        """As `paths.write_chunks`."""
        with disk_errors(self, is_written=True):
            stream = self.ask("open", "wb")
            try:
                for chunk in chunks:
                    stream.write(chunk)
                stream.close()
            except BaseException:
                # The client would end the upload with what it has.
                stream.closed = True
                stream.discard()
                raise

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        # Clients differ in what they say of an object that is not there.
        try:
            if missing_ok or self.ask("info"):
                self.ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object."""

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self) -> "BucketPath":
        return self


class _Reader(io.RawIOBase):
    """An object's bytes, fetched as they are asked for."""

    def __init__(self, file: BucketPath):
        self.file, self.size, self.place = file, file.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, offset + (0, self.place, self.size)[whence])
        return self.place

    def readinto(self, buffer: Any) -> int:
        data = self.file.read_range(self.place, min(self.place + len(buffer), self.size))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def readall(self) -> bytes:
        """The rest at once; io's own asks for it piece by piece."""
        data = self.file.read_range(self.place, self.size)
        self.place += len(data)
        return data


def kvstore(place: str | os.PathLike) -> dict[str, Any]:
    """TensorStore's name of a file or folder."""
    text = os.fspath(place)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return {"driver": "file", "path": text}
    bucket, _, name = rest.partition("/")
    # The server, where it is not the cloud's own, by the variables that gcsfs and s3fs read.
    if scheme == "gs":
        if server := os.environ.get("STORAGE_EMULATOR_HOST"):
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", server)
        return {"driver": "gcs", "bucket": bucket, "path": name}
    servers = (os.environ.get(f"AWS_ENDPOINT_URL{suffix}") for suffix in ("_S3", ""))
    server = next(filter(None, servers), None)
    spec = {"driver": "s3", "bucket": bucket, "path": name}
    spec |= {"endpoint": server} if server else {}
    # Where it looks for credentials elsewhere, it complains of each place without any.
    named = "AWS_ACCESS_KEY_ID" in os.environ
    return spec | ({"aws_credentials": {"type": "environment"}} if named else {})
