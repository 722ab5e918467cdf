"""SANA (arXiv 2410.10629, 2501.18427), the diffusion transformer: diffusers' SanaTransformer2DModel
with channels last.

Its self-attention is linear in the number of latent pixels, and neighbours meet in the
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

from blip3o_jax.config import SanaConfig
from blip3o_jax.errors import InputError
from blip3o_jax.kernels.cpu import in_memory
from blip3o_jax.models.attention import attention, linear_attention
from blip3o_jax.models.layers import (
    Conv2d,
    Linear,
    RMSNorm,
    gelu_tanh,
    layer_norm,
    scan_layers,
    timestep_embedding,
)
from blip3o_jax.parallel.activations import keep_rows

QK_NORM_EPS = 1e-5
CAPTION_NORM_EPS = 1e-5
OUT_NORM_EPS = 1e-6


def grid_positions(cfg: SanaConfig, rows: int, columns: int) -> np.ndarray:
    """Fixed positions [Y,X,D] f32: sines and cosines of the column, then of the row, each stretched
    to `sample_size`; PatchEmbed's."""
    quarter = cfg.hidden_size // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)

    def embed(length):
        places = (
            np.arange(length, dtype=np.float32)
            / np.float32(length / cfg.sample_size)
            / np.float32(cfg.interpolation_scale)
        )
        angles = places[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    half = (rows, columns, 2 * quarter)
    return np.concatenate(
        [np.broadcast_to(embed(columns)[None], half), np.broadcast_to(embed(rows)[:, None], half)],
        axis=-1,
        dtype=np.float32,
    )


def modulate(x, shift, scale, eps: float):
    """LayerNorm of x [B,Y,X,D] without parameters, times 1 + scale, plus shift, both [B,D] f32;
    result in x's dtype."""
    y = layer_norm(x.astype(jnp.float32), eps)
    return (y * (1 + scale[:, None, None]) + shift[:, None, None]).astype(x.dtype)


def relu_linear_attention(q, k, v):
    return linear_attention(nn.relu(q), nn.relu(k), v)


class TimeEmbed(nn.Module):
    """t [B] -> (e [B,D] for the output, m [B,6,D] for all blocks), f32; AdaLayerNormSingle."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t):
        sinus = timestep_embedding(t)
        e = Linear(
            "bd,de->be",
            (sinus.shape[-1], self.width),
            use_bias=True,
            dtype=self.dtype,
            name="linear_1",
        )(sinus)
        e = Linear(
            "bd,de->be", (self.width, self.width), use_bias=True, dtype=self.dtype, name="linear_2"
        )(nn.silu(e))
        m = Linear(
            "bd,dme->bme",
            (self.width, 6, self.width),
            use_bias=True,
            dtype=self.dtype,
            name="linear",
        )(nn.silu(e))
        return e.astype(jnp.float32), m.astype(jnp.float32)


class Attention(nn.Module):
    """x [B,T,D] attends to keys and values by `attend(q, k, v)`; q and k are normed over all
    channels of all heads together."""

    width: int
    heads: int
    attend: Callable
    qk_norm: bool
    qkv_bias: bool
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape = (self.width, self.heads, self.width // self.heads)
        project = functools.partial(
            Linear, "btd,dnh->btnh", shape, use_bias=self.qkv_bias, dtype=self.dtype
        )
        self.to_q, self.to_k, self.to_v = project(), project(), project()
        if self.qk_norm:
            self.norm_q, self.norm_k = RMSNorm(QK_NORM_EPS), RMSNorm(QK_NORM_EPS)
        self.to_out = Linear(
            "btnh,nhd->btd", (*shape[1:], self.width), use_bias=True, dtype=self.dtype
        )

    def keys_values(self, context):
        """context [B,S,D] -> (k, v), each [B,S,N,H]."""
        k = self.to_k(context)
        if self.qk_norm:
            k = self.norm_k(k.reshape(context.shape)).reshape(k.shape)
        return k, self.to_v(context)

    def __call__(self, x, keys_values):
        q = self.to_q(x)
        if self.qk_norm:
            q = self.norm_q(q.reshape(x.shape)).reshape(q.shape)
        return self.to_out(self.attend(q, *keys_values))


class MixFfn(nn.Module):
    """Point-wise, 3x3 depth-wise, gate, point-wise on x [B,Y,X,D]; GLUMBConv without norm and
    residual."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width, both = x.shape[-1], 2 * self.hidden
        y = nn.silu(
            Linear(
                "byxd,df->byxf",
                (width, both),
                use_bias=True,
                dtype=self.dtype,
                name="conv_inverted",
            )(x)
        )
        y, gate = jnp.split(
            Conv2d(both, 3, groups=both, dtype=self.dtype, name="conv_depth")(y), 2, axis=-1
        )
        return Linear("byxf,fd->byxd", (self.hidden, width), dtype=self.dtype, name="conv_point")(
            y * nn.silu(gate)
        )


class Block(nn.Module):
    """SanaTransformerBlock as a scan step: carry x [B,Y,X,D], encoded condition [B,S,D], modulation
    [B,6,D]."""

    cfg: SanaConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg, width, dtype = self.cfg, self.cfg.hidden_size, self.dtype
        self.scale_shift_table = self.param(
            "scale_shift_table", nn.initializers.normal(width**-0.5), (6, width)
        )
        self.attn1 = Attention(
            width,
            cfg.num_attention_heads,
            relu_linear_attention,
            cfg.qk_norm,
            qkv_bias=False,
            dtype=dtype,
        )
        attend = functools.partial(attention, mask=None, scale=cfg.cross_attention_head_dim**-0.5)
        self.attn2 = Attention(
            width, cfg.num_cross_attention_heads, attend, cfg.qk_norm, qkv_bias=True, dtype=dtype
        )
        self.ff = MixFfn(cfg.mlp_hidden, dtype=dtype)

    def __call__(self, x, condition, modulation):
        return self.step(x, self.attn2.keys_values(condition), None, modulation)

    def keys_values(self, carry, condition):
        """Of the cross-attention, as a scan step that carries nothing."""
        return carry, self.attn2.keys_values(condition)

    def without_condition(self, carry, token):
        """What the cross-attention gives when all condition tokens equal `token` [1,1,D]: as a scan
        step that carries nothing."""
        return carry, self.attn2.to_out(self.attn2.to_v(token))

    def step(self, x, keys_values, without_condition, modulation):
        """`__call__` where the condition's keys and values are there already, and of pairs of rows
        the first's cross-attention too."""
        eps = self.cfg.norm_eps
        shifts = jnp.moveaxis(self.scale_shift_table.astype(jnp.float32) + modulation, 1, 0)
        # Apart in memory, so that each one's gradient is a sum of its own, and not computed inside
        # the array of all six.
        shift1, scale1, gate1, shift2, scale2, gate2 = in_memory(tuple(shifts))

        def tokens(y):
            return y.reshape(y.shape[0], -1, y.shape[-1])

        def gated(y, gate):
            return y * gate[:, None, None].astype(self.dtype)

        with jax.named_scope("self_attention"):
            y = tokens(modulate(x, shift1, scale1, eps))
            y = self.attn1(y, self.attn1.keys_values(y))
            x = x + gated(y.reshape(x.shape), gate1)
        with jax.named_scope("cross_attention"):  # no norm before and no gate after
            if without_condition is None:
                x = x + self.attn2(tokens(x), keys_values).reshape(x.shape)
            else:
                first, second = jnp.moveaxis(x.reshape(-1, 2, *x.shape[1:]), 1, 0)
                second = second + self.attn2(tokens(second), keys_values).reshape(second.shape)
                x = jnp.stack([first + without_condition[:, None], second], axis=1).reshape(x.shape)
        with jax.named_scope("mix_ffn"):
            x = x + gated(self.ff(modulate(x, shift2, scale2, eps)), gate2)
        return keep_rows(x), None


class CaptionProjection(nn.Module):
    """condition [B,S,caption] -> [B,S,D]; PixArtAlphaTextProjection."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, condition):
        y = Linear(
            "bsd,de->bse",
            (condition.shape[-1], self.width),
            use_bias=True,
            dtype=self.dtype,
            name="linear_1",
        )(condition)
        return Linear(
            "bsd,de->bse",
            (self.width, self.width),
            use_bias=True,
            dtype=self.dtype,
            name="linear_2",
        )(gelu_tanh(y))


class Sana(nn.Module):
    """SanaTransformer2DModel. Blocks are scanned, their parameters stacked [L,...].

    `dtype` is that of the matrix products and the residual stream. `remat` is what the backward
    pass computes again: "none" nothing, "full" each block, "dots" all of it but the projections.
    """

    cfg: SanaConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        cfg, width, dtype = self.cfg, self.cfg.hidden_size, self.dtype
        self.patch_embed = Linear(
            "byxc,cd->byxd", (cfg.in_channels, width), use_bias=True, dtype=dtype
        )
        self.time_embed = TimeEmbed(width, dtype)
        self.caption_projection = CaptionProjection(width, dtype)
        self.caption_norm = RMSNorm(CAPTION_NORM_EPS)
        self.transformer_blocks = scan_layers(
            Block,
            cfg.num_layers,
            remat=self.remat,
            others={
                "keys_values": nn.broadcast,
                "without_condition": nn.broadcast,
                "step": (0, 0, nn.broadcast),
            },
        )(cfg, dtype)
        self.scale_shift_table = self.param(
            "scale_shift_table", nn.initializers.normal(width**-0.5), (2, width)
        )
        self.proj_out = Linear(
            "byxd,dc->byxc", (width, cfg.out_channels), use_bias=True, dtype=dtype
        )

    def encode_condition(self, condition):
        """condition [B,S,caption] -> [B,S,D]."""
        with jax.named_scope("condition"):
            y = self.caption_norm(self.caption_projection(condition))
            if self.cfg.condition_positions:
                grid = math.isqrt(y.shape[1] - 1)
                if grid * grid + 1 != y.shape[1]:
                    raise InputError(
                        "SANA with condition_positions takes a first token and a square "
                        f"of others, not {y.shape[1]} tokens."
                    )
                places = grid_positions(self.cfg, grid, grid).reshape(-1, y.shape[-1])
                y = (y + np.pad(places, ((1, 0), (0, 0)))).astype(y.dtype)
            return keep_rows(y)

    def keys_values(self, condition):
        """condition [B,S,caption] -> keys and values [L,B,S,N,H] of every block's cross-attention,
        for `step`: neither latents nor time move them, so a sampler needs them once an image."""
        return self.transformer_blocks.keys_values(None, self.encode_condition(condition))[1]

    def without_condition(self, token):
        """Of a condition whose tokens all equal `token` [1,1,caption]: what each block's
        cross-attention gives, [L,1,1,D], for `step`.

        Over equal keys and values softmax attention is the value, whatever asks. Raises InputError
        with condition_positions, which make tokens differ.
        """
        if self.cfg.condition_positions:
            raise InputError(
                "Condition tokens with positions are not all equal: give `step` their keys "
                "and values."
            )
        return self.transformer_blocks.without_condition(None, self.encode_condition(token))[1]

    def __call__(self, latents, t, condition):
        """latents [B,Y,X,C], t [B] in (0, 1000], condition [B,S,caption] -> velocity [B,Y,X,C']."""
        return self._velocity(latents, t, self.transformer_blocks, self.encode_condition(condition))

    def step(self, latents, t, keys_values, without_condition=None):
        """`__call__` with the result of `keys_values` in place of the condition.

        With that of `without_condition`, latents are `flow.pairs` and `keys_values` belong to the
        second of each, the first being the one without.
        """
        return self._velocity(
            latents, t, self.transformer_blocks.step, keys_values, without_condition
        )

    def _velocity(self, latents, t, blocks, *condition):
        x = keep_rows(self.patch_embed(latents))
        if self.cfg.interpolation_scale is not None:
            x = (x + grid_positions(self.cfg, *latents.shape[1:3])).astype(self.dtype)
        e, modulation = self.time_embed(t)
        x, _ = blocks(x, *condition, modulation)
        shift, scale = jnp.moveaxis(self.scale_shift_table.astype(jnp.float32) + e[:, None], 1, 0)
        with jax.named_scope("output"):
            return keep_rows(self.proj_out(modulate(x, shift, scale, OUT_NORM_EPS)))
