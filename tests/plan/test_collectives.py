"""Collectives counted in the text of programs: one written by hand for what a TPU's compiler does,
and XLA's own for 8 devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from blip3o_jax.plan.collectives import collectives, sizes

# An all-gather in two pieces that share channel 5 in a loop of 28, a permute in a loop of 4 inside
# that, a reduce-scatter as TPUs write it.
TPU = """
%fused.1 (param_0: bf16[8,128]) -> (bf16[8,128], bf16[64,128]) {
  %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=5, dimensions={0}
}

%async_collective_fusion.2 (param_0: bf16[8,128]) -> bf16[64,128] {
  %all-gather.2 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=5, dimensions={0}
}

%all-reduce-scatter.3 (input: f32[64,4]) -> f32[8,4] {
  %all-reduce.7 = f32[64,4]{1,0} all-reduce(%input), channel_id=6, to_apply=%add
}

%ring_condition (arg: (u32[], bf16[8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
}

%ring_body (arg: (u32[], bf16[8])) -> (u32[], bf16[8]) {
  %permute.1 = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=9, source_target_pairs={{0,1}}
}

%layers_condition (arg: (s32[])) -> pred[] {
  %compare = pred[] fusion(%i), kind=kLoop, calls=%compared
}

%compared (param_0: s32[]) -> pred[] {
  %count = s32[]{:T(128)} constant(28)
}

%layers_body (arg: (s32[])) -> (s32[]) {
  %start = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) async-start(%x), calls=%fused.1
  %work = bf16[64,128]{1,0} fusion(%start), kind=kCustom, calls=%async_collective_fusion.2
  %ring = (u32[], bf16[8]) while(%t), condition=%ring_condition, body=%ring_body
}

ENTRY %main (param: f32[64,4]) -> f32[8,4] {
  %loop = (s32[]) while(%t), condition=%layers_condition, body=%layers_body
  %shared = f32[8,4]{1,0} fusion(%param), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_pieces_count_once_and_loops_as_often_as_they_run():
    assert collectives(TPU) == {
        "all-gather": {"calls": 28, "bytes": 28 * 64 * 128 * 2},
        "reduce-scatter": {"calls": 1, "bytes": 64 * 4 * 4},
        "collective-permute": {"calls": 28 * 4, "bytes": 28 * 4 * 8 * 2},
    }


def test_sizes_of_types():
    assert sizes("(f32[8,4]{1,0:T(8,128)}, bf16[3]{0}, u32[], pred[2,2])") == [128, 6, 4, 4]


@pytest.mark.parametrize("layers", [3, 9])
def test_a_scanned_stack_of_xlas_own(layers):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))

    def stack(kernels, x):
        def layer(x, kernel):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), rows), None

        return jax.lax.scan(layer, x, kernels)[0]

    kernels = jax.ShapeDtypeStruct((layers, 16, 16), jnp.float32, sharding=place)
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=rows)
    text = jax.jit(stack).lower(kernels, x).compile().as_text()
    assert collectives(text) == {"all-gather": {"calls": layers, "bytes": layers * 16 * 16 * 4}}
