"""TA-Tok: images to tokens and tokens to features (docs/model.md §2.3; "Vision as a Dialect", arXiv
2506.18898).

A SigLIP2 encoder gives features; SimVQ names each by its nearest code on the unit sphere, where the
codes are a trained linear map of a frozen random table; a small ViT turns codes back into features.
Everything from the projection into the code space to the choice of an id is f32, whatever `dtype`:
in bf16 about one id in 25 comes out differently.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.config import TaTokConfig
from blip3o_jax.models.layers import Dtype, LayerNorm, Linear
from blip3o_jax.models.siglip import SiglipEncoder, blocks, position_init

_CODES_AT_ONCE = 4096  # scores held at a time: all 65536 codes would take 191 MB per image


class Quantized(NamedTuple):
    """What training a quantizer needs. n tokens, V codes, E the code width; all f32 but `ids`."""

    z: Array  # [B,n,E] projected features, unit length
    cosines: Array  # [B,n,V] of z with every code
    ids: Array  # [B,n] int32
    codes: Array  # [B,n,E] the chosen codes; gradients reach the codebook
    # [B,n,E] the chosen codes' values; gradients reach z as if nothing had been quantized
    straight_through: Array


def unit(x: Array) -> Array:
    """x / max(|x|, 1e-12) over the last axis: torch.nn.functional.normalize, with a finite gradient
    at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def cosine(z: Array, codebook: Array) -> Array:
    """z [B,n,E], codebook [V,E], both of unit length -> [B,n,V]; full f32 products also where TPUs
    would round the inputs to bf16."""
    return jnp.einsum("bte,ve->btv", z, codebook, precision="highest")


def choose(z: Array, codebook: Array, temperature: float, key: Array | None = None) -> Array:
    """Ids [B,n] of the nearest codes, or with a key ids drawn from softmax(cosine / temperature).

    Keeps the best of block after block of the codebook; drawing is the same with Gumbel noise.
    """
    size = math.gcd(codebook.shape[0], _CODES_AT_ONCE)

    def step(best, block):
        index, codes = block
        scores = cosine(z, codes)
        if key is not None:
            noise = jax.random.gumbel(jax.random.fold_in(key, index), scores.shape)
            scores = scores / temperature + noise
        # The block's best code, and whether it beats those before.
        ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        score = jnp.take_along_axis(scores, ids[..., None], axis=-1)[..., 0]
        better = score > best[0]
        score = jnp.where(better, score, best[0])
        return (score, jnp.where(better, ids + index * size, best[1])), None

    start = (jnp.full_like(z[..., 0], -jnp.inf), jnp.zeros_like(z[..., 0], jnp.int32))
    split = codebook.reshape(-1, size, codebook.shape[1])
    return jax.lax.scan(step, start, (jnp.arange(split.shape[0], dtype=jnp.int32), split))[0][1]


class SimVQ(nn.Module):
    """The codebook [V,E] of SimVQ: a frozen random table, mapped by a trained Linear, rows of unit
    length. f32."""

    codes: int
    dim: int

    @nn.compact
    def __call__(self) -> Array:
        init = nn.initializers.normal(self.dim**-0.5)
        frozen = jax.lax.stop_gradient(self.param("embedding", init, (self.codes, self.dim)))
        project = Linear("vd,de->ve", (self.dim, self.dim), True, name="embedding_proj")
        with jax.default_matmul_precision("highest"):
            return unit(project(frozen))


