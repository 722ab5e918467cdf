"""Autoregressive decoding of image tokens: sampling, and one pass that yields tokens and hidden
states together (docs/model.md §4.3, §6.6).

Pure functions. When you compile them, keep `model`, `vocab`, `num_tokens` and `top_k` static;
`top_p` and `temperature` are arrays, so that other values need no other program.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.config import VocabConfig
from blip3o_jax.models.qwen3 import Qwen3, init_cache, positions_of, step_logits
from blip3o_jax.parallel.activations import per_shard
from blip3o_jax.sample.flow import Scalar


def token_logprobs(logits: Array, ids: Array) -> Array:
    """logits [...,V], ids [...] -> log-probability of each id, [...] f32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


@jax.named_scope("sample")
def sample(
    logits: Array, keys: Array, top_k: int, top_p: Scalar, temperature: Scalar
) -> tuple[Array, Array]:
    """One id a row: logits [B,V] f32, keys [B] typed PRNG keys, top_p and temperature scalars ->
    (ids [B] int32, log-probs [B] f32).

    Temperature first, then the `top_k` largest (0: all), then the nucleus among those: a token
    stays while the probability before it is below `top_p`, and the first always does (transformers'
    TopKLogitsWarper and TopPLogitsWarper). Each row draws with its own key. The log-prob is that of
    the distribution before truncation, at this temperature. Temperature 0 takes the largest logit,
    with the log-prob of temperature 1.
    """
    # Temperature 0 divides by 1, and takes the first of the sorted ids below.
    greedy = jnp.asarray(temperature) == 0
    logits = logits / jnp.where(greedy, 1.0, temperature)
    # The k largest, in order, and how much probability comes before each.
    size = min(top_k or logits.shape[-1], logits.shape[-1])
    values, ids = per_shard(lambda rows: jax.lax.top_k(rows, size), logits)
    probs = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep = (before < top_p).at[:, 0].set(True)
    # An index into the k largest, then its id.
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(keep, values, -jnp.inf))
    ids = jnp.take_along_axis(ids, jnp.where(greedy, 0, drawn)[:, None], axis=-1)[:, 0]
    return ids, token_logprobs(logits, ids)


def generate_tokens(
    model: Qwen3,
    params: dict,
    vocab: VocabConfig,
    num_tokens: int,
    prompt: Array,
    valid: Array,
    keys: Array,
    top_k: int,
    top_p: Scalar,
    temperature: Scalar,
    given: tuple[Array, Array] | None = None,
) -> dict[str, Array]:
    """Writes exactly `num_tokens` (n) image tokens after each prompt; only image tokens can be
    drawn.

    prompt [B,P] int32 ends in `<S0>` and is padded on the left where `valid` [B,P] is False; keys
    [B] typed PRNG keys; `params` is Qwen3's own tree. Returns tokens [B,n] int32 as codebook ids,
    hidden [B,n+1,D], the states of `<S0>` and of every token, and logprobs [B,n] as `sample` gives
    them, over the image tokens. A row does not depend on the other rows, nor on its padding.
    `given` replaces embeddings of the prompt, see `Qwen3`. Raises ValueError for shapes that do not
    fit each other.

    The state of a token exists once the token is fed, so n steps after the prompt give all n+1: the
    original's second forward over the finished sequence (docs/model.md §6.6 no. 3) is not needed.
    """
    batch, length = prompt.shape
    if valid.shape != prompt.shape or keys.shape != (batch,) or num_tokens < 1:
        shapes = f"prompts {prompt.shape} do not go with valid {valid.shape} and keys {keys.shape}"
        raise ValueError(f"{num_tokens} tokens after {shapes}")
    apply = functools.partial(model.apply, {"params": params})
    # The prompts, all at once; then only the image tokens' part of the head is needed.
    lengths = valid.sum(axis=1, dtype=jnp.int32)
    with jax.named_scope("prefill"):
        cache = init_cache(model.cfg, batch, length + num_tokens, model.dtype)
        hidden, cache = apply(prompt, positions_of(valid), valid, cache, given)
    head = apply(vocab.image_start_token_id, vocab.num_image_tokens, method="head")

    # Draw from the last state, feed the token, keep the state that the next one is drawn from.
    def step(carry, i):
        hidden, cache = carry
        logits = step_logits(hidden, head)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        tokens, logprobs = sample(logits, step_keys, top_k, top_p, temperature)
        fed = (vocab.image_start_token_id + tokens)[:, None]
        positions = (lengths + i)[:, None]
        after, cache = apply(fed, positions, jnp.ones_like(fed, bool), cache)
        return (after[:, 0], cache), (tokens, logprobs, hidden)

    (last, _), steps = jax.lax.scan(step, (hidden[:, -1], cache), jnp.arange(num_tokens))
    tokens, logprobs, states = (jnp.swapaxes(x, 0, 1) for x in steps)
    hidden = jnp.concatenate([states, last[:, None]], axis=1)
    return {"tokens": tokens, "hidden": hidden, "logprobs": logprobs}
