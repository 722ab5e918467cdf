"""What attention may see."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Causal(NamedTuple):
    """A causal mask in symbolic form: a token sees those up to itself that are `valid` [B,T]."""

    valid: Array

    def array(self) -> Array:
        """The same as bool [B,1,T,T]."""
        length = self.valid.shape[1]
        return jnp.tril(jnp.ones((length, length), bool)) & self.valid[:, None, None, :]


def masked(logits: Array, mask: Array | None) -> Array:
    """logits [B,K,G,T,S] f32, the lowest finite number where `mask` [B,1|N,T,S] is False: not -inf,
    which turns a row that sees nothing into NaN."""
    if mask is None:
        return logits
    kv_heads, groups = logits.shape[1:3]
    heads = (kv_heads, groups) if mask.shape[1] == kv_heads * groups else (1, 1)
    mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
    return jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