class Bottleneck(nn.Module):
    """Linear into the code space, codebook, Linear out of it."""

    cfg: TaTokConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        width, dim = self.cfg.encoder.hidden_size, self.cfg.bottleneck_dim
        self.in_linear = Linear("btd,de->bte", (width, dim), True)
        self.out_linear = Linear("bte,ed->btd", (dim, dim), True, self.dtype)
        self.regularizer = SimVQ(self.cfg.codebook_size, dim)

    def codebook(self) -> Array:
        return self.regularizer()

    def project(self, features: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return unit(self.in_linear(features.astype(jnp.float32)))

    def expand(self, codes: Array) -> Array:
        return self.out_linear(codes)


def resize_positions(positions: Array, grid: int) -> Array:
    """Learned positions [side*side,D] -> [grid*grid,D]: bilinear, antialiased
    (Siglip2VisionEmbeddings.resize_positional_embeddings)."""
    side, width = math.isqrt(positions.shape[0]), positions.shape[1]
    square = positions.astype(jnp.float32).reshape(side, side, width)
    resized = jax.image.resize(square, (grid, grid, width), "linear", antialias=True)
    return resized.reshape(grid * grid, width)


class Decoder(nn.Module):
    """Siglip2VisionModel over a square of vectors: [B,n,E] -> [B,n,D] after post_layernorm."""

    cfg: TaTokConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg, width, eps = self.cfg, self.cfg.encoder.hidden_size, self.cfg.encoder.layer_norm_eps
        grid = math.isqrt(x.shape[1])
        if grid * grid != x.shape[1]:
            raise ValueError(f"TA-Tok decodes a square of tokens, which {x.shape[1]} is not")
        shape = (cfg.bottleneck_dim, width)
        x = Linear("bte,ed->btd", shape, True, self.dtype, name="patch_embedding")(x)
        # The positions were learned for a grid that may be another one.
        shape = (cfg.decoder_num_patches, width)
        positions = self.param("position_embedding", position_init, shape)
        x = x + resize_positions(positions, grid).astype(self.dtype)
        sizes = (cfg.decoder_num_attention_heads, cfg.decoder_intermediate_size, eps)
        x, _ = blocks(cfg.decoder_depth, *sizes, self.dtype, name="layers")(x, None)
        return LayerNorm(eps, name="post_layernorm")(x)


class TaTok(nn.Module):
    """TextAlignedTokenizer. Calls that do not decode need no parameter of the decoding half; calls
    given `codebook` (of `codebook()`, worth computing once) no `bottleneck/regularizer`."""

    cfg: TaTokConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        cfg, width = self.cfg, self.cfg.encoder.hidden_size
        square = functools.partial(Linear, "btd,de->bte", (width, width), True, self.dtype)
        self.encoder = SiglipEncoder(cfg.encoder, cfg.num_encoder_layers, self.dtype)
        self.encode_task_layer = square()
        self.bottleneck = Bottleneck(cfg, self.dtype)
        self.decoder = Decoder(cfg, self.dtype)
        self.decode_task_layer_0 = square()
        self.decode_task_layer_2 = square()

    def pooled(self, images: Array) -> Array:
        """images [B,H,W,3] in [-1,1] -> the encoder's selected hidden state, one vector for each
        token [B,n,D], row by row."""
        cfg, pool = self.cfg, self.cfg.pool_scale
        with jax.named_scope("ta_tok_encoder"):
            x = self.encoder(images)
        if pool > 1:
            # Means over pool x pool patches, of those that fill a square of them.
            used = cfg.grid * pool
            x = x.reshape(-1, cfg.encoder.grid, cfg.encoder.grid, x.shape[-1])[:, :used, :used]
            x = x.reshape(-1, cfg.grid, pool, cfg.grid, pool, x.shape[-1]).mean(axis=(2, 4))
            x = x.reshape(-1, cfg.num_tokens, x.shape[-1])
        return x

    def features(self, images: Array) -> Array:
        """images [B,H,W,3] in [-1,1] -> the features that are quantized, [B,n,D] in (-1,1) (the
        original's vq_feats)."""
        return jnp.tanh(self.encode_task_layer(self.pooled(images)))

    def codebook(self) -> Array:
        """The codes [V,E], unit length, f32."""
        return self.bottleneck.codebook()

    def encode(
        self, images: Array, codebook: Array | None = None, key: Array | None = None
    ) -> Array:
        """images [B,H,W,3] in [-1,1] -> ids [B,n] int32: the nearest code by cosine.

        With a PRNG key ids are drawn from softmax(cosine / stochastic_temperature), as the original
        does whenever it is in training mode, BLIP3o-NEXT's training included (docs/model.md §6.6
        no. 2).
        """
        codebook = self.codebook() if codebook is None else codebook
        z = self.bottleneck.project(self.features(images))
        with jax.named_scope("ta_tok_choose"):
            return choose(z, codebook, self.cfg.stochastic_temperature, key)

    def quantize(self, features: Array, key: Array | None = None) -> Quantized:
        """features [B,n,D] -> Quantized, with all cosines at once; `key` as in `encode`."""
        codebook = self.codebook()
        z = self.bottleneck.project(features)
        # The choice itself has no gradient; z gets that of the chosen code.
        fixed = (jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook))
        ids = choose(*fixed, self.cfg.stochastic_temperature, key)
        codes = codebook[ids]
        return Quantized(z, cosine(z, codebook), ids, codes, z + jax.lax.stop_gradient(codes - z))

    def decode(self, codes: Array, codebook: Array | None = None) -> Array:
        """ids [B,n] of `codebook`, or code vectors [B,n,E] as in Quantized -> features [B,n,D]."""
        if codes.ndim == 2:
            codes = (self.codebook() if codebook is None else codebook)[codes]
        with jax.named_scope("ta_tok_decoder"):
            x = self.decoder(self.bottleneck.expand(codes))
        return self.decode_task_layer_2(jnp.tanh(self.decode_task_layer_0(x)))

    def __call__(self, images: Array, key: Array | None = None) -> tuple[Array, Array, Quantized]:
        """One pass through all parts: images -> (features to be matched [B,n,D], decoded features
        [B,n,D], Quantized)."""
        features = self.features(images)
        quantized = self.quantize(features, key)
        return features, self.decode(quantized.straight_through), quantized
