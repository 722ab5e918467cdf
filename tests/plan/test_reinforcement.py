"""A step of GRPO, planned: what lies on the devices while each of its programs runs."""

import jax
import numpy as np
import pytest
import tiny

from blip3o_jax.errors import InputError
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.plan import reinforcement
from blip3o_jax.train.config import GrpoConfig


def size(tree):
    """Bytes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def lowered(sizes, **section):
    section = {"num_generations": 4, "num_inference_steps": 2} | section
    cfg = tiny.config(
        stage="grpo", joint=None, grpo=GrpoConfig(**section), mesh=sizes, dtype="float32"
    )
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return reinforcement.lower(cfg, make_mesh(cfg.mesh, devices))


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 1}])
def test_the_state_lies_beside_every_program_and_the_whole_transformer_beside_its_tokens(sizes):
    programs = lowered(sizes)
    assert list(programs) == ["write_tokens", "draw_latents", "pictures", "update"]
    state = programs["update"].kinds
    assert size(state["first policy"]) == size(state["parameters"])
    for name, program in programs.items():
        everything = program.kinds | program.beside
        more = {"write_tokens": {"gathered"}, "update": set()}.get(name, {"states", "images"})
        assert set(everything) == set(state) | more
        for kind in set(state) - {"batch"}:
            assert size(everything[kind]) == size(state[kind])
    gathered = jax.tree.leaves(programs["write_tokens"].kinds["gathered"])
    assert all(x.sharding.shard_shape(x.shape) == x.shape for x in gathered)


def test_a_piece_is_rendered_beside_the_states_and_images_of_all():
    whole, pieces = lowered({"data": 2}), lowered({"data": 2}, pieces=2)
    for name in ("draw_latents", "pictures"):
        assert size(whole[name].kinds["batch"]) == 2 * size(pieces[name].kinds["batch"])
        for kind in ("states", "images"):
            assert size(whole[name].beside[kind]) == size(pieces[name].beside[kind]) > 0
    assert size(whole["update"].kinds["batch"]) == size(pieces["update"].kinds["batch"])


def test_a_run_that_stays_near_nothing_keeps_no_first_policy():
    assert size(lowered({"data": 1}, beta=0.0)["update"].kinds["first policy"]) == 0


def test_what_is_not_planned_is_refused():
    with pytest.raises(InputError, match=r"the step of grpo\.train 'transformer'"):
        lowered({"data": 1}, train="joint")
