"""Results on disk: a folder appears whole or not at all."""

import contextlib
import itertools
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator

from blip3o_jax import paths
from blip3o_jax.errors import os_errors, require


@contextlib.contextmanager
def new_folder(destination: str, marker: str, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A temporary folder that becomes `destination` when the block ends well, and else is removed.

    An existing destination is refused, unless it is empty, or `overwrite` is set and it holds
    `marker`, the file by which an earlier result is known; in a bucket it is copied last.
    """
    target = paths.path(destination)
    with os_errors(f"{destination} cannot be read"):
        is_file = target.exists() and not target.is_dir()
        require(not is_file, f"{destination} exists and is not a folder.")
        # Only an earlier result of the same job is replaced, and what has no end.
        if not paths.is_unfinished(target) and target.is_dir() and any(target.iterdir()):
            require(overwrite, f"{destination} exists; name another folder or add --overwrite.")
            other = f"{destination} holds other files (no {marker}), so it is not overwritten;"
            require((target / marker).is_file(), f"{other} name another folder.")
    # Beside the destination, so that taking its name is one rename on one disk.
    options = {"prefix": f".{target.name}-", "ignore_cleanup_errors": True}
    options["dir"] = None if paths.is_bucket(target) else target.parent
    with os_errors(f"{destination} cannot be written"), contextlib.ExitStack() as stack:
        if not paths.is_bucket(target):
            stack.enter_context(made(target.parent))
        temporary = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(**options)))
        yield temporary
        if paths.is_bucket(target):
            paths.remove_folder(target, marker)
            paths.copy_folder(temporary, target, marker)
            return
        # With the permissions that mkdir would have given.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)


@contextlib.contextmanager
def new_file(destination: str, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """The same for one file: a temporary path; an existing file is refused unless `overwrite`."""
    target = paths.path(destination)
    with os_errors(f"{destination} cannot be written"), contextlib.ExitStack() as cleanup:
        require(not target.is_dir(), f"{destination} is a folder.")
        is_free = overwrite or not target.exists()
        require(is_free, f"{destination} exists; name another file or add --overwrite.")
        if paths.is_bucket(target):
            folder = cleanup.enter_context(tempfile.TemporaryDirectory())
            temporary = pathlib.Path(folder) / target.name
            yield temporary
            paths.write_bytes(target, temporary.read_bytes())
            return
        cleanup.enter_context(made(target.parent))
        temporary = target.with_name(f".{uuid.uuid4().hex}.part")
        cleanup.callback(temporary.unlink, missing_ok=True)
        temporary.touch()  # what cannot be written is known before there is anything to write
        yield temporary
        temporary.replace(target)


@contextlib.contextmanager
def made(folder: pathlib.Path) -> Iterator[None]:
    """A folder in the block, which does not stay where it was made for nothing."""
    places = [folder, *folder.parents]
    new = list(itertools.takewhile(lambda place: not os.path.lexists(place), places))
    above = places[len(new)]
    require(above.is_dir(), f"{above} is not a folder.")
    try:
        with os_errors(f"{folder} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in new:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise
