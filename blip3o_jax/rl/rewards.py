"""Verifiable rewards: numpy on the host, one image at a time."""

import numpy as np

from blip3o_jax.scenes import judge


def scene_rewards(
    images: np.ndarray, metadata: list[dict], strict: float
) -> tuple[np.ndarray, dict[str, float]]:
    """Images [B,64,64,3] and what was asked for -> rewards [B] in 0..1, and the mean of each
    verdict.

    The reward is GenEval's dense score (as in GRPO-GenEval, docs/model.md §7.4), with a share
    `strict` of the verdict that also demands nothing else in the image and the named ground.
    """
    verdicts = judge.judge_batch(images, metadata)
    names = ("score", "correct", "strict")
    means = {name: float(np.mean([v[name] for v in verdicts])) for name in names}
    scores, exact = (np.array([float(v[x]) for v in verdicts], np.float32) for x in names[::2])
    return (1 - strict) * scores + strict * exact, means
