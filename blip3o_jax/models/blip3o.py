"""The composition: which networks BLIP3o-NEXT has, and how hidden states become the condition of
the diffusion model (docs/model.md §2.6)."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import InputError, nearest
from blip3o_jax.models.dc_ae import DcAe
from blip3o_jax.models.layers import Linear, RMSNorm, gelu_tanh
from blip3o_jax.models.qwen3 import Qwen3
from blip3o_jax.models.sana import Sana
from blip3o_jax.models.ta_tok import TaTok
from blip3o_jax.parallel.activations import keep_rows

PARTS = ("qwen3", "ta_tok", "sana", "dc_ae", "diffusion_connector")  # of every model
# of those whose config asks for them
EDITING_PARTS = ("und_image_vae_connector", "tar_siglip_features_connector")
# The connector's results start as large as the captions that SANA was trained on.
CAPTION_RMS = 5.5**0.5


def parts_of(config: Blip3oConfig) -> tuple[str, ...]:
    """The parts that this model has (docs/model.md §1.2, §2.6)."""
    asked = (config.use_und_image_vae, config.use_tar_siglip_features)
    return (
        *PARTS,
        *(part for part, is_asked in zip(EDITING_PARTS, asked, strict=True) if is_asked),
    )


def _torch_bias(fan_in: int):
    """torch.nn.Linear's initial bias.

    Not zero: a dropped condition is all zeros, where the norm's gradient is 300 times its input's.
    """
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class Connector(nn.Module):
    """States [B,T,D] -> [B,T,features]; Sequential(Linear, GELU(tanh), Linear, RMSNorm) of BLIP3o's
    diffusion_connector."""

    features: int
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        def linear(name, fan_in):
            shape = (fan_in, self.features)
            return Linear(
                "btd,de->bte",
                shape,
                use_bias=True,
                dtype=self.dtype,
                bias_init=_torch_bias(fan_in),
                name=name,
            )

        y = gelu_tanh(linear("linear_1", x.shape[-1])(x))
        y = linear("linear_2", self.features)(y)
        return keep_rows(
            RMSNorm(self.eps, scale_init=nn.initializers.constant(CAPTION_RMS), name="norm")(y)
        )


def condition_slice(hidden, start, n: int, last: bool = False):
    """hidden [B,T,D] -> [B,n,D]: the n states from position start [B] on, which is that of <S0>.

    A slice beyond the end is NaN there. `last` gives the last n states instead, whatever they are:
    what the PyTorch code trained on (docs/model.md §6.6 no. 1).
    """
    if last:
        return hidden[:, hidden.shape[1] - n :]
    positions = start[:, None] + jnp.arange(n)
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def write_codes(tokens, start, codes, image_start_token_id: int):
    """Puts codes [B,n] of the images behind `<S0>`, which stands at `start` [B], in rows of token
    ids [B,T]."""

    def write(row, at, ids):
        return jax.lax.dynamic_update_slice(row, ids, (at + 1,))

    return jax.vmap(write)(tokens, start, codes + image_start_token_id)


@dataclass(frozen=True)
class Blip3o:
    """BLIP3o-NEXT's modules for one config.

    Their parameters are a dict of its parts, each as the module of its name takes it.
    """

    config: Blip3oConfig
    dtype: jnp.dtype = jnp.float32
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

    def _modules(self) -> dict:
        """Each part's module, and inputs as small as it takes."""
        cfg = self.config
        image, tokens = (
            jnp.zeros((1, cfg.ta_tok.encoder.image_size, cfg.ta_tok.encoder.image_size, 3)),
            jnp.zeros((1, 1), jnp.int32),
        )
        pixels, latents = (
            jnp.zeros((1, cfg.dc_ae.factor, cfg.dc_ae.factor, 3)),
            jnp.zeros((1, 1, 1, cfg.sana.in_channels)),
        )
        return {
            "qwen3": (self.qwen3, tokens, tokens, tokens == 0),
            "ta_tok": (self.ta_tok, image),
            "sana": (
                self.sana,
                latents,
                jnp.zeros(1),
                jnp.zeros((1, 2, cfg.sana.caption_channels)),
            ),
            "dc_ae": (self.dc_ae, pixels),
            "diffusion_connector": (self.connector, jnp.zeros((1, 1, cfg.qwen3.hidden_size))),
            "und_image_vae_connector": (
                self.connector,
                jnp.zeros((1, 1, cfg.dc_ae.latent_channels)),
            ),
            "tar_siglip_features_connector": (
                self.siglip_connector,
                jnp.zeros((1, 1, cfg.ta_tok.encoder.hidden_size)),
            ),
        }

    def init(self, key, parts: tuple[str, ...] = PARTS) -> dict:
        """Random parameters.

        A part's do not depend on which others are asked for. InputError for an unknown part.
        """
        for part in parts:
            if part not in parts_of(self.config):
                raise InputError(f"Unknown part {part!r}; {nearest(part, parts_of(self.config))}")
        modules, keys = (
            self._modules(),
            dict(zip(PARTS, jax.random.split(key, len(PARTS)), strict=True)),
        )
        keys |= {part: jax.random.fold_in(key, i) for i, part in enumerate(EDITING_PARTS)}
        params = {
            part: modules[part][0].init(keys[part], *modules[part][1:])["params"] for part in parts
        }
        if "sana" in parts and self.config.sana.condition_positions:
            # Queries and keys of one place then agree from the start, so that cross-attention need
            # not learn where to look.
            cross = params["sana"]["transformer_blocks"]["attn2"]
            cross["to_k"]["kernel"] = cross["to_q"]["kernel"]
        return params

    def abstract(self, parts: tuple[str, ...] = PARTS) -> dict:
        """Shapes and dtypes of `init`'s parameters, without allocating any."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), parts))
