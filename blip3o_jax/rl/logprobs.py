"""Log-probabilities of the image tokens that a rollout drew, as a function of the parameters."""

import jax
import jax.numpy as jnp

from blip3o_jax.models.blip3o import Blip3o, condition_slice
from blip3o_jax.parallel.activations import row_shards
from blip3o_jax.sample import decode

MOST_LOGITS = 1 << 26  # on a device at once; 16 rows of 729 tokens of 217,210 ids are 2,500 million


def image_logprobs(
    model: Blip3o,
    params: dict,
    tokens: jax.Array,
    start: jax.Array,
    temperature: float,
    full_vocabulary: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(Log-probabilities, entropies) f32 [B,n] of the image tokens in rows [B,T] that are padded on
    the right, with `<S0>` at `start` [B]; `params` are Qwen3's.

    Among the image tokens, from which they were drawn, or as the PyTorch code among all. Logits
    exist for a few positions at a time and are recomputed for the gradient.
    """
    vocab, n, params = model.config.vocab, model.config.ta_tok.num_tokens, {"qwen3": params}
    first, count = vocab.image_start_token_id, vocab.num_image_tokens
    if full_vocabulary:
        first, count = 0, model.config.qwen3.vocab_size
    # Each state is the one that the next token was drawn from.
    states = condition_slice(model.read_rows(params, tokens), start, n)
    ids = jnp.take_along_axis(tokens, start[:, None] + 1 + jnp.arange(n), axis=1) - first

    def of_piece(piece: tuple) -> tuple[jax.Array, jax.Array]:
        states, ids = piece
        logits = model.apply(params, "qwen3", states, first, count, method="logits") / temperature
        probs = jax.nn.softmax(logits, axis=-1)
        entropies = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(probs * logits, axis=-1)
        return decode.token_logprobs(logits, ids), jax.lax.stop_gradient(entropies)

    pieces = _pieces(n, -(-len(tokens) // row_shards()) * count)
    if pieces == 1:
        return of_piece((states, ids))

    # Pieces of all rows, so that a sharded batch stays where it is.
    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(len(x), pieces, -1, *x.shape[2:]), 1, 0)

    results = jax.lax.map(jax.checkpoint(of_piece), (split(states), split(ids)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(ids.shape) for x in results)


def _pieces(n: int, logits: int) -> int:
    """The fewest equal pieces of n positions, each with this many logits, that hold at most
    MOST_LOGITS; a position at least."""
    fits = (p for p in range(1, n + 1) if n % p == 0 and n // p * logits <= MOST_LOGITS)
    return next(fits, n)
