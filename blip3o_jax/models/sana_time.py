"""What SANA is told of time: the noise level, and of a model of few steps the span of a step
(docs/model.md §2.4, §5.4)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.models.layers import Dtype, Linear

SMOOTH = 30.0  # timesteps on either side
# What `sinusoids` of a number in [0, 1] take it for: a tenth is easily told, and it is smooth.
SPAN_SCALE = 10.0
HERE = (0.0, 0.0, 0.0, 1.0)  # no step and no guidance


def sinusoids(x: Array, dim: int = 256) -> Array:
    """x [...] -> [...,dim] f32: cosines first, then sines (diffusers Timesteps, flip_sin_to_cos,
    shift 0)."""
    half = dim // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = x.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


@jax.custom_jvp
def timestep_embedding(t: Array) -> Array:
    """`sinusoids` of t [B] in (0, 1000].

    The derivative is the quotient over 2 x SMOOTH. The exact one is of waves as short as six of
    the thousand timesteps; a model is trained at whole ones, and what it says between them, rather
    than how its velocity changes, would be nearly all of its derivative.
    """
    return sinusoids(t)


@timestep_embedding.defjvp
def _timestep_derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (t,), (dt,) = primals, tangents
    slope = (sinusoids(t + SMOOTH) - sinusoids(t - SMOOTH)) / (2 * SMOOTH)
    return timestep_embedding(t), slope * dt[:, None]


class TimeEmbed(nn.Module):
    """t [B] -> (e [B,D] for the output, m [B,6,D] for all blocks), f32; AdaLayerNormSingle."""

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, t: Array, more: Array | float = 0.0) -> tuple[Array, Array]:
        """With what is to be added to e [B,D], if anything."""
        linear = functools.partial(Linear, use_bias=True, dtype=self.dtype)
        square = (self.width, self.width)
        e = timestep_embedding(t)
        e = linear("bd,de->be", (e.shape[-1], self.width), name="linear_1")(e)
        e = linear("bd,de->be", square, name="linear_2")(nn.silu(e)) + more
        m = linear("bd,dme->bme", (self.width, 6, self.width), name="linear")(nn.silu(e))
        return e.astype(jnp.float32), m.astype(jnp.float32)


class SpanEmbed(nn.Module):
    """span [B,4] (see `Sana`) -> [B,D]: zeros at first, and always for the span HERE, of which a
    SANA without spans gives the velocity."""

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, span: Array) -> Array:
        linear = functools.partial(Linear, "bd,de->be", dtype=self.dtype)
        span = jnp.concatenate([span, jnp.array([HERE])])
        y = sinusoids(SPAN_SCALE * span).reshape(len(span), -1)
        y = nn.silu(linear(shape=(y.shape[-1], self.width), use_bias=True, name="linear_1")(y))
        return linear(shape=(self.width, self.width), std=0.0, name="linear_2")(y[:-1] - y[-1:])
