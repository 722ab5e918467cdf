"""Softmax attention, one entry for every network and accelerator, and SANA's linear attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from blip3o_jax.errors import InputError
from blip3o_jax.kernels.cpu import in_memory
from blip3o_jax.kernels.platform import on_cpu, platform

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
LANES = 128  # the width of a TPU register, in which splash attention counts its blocks


class Causal(NamedTuple):
    """A mask said in words: a token sees those tokens up to itself that are `valid` [B,T] bool."""

    valid: jax.Array

    def array(self):
        """The same as bool [B,1,T,T]."""
        length = self.valid.shape[1]
        return jnp.tril(jnp.ones((length, length), bool)) & self.valid[:, None, None, :]


def best_implementation(q, mask) -> str:
    """The kernel of the platform that `jax.set_mesh` names, where it takes these arguments, else
    "xla". Without a mesh always "xla": the compiler does not know by itself how to cut a kernel."""
    if not isinstance(mask, Causal) or jax.sharding.get_abstract_mesh().empty:
        return "xla"
    whole = q.shape[1] % LANES == q.shape[3] % LANES == 0
    if platform() == "tpu" and whole:
        return "splash"
    if platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "xla"


@jax.named_scope("attention")
def attention(q, k, v, mask, scale: float, implementation: str = "xla"):
    """softmax(scale * q k^T) v, [B,T,N,H]: q [B,T,N,H], k and v [B,S,K,H]; key-value head j serves
    the N/K query heads from j*N/K on.

    `mask` is None, bool broadcastable to [B,1|N,T,S] (True: may be seen), or `Causal`. A row that
    may see nothing comes out finite and meaningless. "auto" is `best_implementation`. "xla" runs
    anywhere. "cudnn" is the GPU's fused kernel, for bf16 and f16. "splash" is the TPU's, for
    `Causal` only: it takes T and H in multiples of 128, and under `jax.set_mesh` it runs on shards,
    heads cut along the mesh axis "tensor" and the batch along all others. Raises InputError for an
    unknown implementation or a shape that it does not take.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"Unknown attention implementation {implementation!r}; known: "
            f"{', '.join(IMPLEMENTATIONS)}."
        )
    if implementation == "auto":
        implementation = best_implementation(q, mask)
    if implementation == "splash":
        if not isinstance(mask, Causal):
            raise InputError(
                "Splash attention is for causal self-attention; use the implementation 'xla' here."
            )
        return _splash(q, k, v, mask.valid, scale)
    if isinstance(mask, Causal):
        mask = mask.array()
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    return (
        _one_query(q, k, v, mask, scale)
        if q.shape[1] == 1 and on_cpu()
        else _xla(q, k, v, mask, scale)
    )


def _xla(q, k, v, mask, scale):
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    # The query heads of a key-value head stand below each other, so that each of the two products
    # is one of plain matrices per [B,K].
    rows = (
        q.reshape(batch, length, kv_heads, groups, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, -1, head_dim)
    )
    logits = scale * jnp.einsum("bkrh,bskh->bkrs", rows, k, preferred_element_type=jnp.float32)
    logits = _masked(logits.reshape(batch, kv_heads, groups, length, -1), mask)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkrs,bskh->bkrh", weights.reshape(batch, kv_heads, groups * length, -1), v)
    return (
        out.reshape(batch, kv_heads, groups, length, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(q.shape)
    )


def _one_query(q, k, v, mask, scale):
    """`_xla` for q [B,1,N,H] on CPU, as sums over H and S.

    They read keys [B,K,S,H] and values [B,K,H,S] once, as they lie in a cache; products of a few
    rows would lay them out anew, and copy the layer's part of the cache before (see
    `kernels.cpu._sums_of_products`).
    """
    dtype, (batch, _, heads, head_dim), kv_heads = q.dtype, q.shape, k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)))
    q = in_memory(q @ (scale * jnp.eye(head_dim)))
    q = q.reshape(batch, kv_heads, heads // kv_heads, 1, head_dim)
    logits = _masked(jnp.sum(q * k[:, :, None], axis=-1)[..., None, :], mask)
    weights = in_memory(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)))
    out = jnp.sum(weights * v[:, :, None], axis=-1) / jnp.sum(weights, axis=-1)
    return out.reshape(batch, 1, heads, head_dim).astype(dtype)


def _masked(logits, mask):
    """logits [B,K,G,T,S] f32, as low as can be where `mask`, see `attention`, is False: not -inf,
    which makes a row of nothing else NaN."""
    if mask is None:
        return logits
    kv_heads, groups = logits.shape[1:3]
    per_head = (kv_heads, groups) if mask.shape[1] == kv_heads * groups else (1, 1)
    return jnp.where(
        mask.reshape(mask.shape[0], *per_head, *mask.shape[2:]), logits, jnp.finfo(jnp.float32).min
    )


def _splash(q, k, v, valid, scale):
    # Pallas takes long to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, head_dim = q.shape[1], q.shape[3]
    if length % LANES or head_dim % LANES:
        raise InputError(
            f"Splash attention takes lengths and head dims in multiples of {LANES}, not "
            f"{length} and {head_dim}."
        )
    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    blocks = splash.BlockSizes(**dict.fromkeys(names, block))

    def local(q, k, v, valid):
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[2])
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks)
        q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
        # Padding is a segment of its own: valid tokens do not see it, and its rows see themselves,
        # so that none is empty.
        segments = valid.astype(jnp.int32)
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments)).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, valid)
    # The compiler cannot cut a kernel by itself.
    batch = P(tuple(axis for axis in mesh.axis_names if axis != "tensor"))
    heads = P(*batch, None, "tensor" if "tensor" in mesh.axis_names else None)
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, batch), out_specs=heads, check_vma=False
    )(q, k, v, valid)


@jax.named_scope("linear_attention")
def linear_attention(q, k, v, eps: float = 1e-15):
    """q (sum_s k_s v_s^T) / (q . sum_s k_s + eps), [B,T,N,H]: q [B,T,N,H], k and v [B,S,N,H], q and
    k already non-negative.

    f32 inside, cast back to q's dtype; `eps` is added, not a floor (diffusers'
    SanaLinearAttnProcessor2_0).
    """
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    # As the products read them: XLA's CPU backend would lay the tokens innermost in all three.
    q, k, v = in_memory((q.swapaxes(1, 2), k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)))
    # The sums run over all tokens; a TPU's default would round their factors to bf16.
    with jax.default_matmul_precision("highest"):
        state = jnp.einsum("bnhs,bnsi->bnhi", k, v)
        total = jnp.einsum("bnth,bnh->bnt", q, jnp.sum(k, axis=3))
        out = jnp.einsum("bnth,bnhi->bnti", q, state) / (total[..., None] + eps)
    return out.swapaxes(1, 2).astype(dtype)
