"""The composition: which networks BLIP3o-NEXT has, and how hidden states become the condition of
the diffusion model (docs/model.md §2.6)."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import InputError, nearest
from blip3o_jax.models.dc_ae import DcAe
from blip3o_jax.models.layers import Dtype, Initializer, Linear, RMSNorm
from blip3o_jax.models.qwen3 import Qwen3
from blip3o_jax.models.sana import Sana
from blip3o_jax.models.ta_tok import TaTok
from blip3o_jax.parallel.activations import pin_rows
from blip3o_jax.text import causal_positions

Params = dict  # {part: the parameters of its module}

PARTS = ("qwen3", "ta_tok", "sana", "dc_ae", "diffusion_connector")  # of every model
# Of those whose config asks for them.
EDITING_PARTS = ("und_image_vae_connector", "tar_siglip_features_connector")
# The connector's results start as large as the captions that SANA was trained on.
CAPTION_RMS = 5.5**0.5


def parts_of(config: Blip3oConfig) -> tuple[str, ...]:
    """The parts that this model has (docs/model.md §1.2, §2.6)."""
    asked = (config.use_und_image_vae, config.use_tar_siglip_features)
    extra = (part for part, is_asked in zip(EDITING_PARTS, asked, strict=True) if is_asked)
    return (*PARTS, *extra)


def _torch_bias(fan_in: int) -> Initializer:
    """torch.nn.Linear's initial bias; not zero, as a dropped condition is all zeros, where the
    norm's gradient is 300 times its input's."""
    bounds = -(fan_in**-0.5), fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, *bounds)


class Connector(nn.Module):
    """States [B,T,D] -> [B,T,features]; Sequential(Linear, GELU(tanh), Linear, RMSNorm)."""

    features: int
    eps: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def linear(name: str, fan_in: int) -> Linear:
            shape, bias = (fan_in, self.features), _torch_bias(fan_in)
            return Linear("btd,de->bte", shape, True, self.dtype, bias, name=name)

        y = nn.gelu(linear("linear_1", x.shape[-1])(x))
        y = linear("linear_2", self.features)(y)
        scale_init = nn.initializers.constant(CAPTION_RMS)
        return pin_rows(RMSNorm(self.eps, scale_init=scale_init, name="norm")(y))


def condition_slice(hidden: Array, start: Array, n: int) -> Array:
    """hidden [B,T,D] -> [B,n,D]: the n states from position start [B] on, which is that of <S0>.

    A slice beyond the end is NaN there.
    """
    positions = start[:, None] + jnp.arange(n)
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def write_codes(tokens: Array, start: Array, codes: Array, image_start_token_id: int) -> Array:
    """Writes image codes [B,n] behind `<S0>`, which is at `start` [B], into token rows [B,T]."""

    def write(row, at, ids):
        return jax.lax.dynamic_update_slice(row, ids, (at + 1,))

    return jax.vmap(write)(tokens, start, codes + image_start_token_id)


@dataclass(frozen=True)
class Blip3o:
    """BLIP3o-NEXT's modules for one config. Their parameters are a dict of its parts, each as the
    module of its name takes it."""

    config: Blip3oConfig
    dtype: Dtype = jnp.float32
    remat: str = "none"

    @property
    def qwen3(self) -> Qwen3:
        return Qwen3(self.config.qwen3, self.dtype, self.remat)

    @property
    def ta_tok(self) -> TaTok:
        return TaTok(self.config.ta_tok, self.dtype)

    @property
    def sana(self) -> Sana:
        return Sana(self.config.sana, self.dtype, self.remat)

    @property
    def dc_ae(self) -> DcAe:
        return DcAe(self.config.dc_ae, self.dtype)

    @property
    def connector(self) -> Connector:
        return Connector(self.config.sana.caption_channels, self.config.connector_eps, self.dtype)

    @property
    def siglip_connector(self) -> Connector:
        return Connector(self.config.qwen3.hidden_size, self.config.connector_eps, self.dtype)

    def module(self, part: str) -> nn.Module:
        """The module whose parameters are the part's."""
        connectors = {
            "diffusion_connector": "connector",
            "und_image_vae_connector": "connector",
            "tar_siglip_features_connector": "siglip_connector",
        }
        return getattr(self, connectors.get(part, part))

    def apply(self, params: Params, part: str, *inputs, method: str = "__call__", **options):
        """A method of a part's module, given the parameters of all parts."""
        return self.module(part).apply({"params": params[part]}, *inputs, method=method, **options)

    def read_rows(self, params: Params, tokens: Array) -> Array:
        """Rows of token ids [B,T], padded on the right -> Qwen3's hidden states [B,T,D]."""
        valid = tokens != self.config.vocab.pad_token_id
        return self.apply(params, "qwen3", tokens, causal_positions(tokens), valid)[0]

    def _smallest_inputs(self, part: str) -> tuple[Array, ...]:
        """Inputs of a part's module, as small as it takes."""
        cfg = self.config
        tokens = jnp.zeros((1, 1), jnp.int32)
        image, pixels = cfg.ta_tok.encoder.image_size, cfg.dc_ae.factor
        latents = jnp.zeros((1, 1, 1, cfg.sana.in_channels))
        return {
            "qwen3": (tokens, tokens, tokens == 0),
            "ta_tok": (jnp.zeros((1, image, image, 3)),),
            "sana": (latents, jnp.zeros(1), jnp.zeros((1, 2, cfg.sana.caption_channels))),
            "dc_ae": (jnp.zeros((1, pixels, pixels, 3)),),
            "diffusion_connector": (jnp.zeros((1, 1, cfg.qwen3.hidden_size)),),
            "und_image_vae_connector": (jnp.zeros((1, 1, cfg.dc_ae.latent_channels)),),
            "tar_siglip_features_connector": (jnp.zeros((1, 1, cfg.ta_tok.encoder.hidden_size)),),
        }[part]

    def init(self, key: Array, parts: tuple[str, ...] | None = None) -> Params:
        """Random parameters, of each part whichever others are asked for; InputError for an unknown
        part."""
        all_parts = parts_of(self.config)
        parts = all_parts if parts is None else parts
        for part in parts:
            if part not in all_parts:
                raise InputError(f"Unknown part {part!r}; {nearest(part, all_parts)}")
        # A key for each part that there is, whichever are asked for.
        keys = dict(zip(PARTS, jax.random.split(key, len(PARTS)), strict=True))
        keys |= {part: jax.random.fold_in(key, i) for i, part in enumerate(EDITING_PARTS)}
        params = {
            part: self.module(part).init(keys[part], *self._smallest_inputs(part))["params"]
            for part in parts
        }
        if "sana" in parts and self.config.use_und_image_vae_as_channels:
            # The reference changes nothing at first.
            kernel = params["sana"]["patch_embed"]["kernel"]
            latents = jnp.arange(len(kernel)) < self.config.dc_ae.latent_channels
            params["sana"]["patch_embed"]["kernel"] = jnp.where(latents[:, None], kernel, 0)
        if "sana" in parts and self.config.sana.condition_positions:
            # Queries and keys of one place then agree from the start, so that cross-attention need
            # not learn where to look.
            cross = params["sana"]["transformer_blocks"]["attn2"]
            cross["to_k"]["kernel"] = cross["to_q"]["kernel"]
        return params

    def abstract(self, parts: tuple[str, ...] | None = None) -> Params:
        """Shapes and dtypes of `init`'s parameters, without allocating any."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), parts))
