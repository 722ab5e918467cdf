"""TA-Tok: images to tokens and tokens to features (docs/model.md §2.3; "Vision as a Dialect", arXiv
2506.18898).

A SigLIP2 encoder gives features; SimVQ names each by its nearest code on the unit sphere, where the
codes are a trained linear map of a frozen random table; a small ViT turns codes back into features.
Everything from the projection into the code space to the choice of an id is f32, whatever `dtype`:
in bf16 about one id in 25 comes out differently.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.config import TaTokConfig
from blip3o_jax.errors import InputError
from blip3o_jax.models.layers import LayerNorm, Linear
from blip3o_jax.models.siglip import SiglipEncoder, blocks, position_init

_CODES_AT_ONCE = 4096  # scores held at a time: all 65536 codes would take 191 MB per image


class Quantized(NamedTuple):
    """What training a quantiser needs. n tokens, V codes, E the code width; all f32 but `ids`."""

    z: jax.Array  # [B,n,E] projected features, unit length
    cosines: jax.Array  # [B,n,V] of z with every code
    ids: jax.Array  # [B,n] int32
    codes: jax.Array  # [B,n,E] the chosen codes; gradients reach the codebook
    # [B,n,E] the chosen codes' values; gradients reach z as if nothing had been quantised
    straight_through: jax.Array


def unit(x):
    """x / max(|x|, 1e-12) over the last axis: torch.nn.functional.normalize, with a finite gradient
    at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def cosine(z, codebook):
    """z [B,n,E], codebook [V,E], both of unit length -> [B,n,V]; full f32 products also where TPUs
    would round the inputs to bf16."""
    return jnp.einsum("bte,ve->btv", z, codebook, precision="highest")


def choose(z, codebook, temperature: float, key=None):
    """Ids [B,n] of the nearest codes, or with a key ids drawn from softmax(cosine / temperature).

    Goes through the codebook in blocks and keeps the best so far. Drawing is the same maximum after
    Gumbel noise is added.
    """
    size = math.gcd(codebook.shape[0], _CODES_AT_ONCE)

    def step(best, block):
        index, codes = block
        scores = cosine(z, codes)
        if key is not None:
            scores = scores / temperature + jax.random.gumbel(
                jax.random.fold_in(key, index), scores.shape
            )
        ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        score = jnp.take_along_axis(scores, ids[..., None], axis=-1)[..., 0]
        better = score > best[0]
        return (
            jnp.where(better, score, best[0]),
            jnp.where(better, ids + index * size, best[1]),
        ), None

    start = (jnp.full_like(z[..., 0], -jnp.inf), jnp.zeros_like(z[..., 0], jnp.int32))
    split = codebook.reshape(-1, size, codebook.shape[1])
    return jax.lax.scan(step, start, (jnp.arange(split.shape[0], dtype=jnp.int32), split))[0][1]


class SimVQ(nn.Module):
    """The codebook [V,E] of SimVQ: a frozen random table, mapped by a trained Linear, rows of unit
    length. f32."""

    codes: int
    dim: int

    @nn.compact
    def __call__(self):
        embedding = self.param(
            "embedding", nn.initializers.normal(self.dim**-0.5), (self.codes, self.dim)
        )
        frozen = jax.lax.stop_gradient(embedding)
        with jax.default_matmul_precision("highest"):
            return unit(
                Linear("vd,de->ve", (self.dim, self.dim), True, name="embedding_proj")(frozen)
            )


class Bottleneck(nn.Module):
    """Linear into the code space, codebook, Linear out of it."""

    cfg: TaTokConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        width, dim = self.cfg.encoder.hidden_size, self.cfg.bottleneck_dim
        self.in_linear = Linear("btd,de->bte", (width, dim), True)
        self.out_linear = Linear("bte,ed->btd", (dim, dim), True, self.dtype)
        self.regularizer = SimVQ(self.cfg.codebook_size, dim)

    def codebook(self):
        return self.regularizer()

    def project(self, features):
        with jax.default_matmul_precision("highest"):
            return unit(self.in_linear(features.astype(jnp.float32)))

    def expand(self, codes):
        return self.out_linear(codes)


def resize_positions(positions, grid: int):
    """Learned positions [side*side,D] -> [grid*grid,D]: bilinear, antialiased
    (Siglip2VisionEmbeddings.resize_positional_embeddings)."""
    side, width = math.isqrt(positions.shape[0]), positions.shape[1]
    square = positions.astype(jnp.float32).reshape(side, side, width)
    return jax.image.resize(square, (grid, grid, width), "linear", antialias=True).reshape(
        grid * grid, width
    )


