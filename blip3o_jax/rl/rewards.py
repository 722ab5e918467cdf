"""Rewards of images: the judge of the embedded world, on the host, one image at a time; a server
that is asked over HTTP."""

import base64
import contextlib
import functools
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence

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
from blip3o_jax.scenes import judge

# Images [h,w,3], prompts, what else is known of each, its source images -> a float an image; nan
# where it has nothing to say.
Reward = Callable[
    [Sequence[np.ndarray], Sequence[str], Sequence[dict], Sequence[Sequence[np.ndarray]]],
    list[float],
]
TIMEOUT, TRIES, LARGEST = 60.0, 3, 1 << 24  # seconds of an answer; its bytes

# What is logged of a verdict, and under which name.
OF_PROMPTS = {name: name for name in ("score", "correct", "strict")}
OF_EDITS = {name: f"edit_{name}" for name in ("score", "done", "kept", "success")}


def scene_rewards(images: np.ndarray, metadata: list[dict]) -> tuple[np.ndarray, dict[str, float]]:
    """Images [B,64,64,3] and what was asked for -> two rewards [B,2] in 0..1, and the mean of each
    verdict.

    Those of a prompt are GenEval's dense score (as in GRPO-GenEval, docs/model.md §7.4), and the
    verdict that also demands nothing else in the image and the named ground; of an "edit" in the
    metadata, the score of `judge.judge_edit`, and its success.
    """
    rewards = np.zeros((len(images), 2), np.float32)
    verdicts: dict[str, list[float]] = {}
    for i, (image, asked) in enumerate(zip(images, metadata, strict=True)):
        if edit := asked.get("edit"):
            verdict, names, exact = judge.judge_edit(image, edit), OF_EDITS, "success"
        else:
            verdict, names, exact = judge.judge(image, asked), OF_PROMPTS, "strict"
        rewards[i] = verdict["score"], verdict[exact]
        for name, logged in names.items():
            verdicts.setdefault(logged, []).append(float(verdict[name]))
    return rewards, {name: float(np.mean(values)) for name, values in verdicts.items()}


def named(name: str) -> Reward:
    """The reward `scenes`, or that of a server at http:// or https://; InputError for another."""
    if name.startswith(("http://", "https://")):
        _check_url(name)
        return functools.partial(over_http, name)
    require(name == "scenes", f"There is no reward {name!r}; known: scenes, http://HOST/PATH.")
    return scenes


def _check_url(url: str) -> None:
    """InputError unless a server can have this name."""
    host, is_plain = None, url.isascii() and url.isprintable() and " " not in url
    with contextlib.suppress(ValueError):  # of brackets that do not close, of a port
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    fix = "write http://HOST/PATH, other characters as %XX"
    require(bool(host) and is_plain, f"The reward server {url!r} names no host; {fix}.")


def scenes(
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    metadata: Sequence[dict],
    sources: Sequence[Sequence[np.ndarray]] = (),
) -> list[float]:
    """GenEval's dense score by the judge of the embedded world, half of it the strict verdict;
    InputError for metadata that it cannot judge by."""
    rewards = []
    for image, prompt, asked in zip(images, prompts, metadata, strict=True):
        try:
            rewards.append(float(scene_rewards(image[None], [asked])[0].mean()))
        except (KeyError, TypeError, ValueError) as error:
            sentence = f"{prompt!r} has no metadata of GenEval (`tag`, `include`) to judge it by"
            raise InputError(f"{sentence}: {first_line(error)}.") from error
    return rewards


def over_http(
    url: str,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    metadata: Sequence[dict],
    sources: Sequence[Sequence[np.ndarray]] = (),
) -> list[float]:
    """Posts {"images": [base64 of PNG], "prompts", "metadata", "sources": [[base64]]}, and expects
    {"rewards": [a number or null, ...]}. InputError for no answer after some tries, or another."""
    body = {"images": [_png(image) for image in images], "prompts": list(prompts)}
    body |= {"metadata": list(metadata), "sources": [list(map(_png, own)) for own in sources]}
    headers = {"Content-Type": "application/json"}
    # Again where a server is restarting or busy, not where it refuses.
    for left in reversed(range(TRIES)):
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                answer = response.read(LARGEST)
            break
        except (OSError, ValueError, http.client.HTTPException) as error:
            is_lasting = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if is_lasting or not left:
                raise InputError(f"The reward server {url} fails: {first_line(error)}.") from error
            time.sleep(2.0 ** (TRIES - left) / 4)
    with about(f"The reward server {url}"):
        rewards = json_object("its answer", answer).get("rewards")
        require(isinstance(rewards, list), "its answer has no list `rewards`.")
        given = f"{counted(len(rewards), 'reward')} for {counted(len(images), 'image')}"
        require(len(rewards) == len(images), f"it gives {given}.")
        for reward in rewards:
            if reward is not None:
                check_number(reward, "a reward", -MAX_FLOAT)
    return [math.nan if reward is None else float(reward) for reward in rewards]


def _png(image: np.ndarray) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, "png")
    return base64.b64encode(data.getvalue()).decode()
