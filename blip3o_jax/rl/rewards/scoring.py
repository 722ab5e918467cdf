"""All rewards of a run at once, while the device goes on: the judge and the reader of words in
processes of their own, servers and other functions in threads.

A server that does not answer pauses the run, and is asked again. A reward that fails, or has not
answered in time, is a RewardError, upon which the run saves its state and ends.
"""

import contextlib
import functools
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from blip3o_jax.errors import InputError, RewardError, counted, first_line
from blip3o_jax.parallel.mesh import cores
from blip3o_jax.rl.rewards import scenes
from blip3o_jax.rl.rewards.http import Unreachable
from blip3o_jax.rl.rewards.protocol import Reward
from blip3o_jax.train import stop

log = logging.getLogger(__name__)

# f64 [B,R] of R kinds, NaN where one has nothing to say; and as many [B] by the names under which
# their means are logged.
Rewards = tuple[np.ndarray, dict[str, np.ndarray]]
# Begins to reward images uint8 [B,H,W,3] and gives a function that waits for the rewards. What was
# asked of each image is its "prompt", its "source" if it is an edit, and other metadata.
# Unless it `pauses`, a server that does not answer fails at once.
Score = Callable[..., Callable[[], Rewards]]
JUDGE = "scenes"  # looks once for all its rewards
APART = (JUDGE, "ocr")  # one image after the other, and busy
PAUSE = 10.0  # seconds until a server is asked again
TICK = 0.5  # between looks at the clock and at signals
MOST = 16  # processes


class Late(Exception):
    """No answer in time."""


def asked_as(name: str) -> str:
    """What is asked for a reward: two with the same answer are of one kind."""
    return JUDGE if name in scenes.REWARDS else name


@contextlib.contextmanager
def scorer(
    rewards: Mapping[str, Reward], timeout: float, watched: Sequence[str] = ()
) -> Iterator[Score]:
    """Gives a function of the rewards, by their names and in their order; those that are `watched`
    are asked too, but only logged.

    Waiting raises RewardError when one of them fails or takes longer than `timeout` seconds.
    """
    functions = {asked_as(name): reward for name, reward in rewards.items()}
    if JUDGE in functions:
        functions[JUDGE] = scenes.verdicts
    apart = [name for name in APART if name in functions]
    with _processes() if apart else contextlib.nullcontext() as begin_apart:

        def begin(name: str, arguments: tuple) -> queue.SimpleQueue:
            return (begin_apart if name in apart else _begin)(functions[name], arguments)

        def score(
            images: Sequence[np.ndarray], asked: Sequence[dict], pauses: bool = True
        ) -> Callable[[], Rewards]:
            prompts = [m["prompt"] for m in asked]
            sources = [[m["source"]] if "source" in m else [] for m in asked]
            arguments = images, prompts, asked, sources
            pending = {name: begin(name, arguments) for name in functions}

            def wait() -> Rewards:
                deadline, answers = time.monotonic() + timeout, {}
                for name, own in pending.items():
                    answer = _wait(own, deadline)
                    while pauses and isinstance(answer, Unreachable) and _pause(answer, deadline):
                        again = _wait(begin(name, arguments), deadline)
                        # Why it was away says more than that it is late.
                        answer = answer if isinstance(again, Late) else again
                    _check_answer(name, answer, timeout)
                    answers[name] = answer
                return _joined(rewards, watched, answers, asked)

            return wait

        yield score


def _begin(reward: Callable, arguments: tuple) -> queue.SimpleQueue:
    """Asks a reward in a thread that ends with the process; gives where its answer or its error
    will be."""
    answers = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(reward(*arguments))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    return answers


@contextlib.contextmanager
def _processes() -> Iterator[Callable[[Callable, tuple], queue.SimpleQueue]]:
    """Gives what asks a reward as `_begin` does, in a process for each core, without JAX, of which
    each gets a part of the images. They end with the body, whatever they are at."""
    context, count = multiprocessing.get_context("spawn"), min(cores(), MOST)
    # A Ctrl-C is for the run, which ends them.
    with context.Pool(count, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:

        def begin(reward: Callable, arguments: tuple) -> queue.SimpleQueue:
            answers = queue.SimpleQueue()
            size = -(-len(arguments[0]) // count)
            starts = range(0, len(arguments[0]), size)
            parts = [tuple(x[i : i + size] for x in arguments) for i in starts]
            joined = functools.partial(_put_joined, answers)
            pool.starmap_async(reward, parts, 1, joined, answers.put)
            return answers

        yield begin


def _put_joined(answers: queue.SimpleQueue, parts: list[list]) -> None:
    answers.put([answer for part in parts for answer in part])


def _wait(answers: queue.SimpleQueue, deadline: float) -> object:
    """The answer, or `Late` if it does not come until then, or before a signal."""
    while True:
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=TICK)
        if stop.is_asked() or time.monotonic() > deadline:
            return Late()


def _pause(reason: Unreachable, deadline: float) -> bool:
    """Waits before a server is asked again; false where there is no time for it."""
    until = time.monotonic() + PAUSE
    if until > deadline:
        return False
    left = deadline - time.monotonic()
    log.warning("%s The run waits, for %.0f s at most, and asks again.", reason, left)
    while time.monotonic() < until:
        if stop.is_asked():
            return False
        time.sleep(TICK)
    return True


def _check_answer(name: str, answer: object, timeout: float) -> None:
    """RewardError for an answer that is late, or an error."""
    if isinstance(answer, Late):
        reason = "was interrupted" if stop.is_asked() else f"gives no answer in {timeout:g} s"
        raise RewardError(f"The reward {name!r} {reason} (grpo.reward_timeout).")
    if isinstance(answer, InputError):
        raise RewardError(str(answer)) from answer
    if isinstance(answer, Exception):
        reason = f"{type(answer).__name__}: {first_line(answer)}"
        raise RewardError(f"The reward {name!r} fails: {reason}.") from answer


def _joined(
    names: Iterable[str], watched: Sequence[str], answers: Mapping, asked: Sequence[dict]
) -> Rewards:
    """The rewards as columns but those that are watched; and all of them, with whatever else the
    judge says, by name."""
    columns = []
    named = scenes.logged(answers[JUDGE], asked) if JUDGE in answers else {}
    for name in names:
        if name in scenes.REWARDS:
            column = scenes.column(name, answers[JUDGE], asked)
        else:
            column = _column(name, answers[name], len(asked))
            named[f"{'watched' if name in watched else 'reward'}/{name}"] = column
        if name not in watched:
            columns.append(column)
    return np.stack(columns, axis=1), named


def _column(name: str, answer: object, count: int) -> np.ndarray:
    """The answer as f64 [count], each a number or NaN; else a RewardError."""
    try:
        rewards = np.asarray(answer, np.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(f"The reward {name!r} gives no numbers: {first_line(error)}.") from error
    if rewards.shape != (count,):
        given = f"gives {counted(rewards.size, 'number')} for {counted(count, 'image')}"
        raise RewardError(f"The reward {name!r} {given}.")
    if np.isinf(rewards).any():
        raise RewardError(f"The reward {name!r} gives a number that is not finite.")
    return rewards
