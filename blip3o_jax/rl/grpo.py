"""GRPO as pure functions: advantages, log-probabilities, loss, one update (docs/model.md §7.1;
TRL's GRPOTrainer with loss type "bnpo").

A group is the G images of one prompt; a batch of B = prompts x G rows holds group after group. Only
Qwen3 is trained: the diffusion part and the autoencoder belong to the environment.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o, condition_slice
from blip3o_jax.sample import decode
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.steps import advance


def advantages(rewards: np.ndarray, num_generations: int) -> jax.Array:
    """Rewards [B] -> [B]: distance to the group's mean in units of its standard deviation
    (unbiased, + 1e-4)."""
    groups = jnp.reshape(jnp.asarray(rewards, jnp.float32), (-1, num_generations))
    mean = jnp.mean(groups, axis=1, keepdims=True)
    std = jnp.std(groups, axis=1, keepdims=True, ddof=1)
    return jnp.reshape((groups - mean) / (std + 1e-4), -1)


def image_logprobs(
    model: Blip3o, params: dict, tokens: jax.Array, start: jax.Array, temperature: float
) -> jax.Array:
    """Log-probabilities [B,n] of the image tokens in rows [B,T] that are padded on the right, with
    `<S0>` at `start` [B].

    Over the image tokens only, as they were drawn; the original draws from and normalises over the
    whole vocabulary.
    """
    vocab, n, params = model.config.vocab, model.config.ta_tok.num_tokens, {"qwen3": params}
    first, count = vocab.image_start_token_id, vocab.num_image_tokens
    # Each state is the one that the next token was drawn from.
    states = condition_slice(model.read_rows(params, tokens), start, n)
    logits = model.apply(params, "qwen3", states, first, count, method="logits")
    ids = jnp.take_along_axis(tokens, start[:, None] + 1 + jnp.arange(n), axis=1) - first
    return decode.token_logprobs(logits / temperature, ids)


def policy_loss(
    logprobs: jax.Array,
    old: jax.Array,
    reference: jax.Array,
    advantages: jax.Array,
    epsilon: float,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy loss + beta x divergence from the reference, the mean over all tokens ->
    (loss, metrics).

    logprobs, old, reference [B,n]; advantages [B]. The divergence is the estimate exp(d) - d - 1
    with d = reference - logprobs.
    """
    # The smaller of both: a gain counts up to the clip, a loss beyond it too.
    ratio, gain = jnp.exp(logprobs - old), advantages[:, None]
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
    difference = reference - logprobs
    divergence = jnp.mean(jnp.exp(difference) - difference - 1)
    loss = -jnp.mean(jnp.minimum(ratio * gain, clipped * gain)) + beta * divergence
    return loss, {"loss": loss, "kl": divergence, "clipped": jnp.mean(jnp.abs(ratio - 1) > epsilon)}


def update(
    model: Blip3o, cfg: TrainConfig, state: dict, reference: dict, batch: dict
) -> tuple[dict, dict]:
    """(state, batch) -> (state, metrics).

    `batch`: tokens [B,T], start [B], advantages [B], and the rollout's own logprobs [B,n].
    `reference`: Qwen3's parameters at the start.

    With one update per rollout the policy that drew the tokens is the present one, and the ratio is
    1 with a gradient. The metric `logprob_gap` compares the log-probabilities of decoding and of
    this forward pass.
    """
    section, fixed = cfg.grpo, jax.lax.stop_gradient
    rows = batch["tokens"], batch["start"], section.temperature

    def loss(params: dict) -> tuple[jax.Array, dict]:
        logprobs = image_logprobs(model, params["qwen3"], *rows)
        first = image_logprobs(model, reference, *rows) if section.beta else logprobs
        old, first, gains = fixed(logprobs), fixed(first), batch["advantages"]
        value, metrics = policy_loss(logprobs, old, first, gains, section.epsilon, section.beta)
        gap = jnp.max(jnp.abs(logprobs - batch["logprobs"]))
        return value, {**metrics, "logprob_gap": gap, "entropy": -jnp.mean(logprobs)}

    return advance(cfg, state, *jax.grad(loss, has_aux=True)(state["params"]))


def compile_update(model: Blip3o, cfg: TrainConfig, state_shardings: dict | None) -> Callable:
    """The jitted update: the state is donated and comes back where it was."""
    step = functools.partial(update, model, cfg)
    return jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
