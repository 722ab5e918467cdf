"""Results on disk: a folder appears whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from blip3o_jax.errors import InputError


@contextlib.contextmanager
def new_folder(destination: str, marker: str, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A temporary folder beside `destination` that takes its name when the block ends well and is
    removed when it does not.

    An existing destination is refused, unless it is empty, or `overwrite` is set and it holds
    `marker`, the file by which an earlier result is known: a folder of something else is never
    replaced.
    """
    target = pathlib.Path(destination)
    if target.exists() and not target.is_dir():
        raise InputError(f"{destination} exists and is not a folder.")
    # Only an earlier result of the same job is replaced.
    full = target.is_dir() and any(target.iterdir())
    if full and not overwrite:
        raise InputError(f"{destination} exists; name another folder or add --overwrite.")
    if full and not (target / marker).is_file():
        raise InputError(
            f"{destination} holds other files (no {marker}), so it is not overwritten; "
            "name another folder."
        )
    # Beside the destination, so that taking its name is one rename on one disk.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error.strerror}.") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(destination: str, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """The same for one file: a temporary path beside `destination`.

    An existing file is refused unless `overwrite`.
    """
    target = pathlib.Path(destination)
    if target.is_dir():
        raise InputError(f"{destination} is a folder.")
    if target.exists() and not overwrite:
        raise InputError(f"{destination} exists; name another file or add --overwrite.")
    temporary = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
