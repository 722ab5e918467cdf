"""Qwen3, the autoregressive transformer; mirrors transformers' Qwen3ForCausalLM (docs/model.md
§2.1).

    y <- input_layernorm(h);           q, k, v = projections of y
    h <- h + o_proj(attention(rotary(q_norm(q)), rotary(k_norm(k)), v))
    y <- post_attention_layernorm(h);  h <- h + down_proj(silu(gate_proj y) * up_proj y)
    out = norm(h);                     logits = out . embedding^T when tied, else out . lm_head

The blocks are one scanned block, so every parameter of "layers" has a leading axis L. Axis letters
as in layers.py.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from blip3o_jax.config import Qwen3Config
from blip3o_jax.kernels.attention import attention
from blip3o_jax.kernels.masks import Causal
from blip3o_jax.kernels.platform import is_unrolled
from blip3o_jax.kernels.products import logits_product
from blip3o_jax.models.layers import Dtype, Initializer, Linear, RMSNorm, scan_layers
from blip3o_jax.parallel.activations import (
    STEP,
    WHOLE,
    Layout,
    lookup,
    pin,
    pin_rows,
    update_rows,
    write_rows,
)

# Of fresh weights, as transformers': what a layer adds is small beside a token's own vector, so
# that words stay distinct.
STD = 0.02

Cache = dict[str, Array]
Angles = tuple[Array, Array]


def init_cache(cfg: Qwen3Config, batch: int, length: int, dtype: Dtype) -> Cache:
    """An empty key-value cache for `length` tokens: k [L,B,K,S,H], v [L,B,K,H,S], valid [B,S], and
    index [B], where each row writes next.

    Keys and values are stored as the two products of attention read them: no step transposes what
    is written. Nothing checks that a step still fits: `length` must. A caller that moves an index
    back takes tokens back: what is stored behind it is not seen, and is written over.
    """
    heads = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads)
    return {
        "k": jnp.zeros((*heads, length, cfg.head_dim), dtype),
        "v": jnp.zeros((*heads, cfg.head_dim, length), dtype),
        "valid": jnp.zeros((batch, length), bool),
        "index": jnp.zeros(batch, jnp.int32),
    }


def write_cache(cache: Cache, layer: Array, k: Array, v: Array) -> tuple[Cache, Array, Array]:
    """Writes keys and values [B,T,K,H] of a layer at each row's index -> (cache, and all keys and
    values [B,S,K,H] of that layer)."""
    # In the order in which the cache stores them.
    start = [layer, 0, 0, 0, 0]
    keys = update_rows(cache["k"], k.transpose(0, 2, 1, 3), start, 3, cache["index"])
    values = update_rows(cache["v"], v.transpose(0, 2, 3, 1), start, 4, cache["index"])
    # What the layer attends to.
    k = lax.dynamic_index_in_dim(keys, layer, keepdims=False).transpose(0, 2, 1, 3)
    v = lax.dynamic_index_in_dim(values, layer, keepdims=False).transpose(0, 3, 1, 2)
    return cache | {"k": keys, "v": values}, k, v


def positions_of(valid: Array) -> Array:
    """valid [B,T] bool -> positions [B,T] int32: how many valid tokens come before each."""
    return jnp.cumsum(valid, axis=1, dtype=jnp.int32) - valid


def rotary_angles(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """positions [B,T] -> cos, sin [B,T,H/2] f32, of theta^(-2i/H); Qwen3RotaryEmbedding."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: Array, angles: tuple[Array, Array]) -> Array:
    """x [B,T,N,H], angles from `rotary_angles`; rotates the two halves of H against each other (not
    interleaved)."""
    cos, sin = (a[:, :, None, :].astype(x.dtype) for a in angles)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Table(nn.Module):
    """One parameter with a path of its own, of which callers may need a part only."""

    leaf: str
    shape: tuple[int, ...]
    initializer: Initializer

    @nn.compact
    def __call__(self) -> Array:
        return self.param(self.leaf, self.initializer, self.shape)


