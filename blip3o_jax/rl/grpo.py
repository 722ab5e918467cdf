"""GRPO as pure functions: advantages, log-probabilities, loss, one update (docs/model.md §7.1;
TRL's GRPOTrainer with loss type "bnpo").

A group is the G pictures of one prompt; groups stand one after the other in a batch of B = prompts
x G rows. Only Qwen3 is trained: the diffusion part and the autoencoder belong to the environment.
"""

import functools

import jax
import jax.numpy as jnp

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o, condition_slice
from blip3o_jax.sample import decode
from blip3o_jax.text import causal_positions
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.steps import advance


def advantages(rewards, num_generations: int):
    """Rewards [B] -> [B]: distance to the group's mean in units of its standard deviation
    (unbiased, + 1e-4)."""
    groups = jnp.reshape(jnp.asarray(rewards, jnp.float32), (-1, num_generations))
    mean, std = (
        jnp.mean(groups, axis=1, keepdims=True),
        jnp.std(groups, axis=1, keepdims=True, ddof=1),
    )
    return jnp.reshape((groups - mean) / (std + 1e-4), -1)


def image_logprobs(model: Blip3o, params, tokens, start, temperature):
    """Log-probs [B,n] of the image tokens in rows [B,T] that are padded on the right, with `<S0>`
    at `start` [B].

    Over the image tokens only, as they were drawn. The original normalises over the whole
    vocabulary, from which it also draws.
    """
    vocab, n = model.config.vocab, model.config.ta_tok.num_tokens
    valid = tokens != vocab.pad_token_id
    hidden, _ = model.qwen3.apply({"params": params}, tokens, causal_positions(tokens), valid)
    # each state is that which the next token was drawn from
    states = condition_slice(hidden, start, n)
    logits = model.qwen3.apply(
        {"params": params},
        states,
        vocab.image_start_token_id,
        vocab.num_image_tokens,
        method="logits",
    )
    ids = (
        jnp.take_along_axis(tokens, start[:, None] + 1 + jnp.arange(n), axis=1)
        - vocab.image_start_token_id
    )
    return decode.token_logprobs(logits / temperature, ids)


def policy_loss(logprobs, old, reference, advantages, epsilon: float, beta: float):
    """Clipped policy loss + beta x divergence from the reference, the mean over all tokens ->
    (loss, metrics).

    logprobs, old, reference [B,n]; advantages [B]. The divergence is the estimate exp(d) - d - 1
    with d = reference - logprobs.
    """
    ratio, gain = jnp.exp(logprobs - old), advantages[:, None]
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
    difference = reference - logprobs
    divergence = jnp.mean(jnp.exp(difference) - difference - 1)
    loss = -jnp.mean(jnp.minimum(ratio * gain, clipped * gain)) + beta * divergence
    return loss, {"loss": loss, "kl": divergence, "clipped": jnp.mean(jnp.abs(ratio - 1) > epsilon)}


def update(model: Blip3o, cfg: TrainConfig, state, reference, batch):
    """(state, batch) -> (state, metrics).

    `batch`: tokens [B,T], start [B], advantages [B], and the rollout's own logprobs [B,n].

    One update a rollout, so the policy that drew the tokens is the present one, and the ratio is 1
    with a gradient. `reference` are Qwen3's parameters at the start. The metric `logprob_gap`
    compares what decoding and this forward pass say of the same tokens.
    """
    temperature, old_of = cfg.grpo.temperature, jax.lax.stop_gradient
    rows = batch["tokens"], batch["start"]

    def loss(params):
        logprobs = image_logprobs(model, params["qwen3"], *rows, temperature)
        frozen = image_logprobs(model, reference, *rows, temperature) if cfg.grpo.beta else logprobs
        value, metrics = policy_loss(
            logprobs,
            old_of(logprobs),
            old_of(frozen),
            batch["advantages"],
            cfg.grpo.epsilon,
            cfg.grpo.beta,
        )
        return value, {
            **metrics,
            "logprob_gap": jnp.max(jnp.abs(logprobs - batch["logprobs"])),
            "entropy": -jnp.mean(logprobs),
        }

    return advance(cfg, state, *jax.grad(loss, has_aux=True)(state["params"]))


def compile_update(model: Blip3o, cfg: TrainConfig, state_shardings):
    """The jitted update: the state is donated and comes back where it was."""
    return jit(
        functools.partial(update, model, cfg),
        donate_argnums=0,
        out_shardings=(state_shardings, None),
    )
