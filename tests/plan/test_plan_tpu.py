"""The shipped pod configs through the TPU's own compiler, which needs no TPU: each with two layers
of everything, one whole."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from blip3o_jax.chips import parse_topology
from blip3o_jax.parallel.batches import rows_of_host
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.plan import estimate, programs

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu, the TPU's compiler (extra [tpu])",
    ),
]
LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def planned(*options: str) -> dict:
    """The last line of `blip3o-jax plan` in a process of its own, with its own libtpu."""
    command = [sys.executable, "-m", "blip3o_jax.cli", "plan", *options]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def holds(found: dict, topology: str) -> None:
    """It fits, the state is cut by fsdp and the attention of TPUs is in the program, which sends
    what it must and not much more."""
    assert found["fits"] is (True if found["depth"] is None else None)
    assert found["topology"] == topology
    chip, _ = parse_topology(topology)
    assert 0 < found["bytes"]["total"] <= chip.hbm << 20
    assert found["bytes"]["optimizer"] == pytest.approx(2 * found["bytes"]["parameters"], rel=1e-3)


def test_a_host_of_a_pod_feeds_the_rows_of_its_block_of_chips():
    mesh = make_mesh({"fsdp": 16}, programs.open_topology("v5e:16x16")[0])
    # 2 x 2 chips, in two rows of the mesh, with two rows of the batch each.
    assert rows_of_host(512, mesh).tolist() == [0, 1, 2, 3, 32, 33, 34, 35]


@pytest.mark.parametrize(
    "config",
    [
        "pretrain_3b:v5e:16x16",
        "sft_3b:v6e:16x16",
        "pretrain_0_6b:v5p:4x4x8",
        "pretrain_3b:tpu7x:2x2x1",
    ],
)
def test_a_shallow_pod_config_compiles_and_fits(config):
    topology = config.partition(":")[2]
    found = planned("--config", config, "--depth", "2")
    holds(found, topology)
    assert found["depth"] == 2
    assert "seconds" not in found
    if found["communication"]:  # where libtpu prints its program
        sent = found["communication"]
        # The token table once in bfloat16 for the logits, and weights; never activations of the
        # whole batch.
        assert sent["all-gather"]["bytes"] < 8e9
        assert "reduce-scatter" in sent


def test_a_small_pod_holds_the_whole_model():
    found = planned("--config", "pretrain_3b:v5e:4x4", "--price", "1")
    holds(found, "v5e:4x4")
    assert found["dollars"] == pytest.approx(found["chip_hours"])


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_chip_has_what_its_compiler_grants(topology):
    """A sum over as many rows of 4 KiB as it takes is planned to be within a row of the limit; of
    one row more it says that it does not fit."""
    devices, chip = programs.open_topology(topology)
    place = jax.sharding.SingleDeviceSharding(devices[0])

    def planned(rows: int) -> dict:
        x = jax.ShapeDtypeStruct((rows, 8, 128), jax.numpy.float32, sharding=place)
        lowered = jax.jit(lambda x: x.sum(), out_shardings=place).lower(x)
        return estimate.measure(programs.Program(lowered, (x,), {"batch": x}, None, 1), chip)

    low, high = 1, chip.hbm * 512
    while high - low > 1:
        rows = (low + high) // 2
        low, high = (low, rows) if "reason" in planned(rows) else (rows, high)
    most, refused = planned(low), planned(high)
    assert most["fits"]
    assert chip.hbm * 2**20 - most["bytes"]["total"] < 8192
    assert not refused["fits"]
    assert "hbm" in refused["reason"].lower()


def test_generation_fits_its_chip_with_weights_of_eight_bits():
    """The embedded model's programs, each beside all weights."""
    options = ("--config", "emoji_64", "--topology", "v5e:2x2", "--generate", "8")
    found = planned(*options, "--weights", "int8")
    assert found["fits"] is True
    assert (found["images_at_once"], found["weights"]) == (32, "int8")
    totals = found["programs"]
    assert max(totals.values()) <= found["bytes"]["total"] < sum(totals.values())
    assert all(total > found["bytes"]["parameters"] for total in totals.values())


def test_libtpu_knows_the_flags_for_tpus():
    """It ends a process that is given an unknown one."""
    command = f'source {LAUNCH / "env" / "tpu.env"}; printf %s "$LIBTPU_INIT_ARGS"'
    flags = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True
    ).stdout
    assert len(flags.split()) == 4
    code = (
        "from blip3o_jax.plan.programs import open_topology; "
        "print(len(open_topology('v5e:2x2')[0]))"
    )
    for given, works in ((flags, True), (f"{flags} --xla_tpu_enable_wonders=true", False)):
        environment = {**os.environ, "LIBTPU_INIT_ARGS": given}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == works, done.stderr
