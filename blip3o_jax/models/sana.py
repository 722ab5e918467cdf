"""SANA (arXiv 2410.10629, 2501.18427), the diffusion transformer: diffusers' SanaTransformer2DModel
with channels last.

Its self-attention is linear in the number of latent pixels, and neighbours mix in the
feed-forward's depth-wise convolution, so that positions need no embedding and any grid will do.
More axis letters: M modulations, E the model width where a product has it twice.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blip3o_jax.config import SanaConfig
from blip3o_jax.kernels.attention import attention, linear_attention
from blip3o_jax.kernels.products import unstack
from blip3o_jax.models.layers import Conv2d, Dtype, Linear, RMSNorm, layer_norm, scan_layers
from blip3o_jax.models.sana_time import HERE, SpanEmbed, TimeEmbed
from blip3o_jax.parallel.activations import pin_rows

QK_NORM_EPS = 1e-5
CAPTION_NORM_EPS = 1e-5
OUT_NORM_EPS = 1e-6

KeysValues = tuple[Array, Array]  # [B,S,N,H] each, or with L before B
# Which condition tokens [B,S] and pixels [B,Y,X] exist, bool; None: all.
Masks = tuple[Array | None, Array | None]


def grid_positions(cfg: SanaConfig, rows: int, columns: int) -> np.ndarray:
    """Fixed positions [Y,X,D] f32: sines and cosines of the column, then of the row, each stretched
    to `sample_size`; PatchEmbed's."""
    quarter = cfg.hidden_size // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
    scale = np.float32(cfg.interpolation_scale)

    def embed(length):
        places = np.arange(length, dtype=np.float32) / np.float32(length / cfg.sample_size) / scale
        angles = places[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    half = (rows, columns, 2 * quarter)
    by_column = np.broadcast_to(embed(columns)[None], half)
    by_row = np.broadcast_to(embed(rows)[:, None], half)
    return np.concatenate([by_column, by_row], axis=-1, dtype=np.float32)


def modulate(x: Array, shift: Array, scale: Array, eps: float) -> Array:
    """LayerNorm of x [B,Y,X,D] without parameters, times 1 + scale, plus shift, both [B,D] f32;
    result in x's dtype."""
    y = layer_norm(x.astype(jnp.float32), eps)
    return (y * (1 + scale[:, None, None]) + shift[:, None, None]).astype(x.dtype)


def relu_linear_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Of the tokens that exist, mask [B,T] bool: the others' keys are zero, which adds nothing to
    either sum."""
    k = nn.relu(k)
    return linear_attention(nn.relu(q), k if mask is None else k * mask[..., None, None], v)


def cross_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """To the condition tokens that exist, mask [B,S] bool."""
    mask = None if mask is None else mask[:, None, None, :]
    return attention(q, k, v, mask, q.shape[-1] ** -0.5)


class Attention(nn.Module):
    """x [B,T,D] attends to keys and values by `attend(q, k, v, mask)`; q and k are normed over all
    channels of all heads together."""

    width: int
    heads: int
    attend: Callable
    qk_norm: bool
    qkv_bias: bool
    dtype: Dtype = jnp.float32

    def setup(self):
        heads = (self.heads, self.width // self.heads)
        project = functools.partial(
            Linear, "btd,dnh->btnh", (self.width, *heads), self.qkv_bias, self.dtype
        )
        self.to_q = project()
        self.to_k = project()
        self.to_v = project()
        if self.qk_norm:
            self.norm_q = RMSNorm(QK_NORM_EPS)
            self.norm_k = RMSNorm(QK_NORM_EPS)
        self.to_out = Linear("btnh,nhd->btd", (*heads, self.width), True, self.dtype)

    def keys_values(self, context: Array) -> KeysValues:
        """context [B,S,D] -> (k, v), each [B,S,N,H]."""
        k = self.to_k(context)
        if self.qk_norm:
            k = self.norm_k(k.reshape(context.shape)).reshape(k.shape)
        return k, self.to_v(context)

    def __call__(self, x: Array, keys_values: KeysValues, mask: Array | None) -> Array:
        q = self.to_q(x)
        if self.qk_norm:
            q = self.norm_q(q.reshape(x.shape)).reshape(q.shape)
        return self.to_out(self.attend(q, *keys_values, mask))


class MixFfn(nn.Module):
    """Point-wise, 3x3 depth-wise, gate, point-wise on x [B,Y,X,D]; GLUMBConv without norm and
    residual. Pixels outside `mask` [B,Y,X] are as what lies beyond the border: zeros."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        width, both = x.shape[-1], 2 * self.hidden
        linear = functools.partial(Linear, dtype=self.dtype)
        y = linear("byxd,df->byxf", (width, both), use_bias=True, name="conv_inverted")(x)
        y = nn.silu(y) if mask is None else nn.silu(y) * mask[..., None]
        y = Conv2d(both, 3, groups=both, dtype=self.dtype, name="conv_depth")(y)
        y, gate = jnp.split(y, 2, axis=-1)
        y = y * nn.silu(gate)
        return linear("byxf,fd->byxd", (self.hidden, width), name="conv_point")(y)


class Block(nn.Module):
    """SanaTransformerBlock as a scan step: carry x [B,Y,X,D], encoded condition [B,S,D], modulation
    [B,6,D], and which condition tokens and pixels exist."""

    cfg: SanaConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        cfg, width = self.cfg, self.cfg.hidden_size
        init = nn.initializers.normal(width**-0.5)
        self.scale_shift_table = self.param("scale_shift_table", init, (6, width))
        options = {"qk_norm": cfg.qk_norm, "dtype": self.dtype}
        self.attn1 = Attention(
            width, cfg.num_attention_heads, relu_linear_attention, qkv_bias=False, **options
        )
        self.attn2 = Attention(
            width, cfg.num_cross_attention_heads, cross_attention, qkv_bias=True, **options
        )
        self.ff = MixFfn(cfg.mlp_hidden, dtype=self.dtype)

    def __call__(self, x: Array, condition: Array, modulation: Array, masks: Masks):
        return self.step(x, self.attn2.keys_values(condition), None, modulation, masks)

    def keys_values(self, carry: None, condition: Array):
        """Keys and values of the cross-attention, as a scan step that carries nothing."""
        return carry, self.attn2.keys_values(condition)

    def without_condition(self, carry: None, token: Array):
        """The cross-attention's result if all condition tokens equal `token` [1,1,D], likewise."""
        return carry, self.attn2.to_out(self.attn2.to_v(token))

    def step(
        self,
        x: Array,
        keys_values: KeysValues,
        without_condition: Array | None,
        modulation: Array,
        masks: Masks,
    ):
        """`__call__` given the condition's keys and values; with the cross-attention of rows
        without a condition, only the last row of each sample attends."""
        eps = self.cfg.norm_eps
        condition_mask, mask = masks
        shifts = self.scale_shift_table.astype(jnp.float32) + modulation  # [B,6,D]
        shift1, scale1, gate1, shift2, scale2, gate2 = unstack(shifts, axis=1)

        def tokens(y):
            return y.reshape(y.shape[0], -1, y.shape[-1])

        def gated(y, gate):
            return y * gate[:, None, None].astype(self.dtype)

        with jax.named_scope("self_attention"):
            y = tokens(modulate(x, shift1, scale1, eps))
            flat = None if mask is None else mask.reshape(mask.shape[0], -1)
            y = self.attn1(y, self.attn1.keys_values(y), flat)
            x = x + gated(y.reshape(x.shape), gate1)
        with jax.named_scope("cross_attention"):  # no norm before and no gate after
            if without_condition is None:
                x = x + self.attn2(tokens(x), keys_values, condition_mask).reshape(x.shape)
            else:
                # Only the last row of a sample attends; the result of those before it is known.
                rows = x.reshape(keys_values[0].shape[0], -1, *x.shape[1:])
                others, last = rows[:, :-1] + without_condition[:, None, None], rows[:, -1]
                y = self.attn2(tokens(last), keys_values, condition_mask)
                last = last + y.reshape(last.shape)
                x = jnp.concatenate([others, last[:, None]], axis=1).reshape(x.shape)
        with jax.named_scope("mix_ffn"):
            x = x + gated(self.ff(modulate(x, shift2, scale2, eps), mask), gate2)
        return pin_rows(x), None


class CaptionProjection(nn.Module):
    """condition [B,S,caption] -> [B,S,D]; PixArtAlphaTextProjection."""

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, condition: Array) -> Array:
        linear = functools.partial(Linear, "bsd,de->bse", use_bias=True, dtype=self.dtype)
        y = linear(shape=(condition.shape[-1], self.width), name="linear_1")(condition)
        return linear(shape=(self.width, self.width), name="linear_2")(nn.gelu(y))


