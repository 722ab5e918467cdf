"""The vision transformer of SigLIP, which TA-Tok uses twice: as its image encoder and, with other
inputs, as its feature decoder.

Mirrors transformers' SiglipVisionModel (fixed resolution) up to a chosen layer: no post_layernorm
and no pooling head.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.config import SiglipConfig
from blip3o_jax.kernels.attention import attention
from blip3o_jax.models.layers import Dtype, LayerNorm, Linear, scan_layers
from blip3o_jax.parallel.activations import pin_rows

position_init = nn.initializers.normal(0.02)


class SelfAttention(nn.Module):
    """SiglipAttention: full attention of [B,T,D] over itself, every projection with a bias."""

    num_heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        linear = functools.partial(Linear, use_bias=True, dtype=self.dtype)
        q, k, v = (
            linear("btd,dnh->btnh", (width, *heads), name=name)(x)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = attention(q, k, v, mask=None, scale=heads[1] ** -0.5)
        return linear("btnh,nhd->btd", (*heads, width), name="out_proj")(y)


class Mlp(nn.Module):
    """SiglipMLP: fc2(gelu(fc1 x)), tanh's approximation, [B,T,D] -> [B,T,D]."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        y = Linear("btd,df->btf", (width, self.hidden), True, self.dtype, name="fc1")(x)
        fc2 = Linear("btf,fd->btd", (self.hidden, width), True, self.dtype, name="fc2")
        return fc2(nn.gelu(y))


class Block(nn.Module):
    """SiglipEncoderLayer, pre-norm attention and MLP, as a scan step: x -> (x, nothing)."""

    num_heads: int
    mlp_hidden: int
    eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, _: None):
        with jax.named_scope("self_attn"):
            y = LayerNorm(self.eps, name="layer_norm1")(x)
            x = x + SelfAttention(self.num_heads, self.dtype, name="self_attn")(y)
        with jax.named_scope("mlp"):
            y = LayerNorm(self.eps, name="layer_norm2")(x)
            x = x + Mlp(self.mlp_hidden, self.dtype, name="mlp")(y)
        return pin_rows(x), None


def blocks(
    num_layers: int,
    num_heads: int,
    mlp_hidden: int,
    eps: float,
    dtype: Dtype,
    name: str | None = None,
) -> nn.Module:
    """`num_layers` Blocks as one scanned module: call it with (x [B,T,D], None); parameters have a
    leading axis L."""
    return scan_layers(Block, num_layers)(num_heads, mlp_hidden, eps, dtype, name=name)


class SiglipEncoder(nn.Module):
    """SiglipVisionModel's hidden state after `num_layers` layers, before any post_layernorm.

    images [B,image_size,image_size,3] in [-1,1] -> [B,grid*grid,D], row by row. Pixels right of and
    below the last whole patch are ignored, as in PyTorch's valid convolution. Raises ValueError for
    another image size: the positions are learned for this one.
    """

    cfg: SiglipConfig
    num_layers: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        cfg, size, width = self.cfg, self.cfg.patch_size, self.cfg.hidden_size
        if images.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            side, given = cfg.image_size, "x".join(map(str, images.shape[1:]))
            raise ValueError(f"SigLIP takes images of {side}x{side}x3, not {given}")
        # Whole patches, each one product with the embedding's kernel.
        used = cfg.grid * size
        patches = images[:, :used, :used]
        patches = patches.reshape(-1, cfg.grid, size, cfg.grid, size, 3)  # [B,Y,i,X,j,C]
        embed = Linear(
            "byixjc,ijcd->byxd", (size, size, 3, width), True, self.dtype, name="patch_embedding"
        )
        x = embed(patches).reshape(-1, cfg.grid**2, width)  # [B,T,D]
        positions = self.param("position_embedding", position_init, (cfg.grid**2, width))
        x = pin_rows(x + positions.astype(self.dtype))
        sizes = (cfg.num_attention_heads, cfg.intermediate_size, cfg.layer_norm_eps)
        return blocks(self.num_layers, *sizes, self.dtype, name="layers")(x, None)[0]
