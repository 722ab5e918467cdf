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
SERVERS = ("http://", "https://")
PICKLED = "geneval+"  # before http://, for the server of GRPO-GenEval
TIMEOUT = 60.0  # seconds in which a server must answer


def check_there(names: Sequence[str]) -> None:
    """`http.Unreachable` for a server among the rewards that does not answer."""
    for url in (name.removeprefix(PICKLED) for name in names):
        if url.startswith(SERVERS):
            http.check_reachable(url)


def named(name: str, timeout: float = TIMEOUT) -> Reward:
    """The reward of that name: of `scenes.REWARDS`, `ocr`, or a server's URL. InputError for
    another, and where its extra is missing."""
    url = name.removeprefix(PICKLED)
    if url.startswith(SERVERS):
        http.check_url(url)
        return functools.partial(http.ask if url == name else http.ask_geneval, url, timeout)
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
    if name in scenes.REWARDS or name.startswith(PICKLED):
        scenes.check_metadata(prompt, metadata)