class Sana(nn.Module):
    """SanaTransformer2DModel. Blocks are scanned, their parameters stacked [L,...].

    `dtype` is that of the matrix products and the residual stream; `remat` is a key of
    layers.REMAT.

    One of few steps gives mean velocities: over a `span` [B,4], which is the noise level less that
    at the step's end, 1 - 1/scale of the guidance, and the levels between which it guides. Without
    a span it is the velocity at the noise level, not guided.
    """

    cfg: SanaConfig
    dtype: Dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        cfg, width, dtype = self.cfg, self.cfg.hidden_size, self.dtype
        linear = functools.partial(Linear, use_bias=True, dtype=dtype)
        self.patch_embed = linear("byxc,cd->byxd", (cfg.in_channels, width))
        self.time_embed = TimeEmbed(width, dtype)
        if cfg.few_steps:
            self.span_embed = SpanEmbed(width, dtype)
        self.caption_projection = CaptionProjection(width, dtype)
        self.caption_norm = RMSNorm(CAPTION_NORM_EPS)
        others = {
            "keys_values": nn.broadcast,
            "without_condition": nn.broadcast,
            "step": (0, 0, nn.broadcast, nn.broadcast),
        }
        stack = scan_layers(Block, cfg.num_layers, remat=self.remat, others=others)
        self.transformer_blocks = stack(cfg, dtype)
        init = nn.initializers.normal(width**-0.5)
        self.scale_shift_table = self.param("scale_shift_table", init, (2, width))
        self.proj_out = linear("byxd,dc->byxc", (width, cfg.out_channels))

    @jax.named_scope("condition")
    def encode_condition(self, condition: Array, num_reference: int = 0) -> Array:
        """condition [B,S,caption] -> [B,S,D]; its last `num_reference` tokens are the pixels of
        reference latents, `sample_size` rows and columns each."""
        y = self.caption_norm(self.caption_projection(condition))
        if self.cfg.condition_positions:
            own, side = y.shape[1] - num_reference, self.cfg.sample_size
            grid = math.isqrt(own - 1)
            if grid * grid + 1 != own or num_reference % side**2:
                raise ValueError(
                    "SANA with condition_positions takes a first token, a square of others, and "
                    f"whole references, not {own} and {num_reference} tokens"
                )
            # The first token, that of <S0>, has no place.
            places = grid_positions(self.cfg, grid, grid).reshape(-1, y.shape[-1])
            reference = grid_positions(self.cfg, side, side).reshape(-1, y.shape[-1])
            references = [reference] * (num_reference // side**2)
            places = np.concatenate([0 * places[:1], places, *references])
            y = (y + places).astype(y.dtype)
        return pin_rows(y)

    def keys_values(self, condition: Array, num_reference: int = 0) -> KeysValues:
        """condition [B,S,caption] -> keys and values [L,B,S,N,H] of every block's cross-attention,
        for `step`: they depend on neither latents nor time, so a sampler needs them once an image.
        """
        encoded = self.encode_condition(condition, num_reference)
        return self.transformer_blocks.keys_values(None, encoded)[1]

    def without_condition(self, token: Array) -> Array:
        """What each block's cross-attention gives, [L,1,1,D], for a condition whose tokens all
        equal `token` [1,1,caption]; for `step`.

        Over equal keys and values softmax attention is the value, whatever the query. Raises
        ValueError with condition_positions, which make tokens differ.
        """
        if self.cfg.condition_positions:
            raise ValueError(
                "condition tokens with positions are not all equal: give `step` their keys and "
                "values"
            )
        return self.transformer_blocks.without_condition(None, self.encode_condition(token))[1]

    def __call__(
        self,
        latents: Array,
        t: Array,
        condition: Array,
        condition_mask: Array | None = None,
        reference: Array | None = None,
        has_reference: Array | None = None,
        num_reference: int = 0,
        span: Array | None = None,
    ) -> Array:
        """latents [B,Y,X,C], t [B] in (0, 1000], condition [B,S,caption] -> velocity [B,Y,X,C'].

        Tokens outside `condition_mask` [B,S] are not attended to. `reference` [B,Y,X,C], clean
        latents, stands beside the noisy ones, along the width; a row without one by
        `has_reference` [B] is computed as if it had none. `num_reference` as in
        `encode_condition`.
        """
        condition = self.encode_condition(condition, num_reference)
        beside = (condition_mask, reference, has_reference)
        return self._velocity(latents, t, span, self.transformer_blocks, (condition,), beside)

    def step(
        self,
        latents: Array,
        t: Array,
        keys_values: KeysValues,
        without_condition: Array | None = None,
        condition_mask: Array | None = None,
        reference: Array | None = None,
        has_reference: Array | None = None,
        span: Array | None = None,
    ) -> Array:
        """`__call__` with the result of `keys_values` in place of the condition.

        With that of `without_condition`, `keys_values` belong to the last of each sample's rows of
        latents, the others being without a condition.
        """
        blocks = self.transformer_blocks.step
        beside = (condition_mask, reference, has_reference)
        return self._velocity(latents, t, span, blocks, (keys_values, without_condition), beside)

    def _velocity(
        self, latents: Array, t: Array, span: Array | None, blocks: Callable, condition, beside
    ) -> Array:
        condition_mask, reference, has_reference = beside
        x, mask, columns = self._embed(latents), None, latents.shape[2]
        if reference is not None:
            x = pin_rows(jnp.concatenate([x, self._embed(reference)], axis=2))
        if has_reference is not None:
            exists = jnp.ones((len(x), 1), bool), has_reference[:, None]
            mask = jnp.repeat(jnp.concatenate(exists, axis=1), columns, axis=1)[:, None]
            mask = jnp.broadcast_to(mask, x.shape[:3])
        # The time modulates every block, and the output once more.
        e, modulation = self.time_embed(t, self._span(t, span))
        x, _ = blocks(x, *condition, modulation, (condition_mask, mask))
        shift, scale = jnp.moveaxis(self.scale_shift_table.astype(jnp.float32) + e[:, None], 1, 0)
        with jax.named_scope("output"):
            x = x[:, :, :columns]  # what the reference became is nobody's result
            return pin_rows(self.proj_out(modulate(x, shift, scale, OUT_NORM_EPS)))

    def _span(self, t: Array, span: Array | None) -> Array | float:
        """What the span adds to the embedding of the time t [B]."""
        if not self.cfg.few_steps:
            if span is not None:
                raise ValueError("this SANA has no few_steps, so it takes no span")
            return 0.0
        if span is not None or self.is_initializing():
            return self.span_embed(jnp.array([HERE]) if span is None else span)
        return 0.0

    def _embed(self, latents: Array) -> Array:
        """latents [B,Y,X,C] -> [B,Y,X,D] with their positions, if the config has any."""
        x = pin_rows(self.patch_embed(latents))
        if self.cfg.interpolation_scale is not None:
            x = (x + grid_positions(self.cfg, *latents.shape[1:3])).astype(self.dtype)
        return x
