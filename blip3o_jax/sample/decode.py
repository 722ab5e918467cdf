"""Autoregressive decoding of image tokens: sampling, and one pass that yields tokens and hidden
states together (docs/model.md §4.3, §6.6).

Pure functions. Whoever compiles them keeps `model`, `vocab`, `num_tokens` and `top_k` static;
`top_p` and `temperature` are arrays, so that other values need no other program.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.config import VocabConfig
from blip3o_jax.errors import InputError
from blip3o_jax.models.qwen3 import Qwen3, init_cache, positions_of, step_logits
from blip3o_jax.parallel.activations import per_shard


def token_logprobs(logits, ids):
    """logits [...,V], ids [...] -> log-probability of each id, [...] f32."""
    logits = logits.astype(jnp.float32)
    return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(
        logits, axis=-1
    )


@jax.named_scope("sample")
def sample(logits, keys, top_k: int, top_p, temperature):
    """One id a row: logits [B,V] f32, keys [B] typed PRNG keys, top_p and temperature scalars ->
    (ids [B] int32, log-probs [B] f32).

    Temperature first, then the `top_k` largest (0: all), then the nucleus among those: a token
    stays while the probability before it is below `top_p`, and the first always does (transformers'
    TopKLogitsWarper and TopPLogitsWarper). Each row draws with its own key. The log-prob is that of
    the distribution before truncation, at this temperature. Temperature 0 takes the largest logit,
    with the log-prob of temperature 1.
    """
    greedy = jnp.asarray(temperature) == 0
    logits = logits / jnp.where(greedy, 1.0, temperature)
    size = min(top_k or logits.shape[-1], logits.shape[-1])
    values, ids = per_shard(lambda rows: jax.lax.top_k(rows, size), logits)
    probs = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep = (before < top_p).at[:, 0].set(True)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(keep, values, -jnp.inf))
    ids = jnp.take_along_axis(ids, jnp.where(greedy, 0, drawn)[:, None], axis=-1)[:, 0]
    return ids, token_logprobs(logits, ids)


def generate_tokens(
    model: Qwen3,
    params,
    vocab: VocabConfig,
    num_tokens: int,
    prompt,
    valid,
    keys,
    top_k: int,
    top_p,
    temperature,
) -> dict[str, jax.Array]:
    """Writes exactly `num_tokens` (n) image tokens after each prompt; only image tokens can be
    drawn.

    prompt [B,P] int32 ends in `<S0>` and is padded on the left where `valid` [B,P] is False; keys
    [B] typed PRNG keys; `params` is Qwen3's own tree. Returns tokens [B,n] int32 as codebook ids,
    hidden [B,n+1,D], the states of `<S0>` and of every token, and logprobs [B,n] as `sample` gives
    them, over the image tokens. A row does not depend on the other rows, nor on its padding. Raises
    InputError for shapes that do not fit each other.

    The state of a token exists once the token is fed, so n steps after the prompt give all n+1: the
    original's second forward over the finished sequence (§6.6 no. 3) is not needed.
    """
    batch, length = prompt.shape
    if valid.shape != prompt.shape or keys.shape != (batch,) or num_tokens < 1:
        raise InputError(
            f"{num_tokens} tokens after prompts {prompt.shape} do not go with valid "
            f"{valid.shape} and keys {keys.shape}."
        )
    variables = {"params": params}
    lengths = valid.sum(axis=1, dtype=jnp.int32)
    with jax.named_scope("prefill"):
        cache = init_cache(model.cfg, batch, length + num_tokens, model.dtype)
        hidden, cache = model.apply(variables, prompt, positions_of(valid), valid, cache)
    head = model.apply(variables, vocab.image_start_token_id, vocab.num_image_tokens, method="head")

    def step(carry, i):
        hidden, cache = carry
        logits = step_logits(hidden, head)
        tokens, logprobs = sample(
            logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i), top_k, top_p, temperature
        )
        fed = (vocab.image_start_token_id + tokens)[:, None]
        after, cache = model.apply(
            variables, fed, (lengths + i)[:, None], jnp.ones_like(fed, bool), cache
        )
        return (after[:, 0], cache), (tokens, logprobs, hidden)

    (last, _), steps = jax.lax.scan(step, (hidden[:, -1], cache), jnp.arange(num_tokens))
    tokens, logprobs, states = (jnp.swapaxes(x, 0, 1) for x in steps)
    return {
        "tokens": tokens,
        "hidden": jnp.concatenate([states, last[:, None]], axis=1),
        "logprobs": logprobs,
    }
