"""The best of several images of each request, by a reward or by the mean of several."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from blip3o_jax.errors import InputError, require
from blip3o_jax.pictures import array
from blip3o_jax.rl.rewards.http import Unreachable
from blip3o_jax.rl.rewards.protocol import named

if TYPE_CHECKING:
    from blip3o_jax.pipeline import Pipeline
    from blip3o_jax.request import Request, Sample
    from blip3o_jax.rl.rewards.protocol import Reward


def check_rewards(names: Sequence[str], count: int) -> None:
    """InputError for what --reward and --best-of cannot be."""
    require(count >= 1, f"--best-of is at least 1, not {count}.")
    require(names or count == 1, "--best-of needs a --reward to choose by.")
    for name in names:
        named(name)


def best_of(
    pipeline: Pipeline,
    requests: Iterable[Request],
    count: int,
    names: Sequence[str],
    failed: Callable[[Request, str], None],
) -> Iterator[Sample]:
    """`Pipeline.run`, with the best of `count` candidates for each request of one turn, the first
    of equals. The candidates of index i are the images i * count, ... that the prompt has without
    this; the sample's `facts` say which one it is, and the rewards of all.

    A request whose images cannot be judged fails, and one whose rewards are all nan.
    """
    rewards = [named(name) for name in names]
    waiting: collections.deque[Request] = collections.deque()

    def candidates() -> Iterator[Request]:
        for request in requests:
            waiting.append(request)
            for k in range(count):
                yield dataclasses.replace(request, index=request.index * count + k)

    # Images or reasons of the first that waits: they come in the order of the candidates.
    outcomes: list[Sample | str] = []

    def refuse(_: Request, reason: str) -> None:
        outcomes.append(reason)
        if len(outcomes) == count:
            failed(waiting.popleft(), reason)
            outcomes.clear()

    for sample in pipeline.run(candidates(), refuse):
        outcomes.append(sample)
        if len(outcomes) == count:
            request, own = waiting.popleft(), [x for x in outcomes if not isinstance(x, str)]
            outcomes.clear()
            try:
                yield _best(request, own, rewards)
            except Unreachable:
                raise
            except InputError as error:
                failed(request, str(error))


def _best(request: Request, samples: list[Sample], rewards: Sequence[Reward]) -> Sample:
    from blip3o_jax.rl.grpo import weighted

    images, metadata = [sample.image for sample in samples], [request.metadata or {}] * len(samples)
    sources = [[array(picture) for picture in request.images]] * len(samples)
    arguments = images, [request.prompt] * len(samples), metadata, sources
    columns = np.stack([reward(*arguments) for reward in rewards], axis=1)
    totals = weighted(columns, [1 / len(rewards)] * len(rewards)).tolist()
    # The first of the highest, where nan is below all.
    judged = [-math.inf if math.isnan(x) else x for x in totals]
    if max(judged) == -math.inf:
        raise InputError(f"{request.prompt!r}: the reward has nothing to say of its images.")
    place = judged.index(max(judged))
    facts = {"reward": totals[place], "candidate": samples[place].index}
    facts["rewards"] = [None if math.isnan(x) else x for x in totals]
    return dataclasses.replace(samples[place], request=request, facts=facts)
