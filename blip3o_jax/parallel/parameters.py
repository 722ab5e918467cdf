"""One table: parameter path -> PartitionSpec.

Paths not listed are replicated (norms, biases, the small ends of the networks).
"""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blip3o_jax.errors import InputError

# Regex on the end of "part/.../leaf" -> axes of the leaf. Stacked layers have L first, which is
# never cut.
TABLE = (
    (r"qwen3/embed_tokens/embedding", P("tensor", "fsdp")),
    (r"qwen3/lm_head/kernel", P("fsdp", "tensor")),
    (r"qwen3/.*/(q|k|v)_proj/kernel", P(None, "fsdp", "tensor", None)),
    (r"qwen3/.*/o_proj/kernel", P(None, "tensor", None, "fsdp")),
    (r"qwen3/.*/(gate|up)_proj/kernel", P(None, "fsdp", "tensor")),
    (r"qwen3/.*/down_proj/kernel", P(None, "tensor", "fsdp")),
    (r"sana/.*/attn[12]/to_[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (r"sana/.*/attn[12]/to_out/kernel", P(None, "tensor", None, "fsdp")),
    (r"sana/.*/ff/conv_inverted/kernel", P(None, "fsdp", None)),
    (r"sana/.*/ff/conv_point/kernel", P(None, None, "fsdp")),
    (r"sana/time_embed/linear/kernel", P("fsdp", None, None)),
    (r"sana/(time_embed|caption_projection)/linear_[12]/kernel", P("fsdp", None)),
    (r"ta_tok/.*/regularizer/embedding", P("fsdp", None)),
    (r"ta_tok/(encoder|decoder)/.*/(q|k|v)_proj/kernel", P(None, "fsdp", "tensor", None)),
    (r"ta_tok/(encoder|decoder)/.*/out_proj/kernel", P(None, "tensor", None, "fsdp")),
    (r"ta_tok/(encoder|decoder)/.*/fc1/kernel", P(None, "fsdp", "tensor")),
    (r"ta_tok/(encoder|decoder)/.*/fc2/kernel", P(None, "tensor", "fsdp")),
    (r"(diffusion|tar_siglip_features)_connector/linear_[12]/kernel", P("fsdp", None)),
    (r"und_image_vae_connector/linear_2/kernel", P("fsdp", None)),
)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one leaf; InputError naming the axis when its size does not divide by
    the mesh."""
    for pattern, axes in TABLE:
        if re.search(f"{pattern}$", path):
            for size, axis in zip(shape, axes, strict=True):
                if axis and size % mesh.shape[axis]:
                    wrong, fits = f"{axis}={mesh.shape[axis]}", math.gcd(size, mesh.shape[axis])
                    raise InputError(
                        f"{path}: an axis of {size} does not divide by the mesh's {wrong}; "
                        f"take {axis}={fits}, and more data."
                    )
            return axes
    return P()


def shardings(tree, mesh: Mesh):
    """NamedShardings for a tree of parameters, or of anything nested like them (EMA, Adam's
    moments): the path's end decides."""

    def named(path, leaf):
        keys = "/".join(
            str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
        )
        return NamedSharding(mesh, spec(keys, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(named, tree)
