"""Verifiable rewards: numpy on the host, a picture at a time."""

import numpy as np

from blip3o_jax.scenes import judge


def scene_rewards(
    images, metadata: list[dict], strict: float
) -> tuple[np.ndarray, dict[str, float]]:
    """Pictures [B,64,64,3] and what was asked for -> rewards [B] in 0..1, and the mean of each
    verdict.

    The reward is GenEval's dense score (as in GRPO-GenEval, docs/model.md §7.4), with a share
    `strict` of the verdict that also wants nothing else in the picture and the named ground.
    """
    verdicts = judge.judge_batch(images, metadata)
    scores, exact = (
        np.array([float(v[name]) for v in verdicts], np.float32) for name in ("score", "strict")
    )
    means = {
        name: float(np.mean([v[name] for v in verdicts])) for name in ("score", "correct", "strict")
    }
    return (1 - strict) * scores + strict * exact, means