class SelfAttention(nn.Module):
    """Qwen3Attention: x [B,T,D] -> ([B,T,D], cache), whose keys and values are seen too."""

    cfg: Qwen3Config
    dtype: Dtype
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: Array,
        layer: Array,
        angles: Angles,
        mask: Causal | Array,
        cache: Cache | None,
        layout: Layout,
    ) -> tuple[Array, Cache | None]:
        cfg, width = self.cfg, self.cfg.hidden_size
        heads = (cfg.num_attention_heads, cfg.head_dim)
        kv_heads = (cfg.num_key_value_heads, cfg.head_dim)
        linear = functools.partial(
            Linear, dtype=self.dtype, std=STD, loop_invariant=layout.loop_invariant
        )
        project = functools.partial(linear, out=layout.heads)
        # Queries and keys are normed per head, then rotated by their positions.
        with jax.named_scope("qkv"):
            q = project("btd,dnh->btnh", (width, *heads), name="q_proj")(x)  # [B,T,N,H]
            k = project("btd,dkh->btkh", (width, *kv_heads), name="k_proj")(x)  # [B,T,K,H]
            v = project("btd,dkh->btkh", (width, *kv_heads), name="v_proj")(x)  # [B,T,K,H]
        with jax.named_scope("rope"):
            q = apply_rotary(RMSNorm(cfg.rms_norm_eps, name="q_norm")(q), angles)
            k = apply_rotary(RMSNorm(cfg.rms_norm_eps, name="k_norm")(k), angles)
        implementation = self.implementation
        if cache is not None:
            with jax.named_scope("cache"):
                cache, k, v = write_cache(cache, layer, k, v)  # [B,S,K,H]
            # Few queries: reading the cache is the cost, and fused kernels want square shapes.
            implementation = "xla"
        y = attention(q, k, v, mask, cfg.head_dim**-0.5, implementation)  # [B,T,N,H]
        with jax.named_scope("projection"):
            y = pin(y, layout.inner)
            return linear("btnh,nhd->btd", (*heads, width), name="o_proj")(y), cache


class Mlp(nn.Module):
    """Qwen3MLP (SwiGLU): [B,T,D] -> [B,T,D]."""

    cfg: Qwen3Config
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, layout: Layout) -> Array:
        width, hidden = self.cfg.hidden_size, self.cfg.intermediate_size
        linear = functools.partial(
            Linear, dtype=self.dtype, std=STD, loop_invariant=layout.loop_invariant
        )
        gate = linear("btd,df->btf", (width, hidden), name="gate_proj")(x)  # [B,T,F]
        up = linear("btd,df->btf", (width, hidden), name="up_proj")(x)  # [B,T,F]
        y = pin(nn.silu(gate) * up, layout.inner)
        return linear("btf,fd->btd", (hidden, width), name="down_proj")(y)


class Block(nn.Module):
    """Qwen3DecoderLayer as a scan step: (x, cache) -> (x, cache).

    The cache of all layers is carried, not scanned over, so that a step writes its tokens in
    place and copies nothing else.
    """

    cfg: Qwen3Config
    dtype: Dtype
    implementation: str

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Cache | None],
        layer: Array,
        angles: Angles,
        mask: Causal | Array,
        layout: Layout,
    ):
        x, cache = carry
        norm = functools.partial(RMSNorm, self.cfg.rms_norm_eps)
        y = norm(name="input_layernorm")(x)
        attend = SelfAttention(self.cfg, self.dtype, self.implementation, name="self_attn")
        y, cache = attend(y, layer, angles, mask, cache, layout)
        x = x + y
        y = norm(name="post_attention_layernorm")(x)
        x = x + Mlp(self.cfg, self.dtype, name="mlp")(y, layout)
        return (pin(x, layout.stream), cache), None

    def with_output(self, carry: tuple[Array, None], *inputs):
        """`__call__`, whose hidden states are an output of the scan too."""
        carry, _ = self(carry, *inputs)
        return carry, carry[0]


@jax.named_scope("logits")
def head_logits(equation: str, hidden: Array, table: Array) -> Array:
    """The product that `equation` writes of hidden states and a part of the vocabulary's table,
    f32, its vocabulary sharded along "tensor"."""
    logits = logits_product(equation, hidden.astype(table.dtype), table)
    return pin_rows(logits, *(None,) * (logits.ndim - 2), "tensor")


@jax.named_scope("logits")
def step_logits(hidden: Array, head: Array) -> Array:
    """hidden [B,D] of one token a row, head [D,V] from `Qwen3.head` -> logits [B,V] f32.

    The head stays where it is, as weights do in the layout STEP.
    """
    logits = logits_product("bd,dv->bv", pin(hidden, ("data",)), head)
    logits = pin_rows(pin(logits, ("data", ("tensor", "fsdp"))), "tensor")
    return pin_rows(logits)


