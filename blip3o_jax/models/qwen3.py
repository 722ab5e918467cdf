"""Qwen3, the autoregressive transformer; mirrors transformers' Qwen3ForCausalLM (docs/model.md
§2.1).

    h <- h + o_proj(attention(rotary(q_norm(q)), rotary(k_norm(k)), v)),   q, k, v = projections of
    input_layernorm(h)
    h <- h + down_proj(silu(gate_proj y) * up_proj y),                     y =
    post_attention_layernorm(h)
    out = norm(h),   logits = out . embedding^T when tied, else out . lm_head

The blocks are one scanned block, so every parameter of "layers" has a leading axis L. Axis letters
as in layers.py.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from blip3o_jax.config import Qwen3Config
from blip3o_jax.errors import InputError
from blip3o_jax.kernels.cpu import unrolled
from blip3o_jax.models.attention import Causal, attention
from blip3o_jax.models.layers import (
    Linear,
    RMSNorm,
    apply_rotary,
    fan_in_normal,
    logits_product,
    rotary_angles,
    scan_layers,
)
from blip3o_jax.parallel.activations import cut, keep_rows, keep_width, lookup

# of fresh weights, as transformers': what a layer adds is small beside a token's own vector, so
# that words stay known
STD = 0.02


def init_cache(cfg: Qwen3Config, batch: int, length: int, dtype) -> dict[str, jax.Array]:
    """An empty key-value cache for `length` tokens: k [L,B,K,S,H], v [L,B,K,H,S], valid [B,S], and
    index, where all rows write next.

    Keys and values lie as the two products of attention read them; a step that had to turn them
    would copy all that is written.

    One index serves all rows because prompts are padded on the left. Nothing checks that a step
    still fits: `length` must.
    """
    heads, head_dim = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads), cfg.head_dim
    return {
        "k": jnp.zeros((*heads, length, head_dim), dtype),
        "v": jnp.zeros((*heads, head_dim, length), dtype),
        "valid": jnp.zeros((batch, length), bool),
        "index": jnp.zeros((), jnp.int32),
    }


def is_step(x, cache) -> bool:
    """Whether x [B,T,...] is one token a row, written behind a cache.

    Then weights that are cut along "fsdp" stay where they are, and sums of activations travel
    (`activations.keep_width`); gathering every weight for every token would send many times as
    much.
    """
    return cache is not None and x.shape[1] == 1


def positions_of(valid):
    """valid [B,T] bool -> positions [B,T] int32: the number of valid tokens before each, which
    padding does not shift."""
    return jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid


def reused(cfg: Qwen3Config, step: bool) -> bool:
    """Whether the loop over tokens comes back to weights that can be laid out for it
    (`kernels.cpu.product`): not those of a loop over layers, which are laid out anew each time."""
    return step and unrolled(cfg.num_hidden_layers)


class Table(nn.Module):
    """One parameter with a path of its own, for those who need a part of it."""

    leaf: str
    shape: tuple[int, ...]
    initializer: Callable

    @nn.compact
    def __call__(self):
        return self.param(self.leaf, self.initializer, self.shape)


class SelfAttention(nn.Module):
    """Qwen3Attention: x [B,T,D] -> ([B,T,D], cache).

    With a cache, its keys and values up to the mask's are seen too.
    """

    cfg: Qwen3Config
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, x, layer, angles, mask, cache):
        cfg, width, head_dim, step = (
            self.cfg,
            self.cfg.hidden_size,
            self.cfg.head_dim,
            is_step(x, cache),
        )
        options = {"dtype": self.dtype, "std": STD, "reused": reused(cfg, step)}
        heads, kv_heads = (cfg.num_attention_heads, head_dim), (cfg.num_key_value_heads, head_dim)
        q = Linear("btd,dnh->btnh", (width, *heads), **options, name="q_proj")(x)
        k = Linear("btd,dkh->btkh", (width, *kv_heads), **options, name="k_proj")(x)
        v = Linear("btd,dkh->btkh", (width, *kv_heads), **options, name="v_proj")(x)
        if step:
            q, k, v = (keep_rows(y, None, "tensor") for y in (q, k, v))
        q = apply_rotary(RMSNorm(cfg.rms_norm_eps, name="q_norm")(q), angles)
        k = apply_rotary(RMSNorm(cfg.rms_norm_eps, name="k_norm")(k), angles)
        implementation = self.implementation
        if cache is not None:
            index = cache["index"]
            keys = lax.dynamic_update_slice(
                cache["k"], k.transpose(0, 2, 1, 3)[None], (layer, 0, 0, index, 0)
            )
            values = lax.dynamic_update_slice(
                cache["v"], v.transpose(0, 2, 3, 1)[None], (layer, 0, 0, 0, index)
            )
            cache = cache | {"k": keys, "v": values}
            k = lax.dynamic_index_in_dim(keys, layer, keepdims=False).transpose(0, 2, 1, 3)
            v = lax.dynamic_index_in_dim(values, layer, keepdims=False).transpose(0, 3, 1, 2)
            # one query a row: reading the cache is the cost, and fused kernels want square shapes
            implementation = "xla"
        y = attention(q, k, v, mask, head_dim**-0.5, implementation)
        if step:
            y = cut(y, "data", None, "tensor")
        return Linear("btnh,nhd->btd", (*heads, width), **options, name="o_proj")(y), cache


class Mlp(nn.Module):
    """Qwen3MLP (SwiGLU): [B,T,D] -> [B,T,D]. `step`: see `is_step`."""

    cfg: Qwen3Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, step: bool):
        width, hidden = self.cfg.hidden_size, self.cfg.intermediate_size
        options = {"dtype": self.dtype, "std": STD, "reused": reused(self.cfg, step)}
        gate = Linear("btd,df->btf", (width, hidden), **options, name="gate_proj")(x)
        up = Linear("btd,df->btf", (width, hidden), **options, name="up_proj")(x)
        y = nn.silu(gate) * up
        if step:
            y = cut(y, "data", None, "tensor")
        return Linear("btf,fd->btd", (hidden, width), **options, name="down_proj")(y)


class Block(nn.Module):
    """Qwen3DecoderLayer, in the form that nn.scan wants: (x, cache) -> (x, cache).

    The cache of all layers is carried, not scanned over, so that a step writes one token of it in
    place and copies nothing else.
    """

    cfg: Qwen3Config
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, carry, layer, angles, mask):
        x, cache = carry
        eps, step = self.cfg.rms_norm_eps, is_step(x, cache)
        y = RMSNorm(eps, name="input_layernorm")(x)
        y, cache = SelfAttention(self.cfg, self.dtype, self.implementation, name="self_attn")(
            y, layer, angles, mask, cache
        )
        x = x + y
        y = RMSNorm(eps, name="post_attention_layernorm")(x)
        x = x + Mlp(self.cfg, self.dtype, name="mlp")(y, step)
        return (keep_width(x) if step else keep_rows(x), cache), None


@jax.named_scope("logits")
def head_logits(equation: str, hidden, table):
    """The product that `equation` writes of hidden states and a part of the vocabulary's table,
    f32, its vocabulary cut by "tensor"."""
    logits = logits_product(equation, hidden.astype(table.dtype), table)
    return keep_rows(logits, *(None,) * (logits.ndim - 2), "tensor")


@jax.named_scope("logits")
def step_logits(hidden, head):
    """hidden [B,D] of one token a row, head [D,V] from `Qwen3.head` -> logits [B,V] f32.

    The head stays where it is, as in `is_step`.
    """
    logits = logits_product("bd,dv->bv", cut(hidden, "data"), head)
    return keep_rows(keep_rows(cut(logits, "data", ("tensor", "fsdp")), "tensor"))


class Qwen3(nn.Module):
    """Tokens -> hidden states (`__call__`) -> logits (`logits`).

    `dtype` is that of the matrix products and hidden states. `remat` is what the backward pass
    computes again: "none" nothing, "full" each block, "dots" all of it but the projections.
    `attention` is attention.py's implementation for calls without a cache.
    """

    cfg: Qwen3Config
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "auto"

    def setup(self):
        cfg = self.cfg
        self.embed_tokens = Table(
            "embedding", (cfg.vocab_rows, cfg.hidden_size), nn.initializers.normal(STD)
        )
        block = scan_layers(
            Block, cfg.num_hidden_layers, (0, nn.broadcast, nn.broadcast), self.remat
        )
        self.layers = block(cfg, self.dtype, self.attention)
        self.norm = RMSNorm(cfg.rms_norm_eps)
        if not cfg.tie_word_embeddings:
            self.lm_head = Table(
                "kernel", (cfg.hidden_size, cfg.vocab_rows), fan_in_normal(cfg.hidden_size)
            )

    def __call__(self, tokens, positions, valid, cache=None):
        """tokens, positions [B,T] int32, valid [B,T] bool (False: padding, on either side) ->
        (hidden [B,T,D] after the final norm, cache).

        Without a cache a token sees the valid tokens up to itself in its row. With one it sees the
        cache's as well, and the cache comes back with these T tokens written behind them. Hidden
        states at padding are finite and meaningless.
        """
        length, cfg = tokens.shape[1], self.cfg
        if cache is None:
            mask = Causal(valid)
        else:
            index = cache["index"]
            cache = cache | {"valid": lax.dynamic_update_slice(cache["valid"], valid, (0, index))}
            # [T,S]
            written = jnp.arange(cache["valid"].shape[1]) <= index + jnp.arange(length)[:, None]
            mask = written & cache["valid"][:, None, None, :]
        x = lookup(self.embed_tokens(), tokens, self.dtype)
        x = x if is_step(x, cache) else keep_rows(x)
        angles = rotary_angles(positions, cfg.head_dim, cfg.rope_theta)
        (x, cache), _ = self.layers((x, cache), jnp.arange(cfg.num_hidden_layers), angles, mask)
        if cache is not None:
            cache = cache | {"index": index + length}
        if self.is_initializing() and not cfg.tie_word_embeddings:
            self.lm_head()  # only `logits` reads it, but it must exist
        return self.norm(keep_rows(x)), cache

    def logits(self, hidden, start: int = 0, size: int | None = None):
        """hidden [...,D] -> f32 logits [...,size] of the ids from `start` on; all of the vocabulary
        from there when `size` is None.

        Raises InputError for a range beyond the vocabulary.
        """
        stop = self._stop(start, size)
        if self.cfg.tie_word_embeddings:
            return head_logits(
                "...d,vd->...v", hidden, self.embed_tokens()[start:stop].astype(self.dtype)
            )
        return head_logits(
            "...d,dv->...v", hidden, self.lm_head()[:, start:stop].astype(self.dtype)
        )

    def head(self, start: int = 0, size: int | None = None):
        """What `logits` multiplies hidden states by, [D,size] in `dtype`, its vocabulary cut along
        "fsdp" too: for loops, which would turn a tied table, or gather its width, at every step;
        see `step_logits`."""
        stop = self._stop(start, size)
        table = (
            self.embed_tokens()[start:stop].T
            if self.cfg.tie_word_embeddings
            else self.lm_head()[:, start:stop]
        )
        return cut(cut(table.astype(self.dtype), "fsdp", "tensor"), None, ("tensor", "fsdp"))

    def _stop(self, start: int, size: int | None) -> int:
        stop = self.cfg.vocab_size if size is None else start + size
        if not 0 <= start < stop <= self.cfg.vocab_size:
            raise InputError(
                f"Logits of ids {start} to {stop} are not in a vocabulary of {self.cfg.vocab_size}."
            )
        return stop
