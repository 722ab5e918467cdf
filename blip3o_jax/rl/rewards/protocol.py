"""What a reward is, and the rewards by their names."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from blip3o_jax.errors import nearest, require
from blip3o_jax.rl.rewards import http, ocr, scenes

# Images uint8 [h,w,3], prompts, what else is known of each, its source images -> a float an image;
# nan where it has nothing to say. InputError where it cannot be asked.
Reward = Callable[
    [Sequence[np.ndarray], Sequence[str], Sequence[dict], Sequence[Sequence[np.ndarray]]],
    list[float],
]
SERVERS = {"http": http.ask, "https": http.ask, "geneval+http": http.ask_geneval}
TIMEOUT = 60.0  # seconds in which a server must answer


def named(name: str, timeout: float = TIMEOUT) -> Reward:
    """The reward of that name: of `scenes.REWARDS`, `ocr`, or a server's URL. InputError for
    another, and where its extra is missing."""
    scheme, is_url, _ = name.partition("://")
    if is_url and scheme in SERVERS:
        url = name.removeprefix("geneval+")
        http.check_url(url)
        return functools.partial(SERVERS[scheme], url, timeout)
    if name == "ocr":
        ocr.check_extra()
        return ocr.ocr
    known = (*scenes.REWARDS, "ocr", "http://HOST/PATH", "geneval+http://HOST/PATH")
    require(name in scenes.REWARDS, f"There is no reward {name!r}; {nearest(name, known)}")
    return functools.partial(scenes.judged, name)


def check_asked(name: str, prompt: str, metadata: dict) -> None:
    """InputError where it is known that a reward can judge no image of a prompt."""
    if name == "ocr":
        sentence = f"The reward 'ocr' reads what a prompt has in double quotes, and {prompt!r}"
        require(ocr.quoted(prompt) != "", f"{sentence} has nothing there.")
    elif name in scenes.REWARDS:
        sentence = f"The reward {name!r} is of the edits of `blip3o-jax grpo`; none is known here"
        require(scenes.REWARDS[name][0] is not None, f"{sentence}.")
    if name in scenes.REWARDS or name.startswith("geneval+"):
        scenes.check_metadata(prompt, metadata)