class Decoder(nn.Module):
    """Siglip2VisionModel over a square of vectors: [B,n,E] -> [B,n,D] after post_layernorm."""

    cfg: TaTokConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        cfg, width, eps = self.cfg, self.cfg.encoder.hidden_size, self.cfg.encoder.layer_norm_eps
        grid = math.isqrt(x.shape[1])
        if grid * grid != x.shape[1]:
            raise InputError(
                f"TA-Tok decodes a square of tokens, and {x.shape[1]} is not a square number."
            )
        x = Linear(
            "bte,ed->btd", (cfg.bottleneck_dim, width), True, self.dtype, name="patch_embedding"
        )(x)
        positions = self.param(
            "position_embedding", position_init, (cfg.decoder_num_patches, width)
        )
        x = x + resize_positions(positions, grid).astype(self.dtype)
        layers = blocks(
            cfg.decoder_depth,
            cfg.decoder_num_attention_heads,
            cfg.decoder_intermediate_size,
            eps,
            self.dtype,
            name="layers",
        )
        return LayerNorm(eps, name="post_layernorm")(layers(x, None)[0])


class TaTok(nn.Module):
    """TextAlignedTokenizer.

    Calls that do not decode need no parameter of the decoding half, and calls that are given
    `codebook` (from `codebook()`, worth computing once) need none of `bottleneck/regularizer`.
    """

    cfg: TaTokConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg, width = self.cfg, self.cfg.encoder.hidden_size
        self.encoder = SiglipEncoder(cfg.encoder, cfg.num_encoder_layers, self.dtype)
        self.encode_task_layer = Linear("btd,de->bte", (width, width), True, self.dtype)
        self.bottleneck = Bottleneck(cfg, self.dtype)
        self.decoder = Decoder(cfg, self.dtype)
        self.decode_task_layer_0 = Linear("btd,de->bte", (width, width), True, self.dtype)
        self.decode_task_layer_2 = Linear("btd,de->bte", (width, width), True, self.dtype)

    def features(self, images):
        """images [B,H,W,3] in [-1,1] -> the features that are quantised, [B,n,D] in (-1,1), row by
        row (the original's vq_feats)."""
        cfg = self.cfg
        with jax.named_scope("ta_tok_encoder"):
            x = self.encoder(images)
        if cfg.pool_scale > 1:
            used = cfg.grid * cfg.pool_scale
            x = x.reshape(-1, cfg.encoder.grid, cfg.encoder.grid, x.shape[-1])[:, :used, :used]
            x = x.reshape(-1, cfg.grid, cfg.pool_scale, cfg.grid, cfg.pool_scale, x.shape[-1]).mean(
                axis=(2, 4)
            )
            x = x.reshape(-1, cfg.num_tokens, x.shape[-1])
        return jnp.tanh(self.encode_task_layer(x))

    def codebook(self):
        """The codes [V,E], unit length, f32."""
        return self.bottleneck.codebook()

    def encode(self, images, codebook=None, key=None):
        """images [B,H,W,3] in [-1,1] -> ids [B,n] int32: the nearest code by cosine.

        With a PRNG key ids are drawn from softmax(cosine / stochastic_temperature), as the original
        does whenever it is in training mode, BLIP3o-NEXT's training included (docs/model.md §6.6
        no. 2).
        """
        codebook = self.codebook() if codebook is None else codebook
        z = self.bottleneck.project(self.features(images))
        with jax.named_scope("ta_tok_choose"):
            return choose(z, codebook, self.cfg.stochastic_temperature, key)

    def quantize(self, features, key=None):
        """features [B,n,D] -> Quantized, for training; `key` as in `encode`.

        Holds all cosines at once.
        """
        codebook = self.codebook()
        z = self.bottleneck.project(features)
        ids = choose(
            jax.lax.stop_gradient(z),
            jax.lax.stop_gradient(codebook),
            self.cfg.stochastic_temperature,
            key,
        )
        codes = codebook[ids]
        return Quantized(z, cosine(z, codebook), ids, codes, z + jax.lax.stop_gradient(codes - z))

    def decode(self, codes, codebook=None):
        """ids [B,n], or code vectors [B,n,E] as in Quantized -> features [B,n,D].

        An id is looked up in `codebook`.
        """
        if codes.ndim == 2:
            codes = (self.codebook() if codebook is None else codebook)[codes]
        with jax.named_scope("ta_tok_decoder"):
            x = self.decoder(self.bottleneck.expand(codes))
        return self.decode_task_layer_2(jnp.tanh(self.decode_task_layer_0(x)))

    def __call__(self, images, key=None):
        """One pass through all parts: images -> (features to be matched [B,n,D], decoded features
        [B,n,D], Quantized)."""
        features = self.features(images)
        quantized = self.quantize(features, key)
        return features, self.decode(quantized.straight_through), quantized
