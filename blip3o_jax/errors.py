"""The user's errors, and the hints that they end with."""

import contextlib
import difflib
import numbers
import re
import sys
from collections.abc import Iterator

MAX_FLOAT = sys.float_info.max  # below infinity
MAX_SEED = 2**32 - 1  # jax and grain keep 32 bits of a seed: a larger one would be another's twin


class InputError(ValueError):
    """A configuration or input that cannot work; the message is one sentence for the user."""


class RewardError(InputError):
    """A reward that fails; a run of training saves its state before it ends."""


def nearest(name: str, known) -> str:
    """`', did you mean X?'` for the closest of `known`, or the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."


def multiples(size: int, divisor: int) -> str:
    """`'the nearest that do are 8 and 16.'` for a size that does not divide."""
    below = size // divisor * divisor
    both = f"the nearest that do are {below} and {below + divisor}."
    return both if below else f"the nearest that does is {divisor}."


def disk_reason(error: Exception) -> str | None:
    """What the system says of a disk that cannot be written, also inside a library's own text; None
    if it says nothing."""
    reasons = "No space left on device|Disk quota exceeded|Read-only file system|Permission denied"
    match = re.search(reasons, str(error))
    return match[0] if match else getattr(error, "strerror", None)


def first_line(error: Exception) -> str:
    """The first line of what a library says, and the next where it ends in a colon; its kind where
    it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


def require(holds: bool, message: str) -> None:
    """InputError with this sentence unless the condition holds."""
    if not holds:
        raise InputError(message)


def counted(count: int, noun: str) -> str:
    """`'1 image'`, `'2 images'`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def check_number(value: object, name: str, least: float = 0, most: float = MAX_FLOAT) -> None:
    """InputError unless it is a number from `least` to `most`, so neither infinite nor NaN."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    limits = f" from {least} to {most}" if most < MAX_FLOAT else f" of at least {least}"
    limits = limits if least > -MAX_FLOAT else ""
    shown = repr(value) if len(repr(value)) < 50 else "such a long one"
    require(is_number and least <= value <= most, f"{name} is a number{limits}, not {shown}.")


def check_seed(seed: object, name: str = "The seed") -> None:
    """InputError unless it is a whole number from 0 to `MAX_SEED`."""
    is_whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    in_range = is_whole and 0 <= seed <= MAX_SEED
    require(in_range, f"{name} is a whole number from 0 to {MAX_SEED}, not {seed!r}.")


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Puts an InputError, `what` and the system's reason, in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {error.strerror}.") from error


@contextlib.contextmanager
def about(subject: object) -> Iterator[None]:
    """Puts `SUBJECT: ` before the sentence of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from error
