"""Splash attention, the TPU's kernel for causal self-attention."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

LANES = 128  # the width of a TPU register, in which the kernel counts its blocks


def takes(shape: tuple[int, ...]) -> bool:
    """Whether the kernel takes queries of this shape [B,T,N,H]."""
    return shape[1] % LANES == shape[3] % LANES == 0


def attention(q: Array, k: Array, v: Array, valid: Array, scale: float) -> Array:
    """`attention.attention` under the mask Causal(valid [B,T]); T and H are multiples of 128.

    Under `jax.set_mesh` it runs on shards: heads along the mesh axis "tensor", the batch along all
    others.
    """
    # Pallas takes long to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if not takes(q.shape):
        sizes = f"multiples of {LANES}, not {q.shape[1]} and {q.shape[3]}"
        raise ValueError(f"splash attention takes lengths and head dims in {sizes}")
    # The largest blocks that divide the length, the same for all six loops.
    length = q.shape[1]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    blocks = splash.BlockSizes(**dict.fromkeys(names, block))

    def local(q, k, v, valid):
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[2])
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks)
        q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
        # Padding is a segment of its own, which no query sees that has a valid token at or before
        # it; padding before all valid tokens sees itself, so that no row is empty.
        padding = valid.astype(jnp.int32)
        segments = splash.SegmentIds(jax.lax.cummax(padding, axis=1), padding)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, valid)
    # The compiler cannot shard a kernel by itself.
    batch = P(tuple(axis for axis in mesh.axis_names if axis != "tensor"))
    heads = P(*batch, None, "tensor" if "tensor" in mesh.axis_names else None)
    sharded = jax.shard_map(
        local, in_specs=(heads, heads, heads, batch), out_specs=heads, check_vma=False
    )
    return sharded(q, k, v, valid)