class Qwen3(nn.Module):
    """Tokens -> hidden states (`__call__`) -> logits (`logits`).

    `dtype` is that of the matrix products and hidden states. `remat` is a key of layers.REMAT.
    `attention` is the implementation of `attention.attention` for calls without a cache.
    """

    cfg: Qwen3Config
    dtype: Dtype = jnp.float32
    remat: str = "none"
    attention: str = "auto"

    def setup(self):
        cfg = self.cfg
        shape = (cfg.vocab_rows, cfg.hidden_size)
        self.embed_tokens = Table("embedding", shape, nn.initializers.normal(STD))
        in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        others = {"with_output": in_axes}
        block = scan_layers(Block, cfg.num_hidden_layers, in_axes, self.remat, others)
        self.layers = block(cfg, self.dtype, self.attention)
        self.norm = RMSNorm(cfg.rms_norm_eps)
        if not cfg.tie_word_embeddings:
            init = nn.initializers.normal(cfg.hidden_size**-0.5)
            self.lm_head = Table("kernel", shape[::-1], init)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        valid: Array,
        cache: Cache | None = None,
        given: tuple[Array, Array] | None = None,
        layout: Layout = WHOLE,
    ) -> tuple[Array, Cache | None]:
        """tokens, positions [B,T] int32, valid [B,T] bool (False: padding, on either side) ->
        (hidden [B,T,D] after the final norm, cache).

        Without a cache a token sees the valid tokens up to itself in its row. With one it sees the
        cache's as well, and the cache comes back with these T tokens written behind them. Hidden
        states at padding are finite and meaningless. `given` replaces embeddings: values [B,T,D],
        and where [B,T] bool. `layout` is STEP in a loop over few tokens at a time.
        """
        length, cfg = tokens.shape[1], self.cfg
        mask = Causal(valid)
        if cache is not None:
            # A token sees what its row has written so far: [B,1,T,S] by place, [B,1,1,S] by
            # validity.
            index = cache["index"]
            cache = cache | {"valid": write_rows(cache["valid"], valid, index)}
            places = jnp.arange(cache["valid"].shape[1])
            written = places <= index[:, None, None, None] + jnp.arange(length)[:, None]
            mask = written & cache["valid"][:, None, None, :]
        if layout == STEP:
            # The loop over tokens meets the same kernels, unless a loop over layers slices them.
            unrolled = is_unrolled(cfg.num_hidden_layers)
            layout = dataclasses.replace(STEP, loop_invariant=unrolled)
        # Embeddings, then all blocks, which share positions and mask.
        x = lookup(self.embed_tokens(), tokens, self.dtype, layout.stream)
        if given is not None:
            values, places = given
            x = pin(jnp.where(places[..., None], values.astype(x.dtype), x), layout.stream)
        angles = rotary_angles(positions, cfg.head_dim, cfg.rope_theta)
        layers = jnp.arange(cfg.num_hidden_layers)
        (x, cache), _ = self.layers((x, cache), layers, angles, mask, layout)
        if cache is not None:
            cache = cache | {"index": index + length}
        if self.is_initializing() and not cfg.tie_word_embeddings:
            self.lm_head()  # only `logits` reads it, but it must exist
        return self.norm(pin_rows(x)), cache

    def hidden_states(self, tokens: Array, positions: Array, valid: Array) -> Array:
        """Inputs of `__call__` without a cache -> [L+1,B,T,D], as transformers' hidden_states: the
        embeddings, the output of each layer but the last, and `__call__`'s own result."""
        cfg = self.cfg
        x = lookup(self.embed_tokens(), tokens, self.dtype, WHOLE.stream)
        angles = rotary_angles(positions, cfg.head_dim, cfg.rope_theta)
        layers = jnp.arange(cfg.num_hidden_layers)
        _, outputs = self.layers.with_output((x, None), layers, angles, Causal(valid), WHOLE)
        last = self.norm(pin_rows(outputs[-1]))
        return jnp.concatenate([x[None], outputs[:-1], last[None]])

    def logits(self, hidden: Array, start: int = 0, size: int | None = None) -> Array:
        """hidden [...,D] -> f32 logits [...,size] of the ids from `start` on; all of the vocabulary
        from there when `size` is None. Raises ValueError for a range beyond the vocabulary."""
        table = self._table(start, size).astype(self.dtype)
        equation = "...d,vd->...v" if self.cfg.tie_word_embeddings else "...d,dv->...v"
        return head_logits(equation, hidden, table)

    def head(self, start: int = 0, size: int | None = None) -> Array:
        """What `logits` multiplies hidden states by, [D,size] in `dtype`, its vocabulary sharded
        along "fsdp" too: for loops over `step_logits`, which would transpose a tied table, or
        gather its width, at every step."""
        table = self._table(start, size)
        table = table.T if self.cfg.tie_word_embeddings else table
        return pin(pin(table.astype(self.dtype), ("fsdp", "tensor")), (None, ("tensor", "fsdp")))

    def _table(self, start: int, size: int | None) -> Array:
        """The ids' part of the embedding [V,D] when tied, else of the head [D,V]."""
        vocabulary = self.cfg.vocab_size
        stop = vocabulary if size is None else start + size
        if not 0 <= start < stop <= vocabulary:
            raise ValueError(f"ids {start} to {stop} are not in a vocabulary of {vocabulary}")
        if self.cfg.tie_word_embeddings:
            return self.embed_tokens()[start:stop]
        return self.lm_head()[:, start:stop]
