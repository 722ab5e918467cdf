"""One table: parameter path -> PartitionSpec.

Paths not listed are replicated (norms, biases, the small ends of the networks).
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blip3o_jax.errors import require

# Regex on the end of "part/.../leaf" -> axes of the leaf. Stacked layers have L first, which is
# never sharded.
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
    (r"sana/(time_embed|span_embed|caption_projection)/linear_[12]/kernel", P("fsdp", None)),
    (r"ta_tok/.*/regularizer/embedding", P("fsdp", None)),
    (r"ta_tok/(encoder|decoder)/.*/(q|k|v)_proj/kernel", P(None, "fsdp", "tensor", None)),
    (r"ta_tok/(encoder|decoder)/.*/out_proj/kernel", P(None, "tensor", None, "fsdp")),
    (r"ta_tok/(encoder|decoder)/.*/fc1/kernel", P(None, "fsdp", "tensor")),
    (r"ta_tok/(encoder|decoder)/.*/fc2/kernel", P(None, "tensor", "fsdp")),
    (r"(diffusion|tar_siglip_features)_connector/linear_[12]/kernel", P("fsdp", None)),
    (r"und_image_vae_connector/linear_2/kernel", P("fsdp", None)),
)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one leaf; InputError naming an axis that the mesh does not divide."""
    axes = next((axes for pattern, axes in TABLE if re.search(f"{pattern}$", path)), None)
    if axes is None:
        return P()
    for size, axis in zip(shape, axes, strict=True):
        parts = mesh.shape[axis] if axis else 1
        sentence = f"{path}: an axis of {size} does not divide by the mesh's {axis}={parts}"
        nearest = f"take {axis}={math.gcd(size, parts)}, and more data."
        require(size % parts == 0, f"{sentence}; {nearest}")
    return axes


def shardings(tree: Any, mesh: Mesh, without: str = "") -> Any:
    """NamedShardings for a tree of parameters, or of anything nested like them (EMA, Adam's
    moments): the path's end decides; `without` an axis of the mesh, along which nothing is cut."""

    def named(path, leaf):
        keys = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = spec(keys, leaf.shape, mesh)
        return NamedSharding(mesh, P(*(None if axis == without else axis for axis in axes)))

    return jax.tree_util.tree_map_with_path(named, tree)
