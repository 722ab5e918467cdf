"""Text files that people write: prompts, edits, benchmarks and their results."""

from pathlib import Path

from blip3o_jax.errors import InputError, require

LARGEST = 256 << 20  # bytes


def read_text(path: str | Path, what: str = "") -> str:
    """A UTF-8 file of bounded size, without a byte order mark; InputError names it as `what`."""
    file = Path(path)
    unread = f"The {what} file {path} cannot be read" if what else f"{path} cannot be read"
    try:
        require(file.stat().st_size <= LARGEST, f"{path} is larger than {LARGEST >> 20} MB.")
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        reason = f"it is not UTF-8 text from line {line} on; save it as UTF-8"
        raise InputError(f"{unread}: {reason}.") from error
    except OSError as error:
        raise InputError(f"{unread}: {error.strerror}.") from error


def read_lines(path: str | Path, what: str = "") -> list[str]:
    """As `read_text`, lines that end at `\\n` or `\\r\\n` and nowhere else: other separators of
    Unicode are part of a prompt."""
    return [line.removesuffix("\r") for line in read_text(path, what).split("\n")]
