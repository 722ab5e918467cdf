"""The shipped pod configs through the TPU's own compiler, which needs no TPU: each with two layers
of everything, one whole."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu, the TPU's compiler (extra [tpu])",
    ),
]
LAUNCH = Path(__file__).resolve().parents[2] / "launch"
HBM = {"v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}


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
    assert found["fits"]
    assert found["topology"] == topology
    assert 0 < found["bytes"]["total"] < HBM[topology.partition(":")[0]] << 30
    assert found["bytes"]["optimizer"] == pytest.approx(2 * found["bytes"]["parameters"], rel=1e-3)


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
    found = planned("--config", config, "--depth", "2", "--price", "1")
    holds(found, topology)
    assert found["depth"] == 2
    assert found["dollars"] == pytest.approx(found["chip_hours"])
    if found["communication"]:  # where libtpu prints its program
        sent = found["communication"]
        # The token table once in bfloat16 for the logits, and weights; never activations of the
        # whole batch.
        assert sent["all-gather"]["bytes"] < 8e9
        assert "reduce-scatter" in sent


def test_a_small_pod_holds_the_whole_model():
    holds(planned("--config", "pretrain_3b:v5e:4x4"), "v5e:4x4")


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
