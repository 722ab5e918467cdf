"""DC-AE (arXiv 2410.10733): a deterministic autoencoder of high compression, diffusers'
AutoencoderDC with channels last.

Latents are raw here as they are there; the diffusion model works on `scaling_factor` times them,
see `encode_scaled` and `decode_scaled`. Where pixels move into channels and back, the channel order
is torch's: c * 4 + dy * 2 + dx.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import Array

from blip3o_jax.config import DcAeConfig
from blip3o_jax.kernels.attention import linear_attention
from blip3o_jax.models.layers import Conv2d, Dtype, Linear, RMSNorm

NORM_EPS = 1e-5


def pixel_unshuffle(x: Array) -> Array:
    """[B,2Y,2X,C] -> [B,Y,X,4C], torch.nn.functional.pixel_unshuffle."""
    return rearrange(x, "b (y i) (x j) c -> b y x (c i j)", i=2, j=2)


def pixel_shuffle(x: Array) -> Array:
    """[B,Y,X,4C] -> [B,2Y,2X,C], inverse of `pixel_unshuffle`."""
    return rearrange(x, "b y x (c i j) -> b (y i) (x j) c", i=2, j=2)


def average_channels(x: Array, features: int) -> Array:
    """Means of consecutive channels: [B,Y,X,C] -> [B,Y,X,features]."""
    return jnp.mean(rearrange(x, "b y x (c r) -> b y x c r", c=features), axis=-1)


def repeat_channels(x: Array, features: int) -> Array:
    """Every channel features/C times, one after the other: [B,Y,X,C] -> [B,Y,X,features]."""
    return repeat(x, "b y x c -> b y x (c r)", r=features // x.shape[-1])


class Down(nn.Module):
    """Half the rows and columns: a convolution plus, unless `shortcut` is off, averaged channels;
    DCDownBlock2d."""

    features: int
    unshuffle: bool
    shortcut: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.unshuffle:
            y = pixel_unshuffle(Conv2d(self.features // 4, 3, dtype=self.dtype, name="conv")(x))
        else:
            y = Conv2d(self.features, 3, stride=2, dtype=self.dtype, name="conv")(x)
        return y + average_channels(pixel_unshuffle(x), self.features) if self.shortcut else y


class Up(nn.Module):
    """Twice the rows and columns: a convolution plus, unless `shortcut` is off, repeated channels;
    DCUpBlock2d."""

    features: int
    interpolate: bool
    shortcut: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.interpolate:
            y = Conv2d(self.features, 3, doubled=True, dtype=self.dtype, name="conv")(x)
        else:
            y = pixel_shuffle(Conv2d(self.features * 4, 3, dtype=self.dtype, name="conv")(x))
        return y + pixel_shuffle(repeat_channels(x, self.features * 4)) if self.shortcut else y


class ResBlock(nn.Module):
    """Two convolutions, the norm after them; diffusers' ResBlock of autoencoder_dc."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        y = nn.silu(Conv2d(width, 3, dtype=self.dtype, name="conv1")(x))
        y = Conv2d(width, 3, use_bias=False, dtype=self.dtype, name="conv2")(y)
        return x + RMSNorm(NORM_EPS, use_bias=True, name="norm")(y)


def relu_linear_attention(q: Array, k: Array, v: Array) -> Array:
    """q, k, v [B,Y,X,N,H] -> [B,Y,X,N,H] f32: attention with relu(q) . relu(k) as weight, over all
    pixels, linear in their number."""
    flat = (
        a.astype(jnp.float32).reshape(len(a), -1, *a.shape[3:]) for a in (nn.relu(q), nn.relu(k), v)
    )
    return linear_attention(*flat).reshape(q.shape)


