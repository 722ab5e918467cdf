"""Rewards of a server that is asked over HTTP."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import math
import pickle
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from blip3o_jax.errors import (
    MAX_FLOAT,
    InputError,
    about,
    check_number,
    counted,
    first_line,
    require,
)
from blip3o_jax.files import json_object
from blip3o_jax.rl.rewards.scenes import check_metadata

LARGEST = 1 << 24  # bytes of an answer
PAUSES = (0.5, 1.0)  # seconds until a server is asked again
AWAY = (429, 502, 503, 504)  # codes of a server that may answer later


class Unreachable(InputError):
    """A server that does not answer, and may later."""


def check_url(url: str) -> None:
    """InputError unless a server can have this address."""
    host, is_plain = None, url.isascii() and url.isprintable() and " " not in url
    with contextlib.suppress(ValueError):  # of brackets that do not close, of a port
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    fix = "write http://HOST/PATH, other characters as %XX"
    require(bool(host) and is_plain, f"The reward server {url!r} names no host; {fix}.")


def ask(
    url: str,
    timeout: float,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    metadata: Sequence[dict],
    sources: Sequence[Sequence[np.ndarray]] = (),
) -> list[float]:
    """Posts {"images": [base64 of PNG], "prompts", "metadata", "sources": [[base64]]}, and expects
    {"rewards": [a number or null, ...]}. InputError for another answer; `Unreachable` for none
    after some tries of `timeout` seconds."""
    # An edit's picture is among the sources; the scenes before and after it are dataclasses.
    facts = [{k: x for k, x in own.items() if not isinstance(x, np.ndarray)} for own in metadata]
    body = {"images": list(map(_png, images)), "prompts": list(prompts), "metadata": facts}
    body["sources"] = [list(map(_png, own)) for own in sources]
    data = json.dumps(body, default=dataclasses.asdict).encode()
    answer = _post(url, data, "application/json", timeout)
    with about(f"The reward server {url}"):
        return _numbers(json_object("its answer", answer).get("rewards"), "rewards", len(images))


def ask_geneval(
    url: str,
    timeout: float,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    metadata: Sequence[dict],
    sources: Sequence[Sequence[np.ndarray]] = (),
) -> list[float]:
    """The dense scores of the server that GRPO-GenEval was trained with, which speaks pickle
    (docs/model.md §7.4); errors as in `ask`."""
    rows = []
    for prompt, asked in zip(prompts, metadata, strict=True):
        check_metadata(prompt, asked)
        rows.append({"tag": asked["tag"], "include": asked["include"], "prompt": prompt})
    pictures = [_encoded(image, "jpeg") for image in images]
    body = {"images": pictures, "meta_datas": rows, "only_strict": False}
    answer = _post(url, pickle.dumps(body), "application/octet-stream", timeout)
    with about(f"The reward server {url}"):
        try:
            scores = _Plain(io.BytesIO(answer)).load()["scores"]
        except Exception as error:  # whatever bytes from elsewhere may raise
            raise InputError(f"its answer cannot be read: {first_line(error)}.") from error
        return _numbers(scores, "scores", len(images))


class _Plain(pickle.Unpickler):
    """Reads numbers, text, lists and dicts: a pickle could otherwise call any function."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is not a number")


def check_reachable(url: str) -> None:
    """`Unreachable` where no server answers; whatever it says to a GET, it is there."""
    try:
        _answer(url, urllib.request.Request(url), 10.0)
    except Unreachable:
        raise
    except InputError:
        return


def _post(url: str, data: bytes, kind: str, timeout: float) -> bytes:
    """The answer, asked for again where a server is restarting or busy, not where it refuses."""
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    for pause in PAUSES:
        with contextlib.suppress(Unreachable):
            return _answer(url, request, timeout)
        time.sleep(pause)
    return _answer(url, request, timeout)


def _answer(url: str, request: urllib.request.Request, timeout: float) -> bytes:
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read(LARGEST)
    except (OSError, ValueError, http.client.HTTPException) as error:
        is_refusal = isinstance(error, urllib.error.HTTPError) and error.code not in AWAY
        kind = InputError if is_refusal else Unreachable
        raise kind(f"The reward server {url} fails: {first_line(error)}.") from error


def _numbers(rewards: object, name: str, count: int) -> list[float]:
    """A server's list of numbers, nan for null."""
    require(isinstance(rewards, list), f"its answer has no list `{name}`.")
    given = f"{counted(len(rewards), name.removesuffix('s'))} for {counted(count, 'image')}"
    require(len(rewards) == count, f"it gives {given}.")
    for reward in rewards:
        if reward is not None:
            check_number(reward, f"a {name.removesuffix('s')}", -MAX_FLOAT)
    return [math.nan if reward is None else float(reward) for reward in rewards]


def _png(image: np.ndarray) -> str:
    return base64.b64encode(_encoded(image, "png")).decode()


def _encoded(image: np.ndarray, kind: str) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, kind)
    return data.getvalue()
