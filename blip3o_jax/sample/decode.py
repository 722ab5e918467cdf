"""Autoregressive decoding of image tokens: sampling, and one pass that yields tokens and hidden
states together (docs/model.md §4.3, §6.6).

Pure functions. When you compile them, keep `model`, `vocab`, `num_tokens` and `top_k` static;
`top_p` and `temperature` are arrays, so that other values need no other program.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.config import VocabConfig
from blip3o_jax.kernels.platform import tokens_of_a_round
from blip3o_jax.models.qwen3 import Cache, Qwen3, init_cache, positions_of, step_logits
from blip3o_jax.parallel.activations import (
    STEP,
    per_device,
    per_shard,
    pin_rows,
    read_rows,
    row_shards,
    rows_of_a_step,
    write_rows,
)
from blip3o_jax.sample.flow import Scalar

TABLE = 1 << 20  # random numbers of an image, up to which all are drawn before the first token


def token_logprobs(logits: Array, ids: Array) -> Array:
    """logits [...,V], ids [...] -> log-probability of each id, [...] f32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def _support(top_k: int, vocabulary: int) -> int:
    """How many ids can be drawn."""
    return min(top_k or vocabulary, vocabulary)


def _gumbel(keys: Array, size: int) -> Array:
    """keys [...] typed PRNG keys -> [...,size] f32, what makes each one's draw random."""
    draw = functools.partial(jax.random.gumbel, shape=(size,))
    return jax.vmap(draw)(keys.reshape(-1)).reshape(*keys.shape, size)


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
    noise = _gumbel(keys, _support(top_k, logits.shape[-1]))
    return _draw(logits, noise, top_p, temperature)


@jax.named_scope("sample")
def _draw(logits: Array, noise: Array, top_p: Scalar, temperature: Scalar) -> tuple[Array, Array]:
    """`sample` with the randomness [B,k] of `_gumbel`, one number for each of the k largest."""
    # Temperature 0 divides by 1, and takes the first of the sorted ids below.
    greedy = jnp.asarray(temperature) == 0
    logits = logits / jnp.where(greedy, 1.0, temperature)
    # The k largest, in order, and how much probability comes before each.
    size = noise.shape[-1]
    values, ids = per_shard(lambda rows: jax.lax.top_k(rows, size), logits)
    probs = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep = (before < top_p).at[:, 0].set(True)
    # An index into the k largest as jax.random.categorical draws it, the first of the best scores,
    # then its id. A CPU's argmax would go number by number.
    scores = jnp.where(keep, values, -jnp.inf) + noise
    is_best = scores == jnp.max(scores, axis=-1, keepdims=True)
    drawn = jnp.min(jnp.where(is_best, jnp.arange(size), size - 1), axis=-1)
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
    drafts: Array | None = None,
) -> dict[str, Array]:
    """Writes exactly `num_tokens` (n) image tokens after each prompt; only image tokens can be
    drawn.

    prompt [B/G,P] int32 ends in `<S0>` and is padded on the left where `valid` [B/G,P] is False;
    keys [B] typed PRNG keys, G for each prompt, one after the other: it is read once for all of
    them. `params` is Qwen3's own tree. Returns tokens [B,n] int32 as codebook ids,
    hidden [B,n+1,D], the states of `<S0>` and of every token, logprobs [B,n] as `sample` gives
    them, over the image tokens, and the `rounds` [B] of the transformer that a row took. A row does
    not depend on the other rows, nor on its padding. `given` replaces embeddings of the prompt, see
    `Qwen3`; `drafts` [B,n], codebook ids, are first guesses, which change nothing but the rounds.
    Raises ValueError for shapes that do not fit each other.

    Token i is a function of those before it, because its randomness is fixed: it is drawn with its
    row's key folded with i. So a window of tokens, the first known and the others guessed, goes
    through the transformer at once. Guesses that are what the states before them draw are right,
    and the first that is not is replaced by what was drawn (Jacobi decoding with fixed randomness,
    arXiv 2510.24211). These are the tokens that one by one would give, in fewer rounds; the worst
    guesses cost n rounds.

    The state of a token exists once the token is fed, so feeding all n gives all n+1 states: the
    original's second forward over the finished sequence (docs/model.md §6.6 no. 3) is not needed.
    """
    group, rest = divmod(len(keys), len(prompt))
    if valid.shape != prompt.shape or keys.ndim != 1 or rest or num_tokens < 1:
        shapes = f"prompts {prompt.shape} do not go with valid {valid.shape} and keys {keys.shape}"
        raise ValueError(f"{num_tokens} tokens after {shapes}")
    if drafts is not None and drafts.shape != (len(prompt), num_tokens):
        drafted = f"{len(prompt)} prompts, but drafts {drafts.shape}"
        raise ValueError(f"{num_tokens} tokens for {drafted}")
    write = functools.partial(_write, model, vocab, num_tokens, top_k)
    weights, prompts = (params, top_p, temperature), (prompt, valid, given, drafts)
    if len(prompt) % row_shards():
        # Too few for all devices: each reads those of its own rows.
        prompts = _repeated(prompts, group)
    return per_device(write, weights, keys, *prompts)


def _repeated(tree: Any, group: int, axis: int = 0) -> Any:
    """Each row of arrays, `group` times one after the other."""
    return jax.tree.map(lambda x: jnp.repeat(x, group, axis), tree) if group > 1 else tree