class MultiscaleAttention(nn.Module):
    """Linear attention on the projections and on their averages over neighbours;
    SanaMultiscaleLinearAttention."""

    head_dim: int
    kernel_sizes: tuple[int, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        heads = width // self.head_dim
        inner = heads * self.head_dim
        linear = functools.partial(Linear, dtype=self.dtype)
        conv = functools.partial(Conv2d, 3 * inner, use_bias=False, dtype=self.dtype)
        # The first scale: every pixel by itself.
        names = ("to_q", "to_k", "to_v")
        qkv = [linear("byxc,cd->byxd", (width, inner), name=name)(x) for name in names]
        qkv = jnp.concatenate(qkv, axis=-1)
        # Each further scale: a depth-wise convolution, then one that mixes within a head.
        scales = [qkv]
        for i, size in enumerate(self.kernel_sizes):
            y = conv(size, groups=3 * inner, name=f"multiscale{i}_in")(qkv)
            scales.append(conv(1, groups=3 * heads, name=f"multiscale{i}_out")(y))
        # A head is 3 * H consecutive channels of this, so its q, k and v may all come from to_q:
        # the published weights expect it.
        qkv = jnp.concatenate(scales, axis=-1)
        qkv = rearrange(qkv, "b y x (n k h) -> k b y x n h", k=3, h=self.head_dim)
        y = rearrange(relu_linear_attention(*qkv).astype(self.dtype), "b y x n h -> b y x (n h)")
        y = linear("byxd,dc->byxc", (y.shape[-1], width), name="to_out")(y)
        return x + RMSNorm(NORM_EPS, use_bias=True, name="norm_out")(y)


class GatedConv(nn.Module):
    """Point-wise, depth-wise, gate, point-wise, norm; GLUMBConv with its norm and residual."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, inner = x.shape[-1], 8 * x.shape[-1]
        conv = functools.partial(Conv2d, dtype=self.dtype)
        y = nn.silu(conv(inner, 1, name="conv_inverted")(x))
        y = conv(inner, 3, groups=inner, name="conv_depth")(y)
        # One half of the channels gates the other.
        y, gate = jnp.split(y, 2, axis=-1)
        y = conv(width, 1, use_bias=False, name="conv_point")(y * nn.silu(gate))
        return x + RMSNorm(NORM_EPS, use_bias=True, name="norm")(y)


class EfficientViTBlock(nn.Module):
    """Mixes all pixels, then neighbours; diffusers' EfficientViTBlock."""

    head_dim: int
    kernel_sizes: tuple[int, ...]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = MultiscaleAttention(self.head_dim, self.kernel_sizes, dtype=self.dtype, name="attn")(x)
        return GatedConv(dtype=self.dtype, name="conv_out")(x)


def _block(cfg: DcAeConfig, stage: int, index: int, dtype: Dtype) -> nn.Module:
    name = f"stage{stage}_block{index}"
    if cfg.block_types[stage] == "ResBlock":
        return ResBlock(dtype=dtype, name=name)
    scales = cfg.qkv_multiscales[stage]
    return EfficientViTBlock(cfg.attention_head_dim, scales, dtype=dtype, name=name)


class Encoder(nn.Module):
    """Images [B,Y,X,3] -> latents [B,Y/f,X/f,C]. A first stage without layers leaves halving
    to `conv_in`, without shortcut."""

    cfg: DcAeConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, dtype = self.cfg, self.dtype
        widths, layers = cfg.block_out_channels, cfg.encoder_layers_per_block
        unshuffle = cfg.downsample_block_type == "pixel_unshuffle"
        # Full resolution, or half of it where the first stage has no layers.
        if layers[0] > 0:
            x = Conv2d(widths[0], 3, dtype=dtype, name="conv_in")(x)
        else:
            x = Down(widths[1], unshuffle, shortcut=False, dtype=dtype, name="conv_in")(x)
        # Each stage's blocks, then half the resolution for the next one.
        for stage, count in enumerate(layers):
            for index in range(count):
                x = _block(cfg, stage, index, dtype)(x)
            if count > 0 and stage + 1 < len(widths):
                x = Down(widths[stage + 1], unshuffle, dtype=dtype, name=f"stage{stage}_down")(x)
        # Latents: a convolution plus averaged channels.
        y = Conv2d(cfg.latent_channels, 3, dtype=dtype, name="conv_out")(x)
        return y + average_channels(x, cfg.latent_channels)


class Decoder(nn.Module):
    """Latents [B,Y/f,X/f,C] -> images [B,Y,X,3], not clipped; from the last stage to the first."""

    cfg: DcAeConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Array) -> Array:
        cfg, dtype = self.cfg, self.dtype
        widths, layers = cfg.block_out_channels, cfg.decoder_layers_per_block
        interpolate = cfg.upsample_block_type == "interpolate"
        x = Conv2d(widths[-1], 3, dtype=dtype, name="conv_in")(z) + repeat_channels(z, widths[-1])
        # Twice the resolution of the stage before, then the stage's blocks.
        for stage in reversed(range(len(widths))):
            if layers[stage] > 0 and stage + 1 < len(widths):
                x = Up(widths[stage], interpolate, dtype=dtype, name=f"stage{stage}_up")(x)
            for index in range(layers[stage]):
                x = _block(cfg, stage, index, dtype)(x)
        # Pixels, at the first stage's resolution or at twice that of the second.
        x = nn.relu(RMSNorm(NORM_EPS, use_bias=True, name="norm_out")(x))
        if layers[0] > 0:
            return Conv2d(3, 3, dtype=dtype, name="conv_out")(x)
        return Up(3, interpolate, shortcut=False, dtype=dtype, name="conv_out")(x)


class DcAe(nn.Module):
    """diffusers' AutoencoderDC. Calling it reconstructs; both methods share its parameters."""

    cfg: DcAeConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.cfg, self.dtype)
        self.decoder = Decoder(self.cfg, self.dtype)

    def __call__(self, images: Array) -> Array:
        return self.decode(self.encode(images))

    def encode(self, images: Array) -> Array:
        """images [B,Y,X,3] in [-1, 1] -> raw latents [B,Y/f,X/f,C]; f must divide Y and X."""
        _, rows, columns, _ = images.shape
        if rows % self.cfg.factor or columns % self.cfg.factor:
            raise ValueError(
                f"DC-AE: an image of {rows}x{columns} pixels is not divisible into latents of "
                f"{self.cfg.factor} pixels"
            )
        return self.encoder(images.astype(self.dtype))

    def decode(self, latents: Array) -> Array:
        """Raw latents [B,Y/f,X/f,C] -> images [B,Y,X,3], about in [-1, 1]: clip before use."""
        return self.decoder(latents.astype(self.dtype))

    def encode_scaled(self, images: Array) -> Array:
        """The latents that the diffusion model is trained on: `encode` times scaling_factor."""
        return self.encode(images) * self.cfg.scaling_factor

    def decode_scaled(self, latents: Array) -> Array:
        """Images of the diffusion model's latents; inverse of `encode_scaled`."""
        return self.decode(latents / self.cfg.scaling_factor)
