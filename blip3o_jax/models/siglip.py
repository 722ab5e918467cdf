"""The vision transformer of SigLIP, which TA-Tok uses twice: as its image encoder and, with other
inputs, as its feature decoder.

Mirrors transformers' SiglipVisionModel (fixed resolution) up to a chosen layer: no post_layernorm
and no pooling head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.config import SiglipConfig
from blip3o_jax.errors import InputError
from blip3o_jax.models.attention import attention
from blip3o_jax.models.layers import LayerNorm, Linear, gelu_tanh, scan_layers
from blip3o_jax.parallel.activations import keep_rows

position_init = nn.initializers.normal(0.02)


class SelfAttention(nn.Module):
    """SiglipAttention: full attention of [B,T,D] over itself, every projection with a bias."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        q, k, v = (
            Linear("btd,dnh->btnh", (width, *heads), True, self.dtype, name=name)(x)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = attention(q, k, v, mask=None, scale=heads[1] ** -0.5)
        return Linear("btnh,nhd->btd", (*heads, width), True, self.dtype, name="out_proj")(x)


class Mlp(nn.Module):
    """SiglipMLP: fc2(gelu_tanh(fc1 x)), [B,T,D] -> [B,T,D]."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = gelu_tanh(Linear("btd,df->btf", (width, self.hidden), True, self.dtype, name="fc1")(x))
        return Linear("btf,fd->btd", (self.hidden, width), True, self.dtype, name="fc2")(x)


class Block(nn.Module):
    """SiglipEncoderLayer: pre-norm attention and MLP.

    Takes and returns what nn.scan wants: (x, nothing).
    """

    num_heads: int
    mlp_hidden: int
    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, _):
        with jax.named_scope("self_attn"):
            x = x + SelfAttention(self.num_heads, self.dtype, name="self_attn")(
                LayerNorm(self.eps, name="layer_norm1")(x)
            )
        with jax.named_scope("mlp"):
            x = x + Mlp(self.mlp_hidden, self.dtype, name="mlp")(
                LayerNorm(self.eps, name="layer_norm2")(x)
            )
        return keep_rows(x), None


def blocks(
    num_layers: int, num_heads: int, mlp_hidden: int, eps: float, dtype, name: str | None = None
):
    """`num_layers` Blocks as one scanned module: call it with (x [B,T,D], None); parameters have a
    leading axis L."""
    return scan_layers(Block, num_layers)(num_heads, mlp_hidden, eps, dtype, name=name)


class SiglipEncoder(nn.Module):
    """SiglipVisionModel's hidden state after `num_layers` layers, before any post_layernorm.

    images [B,image_size,image_size,3] in [-1,1] -> [B,grid*grid,D], row by row. Pixels right of and
    below the last whole patch are ignored, as in PyTorch's valid convolution. Raises InputError for
    another image size: the positions are learned for this one.
    """

    cfg: SiglipConfig
    num_layers: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        cfg, size = self.cfg, self.cfg.patch_size
        if images.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise InputError(
                f"SigLIP takes images of {cfg.image_size}x{cfg.image_size}x3, not "
                f"{'x'.join(map(str, images.shape[1:]))}."
            )
        used = cfg.grid * size
        # [B,Y,i,X,j,C]
        patches = images[:, :used, :used].reshape(-1, cfg.grid, size, cfg.grid, size, 3)
        shape = (size, size, 3, cfg.hidden_size)
        x = Linear("byixjc,ijcd->byxd", shape, True, self.dtype, name="patch_embedding")(patches)
        x = x.reshape(-1, cfg.grid**2, cfg.hidden_size)
        positions = self.param("position_embedding", position_init, (cfg.grid**2, cfg.hidden_size))
        x = keep_rows(x + positions.astype(self.dtype))
        layers = blocks(
            self.num_layers,
            cfg.num_attention_heads,
            cfg.intermediate_size,
            cfg.layer_norm_eps,
            self.dtype,
            name="layers",
        )
        return layers(x, None)[0]