def _write(
    model: Qwen3,
    vocab: VocabConfig,
    num_tokens: int,
    top_k: int,
    weights: tuple[dict, Scalar, Scalar],
    keys: Array,
    prompt: Array,
    valid: Array,
    given: tuple[Array, Array] | None,
    drafts: Array | None,
) -> dict[str, Array]:
    """`generate_tokens` for the rows of a device, or of all."""
    (params, top_p, temperature), batch, length = weights, len(keys), prompt.shape[1]
    apply = functools.partial(model.apply, {"params": params})
    # The prompts, all at once; then only the image tokens' part of the head is needed.
    lengths = valid.sum(axis=1, dtype=jnp.int32)
    with jax.named_scope("prefill"):
        cache = init_cache(model.cfg, len(prompt), length + num_tokens, model.dtype)
        hidden, cache = apply(prompt, positions_of(valid), valid, cache, given)
        group = batch // len(prompt)
        read, drafts, lengths = _repeated((hidden[:, -1:], drafts, lengths), group)
        axes = {"k": 1, "v": 1}  # behind the layers
        cache = {name: _repeated(x, group, axes.get(name, 0)) for name, x in cache.items()}
    head = apply(vocab.image_start_token_id, vocab.num_image_tokens, method="head")
    # The randomness of all places at once, where it is small.
    size = _support(top_k, vocab.num_image_tokens)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    table = None
    if num_tokens * size <= TABLE:
        # The place behind the last token is drawn in vain.
        every = jnp.broadcast_to(jnp.arange(num_tokens + 1), (batch, num_tokens + 1))
        table = pin_rows(_gumbel(fold(keys, every), size))

    def draw(states: Array, start: Array) -> tuple[Array, Array]:
        """States [B,W,D] -> the tokens [B,W] drawn from them for the places from `start` [B] on,
        and log-probs."""
        places = start[:, None] + jnp.arange(states.shape[1])
        if table is None:
            noise = _gumbel(fold(keys, places), size)
        else:
            noise = read_rows(table, start, states.shape[1])
        logits = step_logits(states.reshape(-1, states.shape[-1]), head)
        drawn = _draw(logits, noise.reshape(-1, size), top_p, temperature)
        return tuple(x.reshape(places.shape) for x in drawn)

    # What a row has written so far. It fed the tokens before `fed` to the transformer, and the one
    # at `fed` is known too; behind it are guesses. Each array has room for what the last state
    # draws.
    first = jnp.zeros(batch, jnp.int32)
    token, logprob = draw(read, first)
    behind = (0, 0), (0, num_tokens)
    guesses = jnp.broadcast_to(token, (batch, num_tokens)) if drafts is None else drafts
    rows = {
        "fed": first,
        "rounds": first,
        "tokens": jnp.concatenate([token, guesses[:, 1:], token], axis=1),
        "logprobs": jnp.pad(logprob, behind),
        "hidden": jnp.pad(read, (*behind, (0, 0))),
    }
    window = min(num_tokens, tokens_of_a_round(model.cfg.hidden_size, rows_of_a_step(batch)))
    side = math.isqrt(num_tokens)
    ends = jnp.arange(num_tokens + 1)

    def round_of(carry: tuple[dict, Cache]) -> tuple[dict, Cache]:
        rows, cache = carry
        fed = rows["fed"]
        # A row near its end feeds tokens again, so that nothing is written beyond it.
        begin = jnp.minimum(fed, num_tokens - window)
        places = begin[:, None] + jnp.arange(window)
        tokens = read_rows(rows["tokens"], begin, window)
        inputs = vocab.image_start_token_id + tokens, lengths[:, None] + places, places >= 0
        states, cache = apply(*inputs, cache | {"index": length + begin}, layout=STEP)
        drawn, logprobs = draw(states, begin + 1)
        # A guess is right if it is drawn, and all before it are right.
        is_right = (places[:, 1:] <= fed[:, None]) | (tokens[:, 1:] == drawn[:, :-1])
        known = begin + 1 + jnp.sum(jnp.cumprod(is_right, axis=1), axis=1)
        # Known tokens stay. What is drawn now are the next guesses; further on, the row of the
        # image above.
        drawn = jnp.where(places < fed[:, None], jnp.roll(tokens, -1, axis=1), drawn)
        # A row that is done feeds its last window again, and writes what is there.
        values = {"tokens": drawn, "logprobs": logprobs, "hidden": states}
        values = {name: write_rows(rows[name], new, begin + 1) for name, new in values.items()}
        if drafts is None:
            above = jnp.roll(values["tokens"], side, axis=1)
            is_far = (ends > begin[:, None] + window) & (ends >= side)
            values["tokens"] = jnp.where(is_far, above, values["tokens"])
        return {"fed": known, "rounds": rows["rounds"] + (fed < num_tokens), **values}, cache

    with jax.named_scope("decode"):
        rows, _ = jax.lax.while_loop(
            lambda carry: jnp.any(carry[0]["fed"] < num_tokens), round_of, (rows, cache)
        )
    tokens, logprobs = (rows[name][:, :-1] for name in ("tokens", "logprobs"))
    hidden, rounds = rows["hidden"], rows["rounds"]
    return {"tokens": tokens, "hidden": hidden, "logprobs": logprobs, "rounds": rounds}
