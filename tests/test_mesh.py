import jax
import pytest

from blip3o_jax.config import ConfigError, preset
from blip3o_jax.mesh import make_mesh, parse_mesh
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.sharding import join, shardings, spec, split


def test_mesh_strings():
    assert parse_mesh("data=4,fsdp=2") == {"data": 4, "fsdp": 2}
    assert parse_mesh("") == {}
    for wrong in ("date=4", "data", "data=x"):
        with pytest.raises(ConfigError):
            parse_mesh(wrong)


def test_one_axis_takes_what_is_left():
    assert dict(make_mesh({"fsdp": 2}).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh({"data": 2, "fsdp": -1, "tensor": 2}).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for wrong in ({"data": 3}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"tensor": 3}):
        with pytest.raises(ConfigError):
            make_mesh(wrong)


def test_every_large_leaf_of_the_full_models_but_the_autoencoder_is_cut():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    abstract = Blip3o(preset("blip3o_next_3b")).abstract()
    placed = shardings(abstract, mesh)
    for part in ("qwen3", "sana", "ta_tok", "diffusion_connector"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract[part]):
            sharding = placed[part]
            for key in path:
                sharding = sharding[key.key]
            if leaf.size > 3_000_000:
                assert not sharding.is_fully_replicated, (part, jax.tree_util.keystr(path), leaf.shape)


def test_a_size_that_does_not_divide_names_path_and_axis():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(ConfigError, match=r"qwen3/embed_tokens/embedding: an axis of 12 does not divide by the mesh's fsdp=8"):
        spec("qwen3/embed_tokens/embedding", (16, 12), mesh)


def test_split_and_join_are_inverse():
    tree = {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    left, right = split(tree, lambda path: path in ("a/x", "b/z"))
    assert left == {"a": {"x": 1}, "b": {"z": 3}}
    assert right == {"a": {"y": 2}}
    assert join(left, right) == tree
