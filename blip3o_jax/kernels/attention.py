"""Softmax attention, one entry for every network and platform, and SANA's linear attention."""

import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.kernels import cpu, splash
from blip3o_jax.kernels.masks import Causal, masked
from blip3o_jax.kernels.platform import on_cpu, platform
from blip3o_jax.kernels.products import materialized

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")


def best_implementation(q: Array, mask: Causal | Array | None) -> str:
    """The kernel of the platform that `jax.set_mesh` names, where it takes these arguments, else
    "xla". Without a mesh always "xla": the compiler cannot shard a kernel by itself."""
    if not isinstance(mask, Causal) or jax.sharding.get_abstract_mesh().empty:
        return "xla"
    if platform() == "tpu" and splash.takes(q.shape):
        return "splash"
    if platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "xla"


@jax.named_scope("attention")
def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Causal | Array | None,
    scale: float,
    implementation: str = "xla",
) -> Array:
    """softmax(scale * q k^T) v, [B,T,N,H]: q [B,T,N,H], k and v [B,S,K,H]; key-value head j serves
    the N/K query heads from j*N/K on.

    `mask` is None, bool broadcastable to [B,1|N,T,S] (True: may be seen), or `Causal`. The result
    of a row that may see nothing is finite and meaningless. "auto" is `best_implementation`; "xla"
    runs anywhere; "cudnn" is the GPU's fused kernel, for bf16 and f16; "splash" is the TPU's, for
    `Causal` only. Raises ValueError for an unknown implementation or arguments that it does not
    take.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown attention implementation {implementation!r}; known: {known}")
    if implementation == "auto":
        implementation = best_implementation(q, mask)
    if implementation == "splash":
        if not isinstance(mask, Causal):
            raise ValueError("splash attention takes a Causal mask only; use 'xla' here")
        return splash.attention(q, k, v, mask.valid, scale)
    # The others take the mask as an array.
    if isinstance(mask, Causal):
        mask = mask.array()
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    if q.shape[1] == 1 and on_cpu():
        return cpu.one_query_attention(q, k, v, mask, scale)
    if q.shape[1] <= cpu.FEW and on_cpu():
        return cpu.few_query_attention(q, k, v, mask, scale)
    return softmax_attention(q, k, v, mask, scale)


def softmax_attention(q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
    """The plain formula, with the softmax in f32."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    # The query heads of a key-value head are rows below each other, so that each of the two
    # products is one of plain matrices per [B,K].
    rows = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, -1, head_dim)
    logits = scale * jnp.einsum("bkrh,bskh->bkrs", rows, k, preferred_element_type=jnp.float32)
    logits = masked(logits.reshape(batch, kv_heads, groups, length, -1), mask)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkrs,bskh->bkrh", weights.reshape(batch, kv_heads, groups * length, -1), v)
    out = out.reshape(batch, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape)


@jax.named_scope("linear_attention")
def linear_attention(q: Array, k: Array, v: Array, eps: float = 1e-15) -> Array:
    """q (sum_s k_s v_s^T) / (q . sum_s k_s + eps), [B,T,N,H]: q [B,T,N,H], k and v [B,S,N,H], q and
    k already non-negative.

    f32 inside, cast back to q's dtype; `eps` is added, not a floor (diffusers'
    SanaLinearAttnProcessor2_0).
    """
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    # In the order in which the products read them: XLA's CPU backend would put the tokens innermost
    # in all three.
    q, k, v = materialized((q.swapaxes(1, 2), k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)))
    # The sums run over all tokens; a TPU's default would round their factors to bf16.
    with jax.default_matmul_precision("highest"):
        state = jnp.einsum("bnhs,bnsi->bnhi", k, v)
        total = jnp.einsum("bnth,bnh->bnt", q, jnp.sum(k, axis=3))
        out = jnp.einsum("bnth,bnhi->bnti", q, state) / (total[..., None] + eps)
    return out.swapaxes(1, 2).astype(dtype)
