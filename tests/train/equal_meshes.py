"""Proof that a run does not depend on how it is spread: one device, eight in several meshes, two
slices, two processes, micro-batches.

    python tests/train/equal_meshes.py [--steps 20] [--stage grpo]

Every variant trains the tiny model on the same batches; of stage grpo, on what it draws itself,
with a reward for bright images. One JSON line last: the largest relative difference of a loss (or a
reward) from those on one device, and of all parameters together, |a - b| / |b|; exit code 1 when
one is above 1e-5.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for tiny.py

LIMIT = 1e-5
# Name -> (devices, mesh, micro-batches).
VARIANTS = {
    "1 device": (1, {}, 1),
    "1 device, 4 micro-batches": (1, {}, 4),
    "data=8": (8, {"data": 8}, 1),
    "fsdp=8": (8, {"fsdp": 8}, 1),
    "data=2, fsdp=2, tensor=2": (8, {"data": 2, "fsdp": 2, "tensor": 2}, 1),
    "data=2, fsdp=2, tensor=2, 4 micro-batches": (8, {"data": 2, "fsdp": 2, "tensor": 2}, 4),
    "dcn=2, data=2, fsdp=4": (8, {"dcn": 2, "data": 2, "fsdp": 4}, 1),
}
PROCESSES = {
    "2 processes x 4 devices, dcn=2, fsdp=4": ({"dcn": 2, "data": 2, "fsdp": 4}, 1),
    "2 processes x 4 devices in blocks, 2 x 2 x 2, 4 micro-batches": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        4,
    ),
}


def train(mesh_sizes: dict, accumulate: int, num_steps: int, devices=None):
    """(losses, flat parameters) of the first steps on a mesh; 32 rows a step, so that each of 8
    devices has some of 4 micro-batches."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from tiny import OPTIMIZER, batch_at, config

    from blip3o_jax.convert.random_weights import random_params
    from blip3o_jax.models.blip3o import PARTS
    from blip3o_jax.parallel.batches import put_batch, rows_of_host
    from blip3o_jax.parallel.mesh import make_mesh
    from blip3o_jax.parallel.processes import barrier
    from blip3o_jax.train import start, steps

    cfg = config(
        mesh=mesh_sizes,
        accumulate=accumulate,
        batch_size=32,
        num_steps=100,
        optimizer=OPTIMIZER,
        init=dict.fromkeys(PARTS, "random"),
    )
    weights = random_params(cfg.blip3o())  # compiling `init` costs more than the steps
    mesh, model = make_mesh(mesh_sizes, devices), start.build_model(cfg)
    own = rows_of_host(32, mesh)
    empty = SimpleNamespace(latest_step=lambda: None)

    def batch(step):
        return put_batch({name: x[own] for name, x in batch_at(step, 32).items()}, mesh)

    with jax.set_mesh(mesh):
        params = start.initial_params(cfg, model, lambda _, part: weights[part], mesh)
        state, frozen, shardings, _ = start.begin(cfg, model, mesh, empty, lambda: params)
        step = steps.compile_step(model, cfg, shardings).lower(state, frozen, batch(0)).compile()
        barrier("the first step")
        losses = []
        for now in range(num_steps):
            state, metrics = step(state, frozen, batch(now))
            losses.append(float(metrics["loss"]))
        params = multihost_utils.process_allgather(state["params"], tiled=True)
    return np.array(losses), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def reinforce(mesh_sizes: dict, accumulate: int, num_steps: int, devices=None):
    """(rewards, flat parameters) of the first steps of GRPO on a mesh, four groups of eight."""
    import jax
    import numpy as np
    from tiny import config, text

    from blip3o_jax.convert.random_weights import random_params
    from blip3o_jax.models.blip3o import PARTS
    from blip3o_jax.parallel.batches import gathered
    from blip3o_jax.parallel.mesh import make_mesh
    from blip3o_jax.rl import run
    from blip3o_jax.train import start
    from blip3o_jax.train.config import GrpoConfig

    cfg = config(
        stage="grpo",
        joint=None,
        grpo=GrpoConfig(num_generations=8, num_inference_steps=2, guidance_scale=None, beta=0.1),
        mesh=mesh_sizes,
        accumulate=accumulate,
        batch_size=32,
        num_steps=100,
        init=dict.fromkeys(PARTS, "random"),
    )
    weights = random_params(cfg.blip3o())
    prompts = [{"prompt": prompt} for prompt in ("a dog", "two red hearts", "a tree", "a cat")]

    def score(images, asked):
        # Coarse, so that the last bit of some pixels decides nothing; of the 320 images of 10
        # steps one is at 133.4987, and would be rounded up by one pixel.
        light = np.round(images.mean(axis=(1, 2, 3)) + 0.25)
        return lambda: (light[:, None], {})

    # Only while the run is made: other tests of this process have all devices.
    with mock.patch.object(run, "make_mesh", lambda sizes: make_mesh(sizes, devices)):
        training = run.reinforced(
            cfg, lambda step: prompts, prompts, text(), score, lambda _, part: weights[part]
        )
    empty = SimpleNamespace(latest_step=lambda: None)
    with jax.set_mesh(training.mesh):
        state, frozen, shardings, _ = start.begin(
            cfg, training.model, training.mesh, empty, training.params
        )
        batch_of, step, rewards = training.batches(0), None, []
        for now in range(1, num_steps + 1):
            batch, numbers = batch_of(now, state, frozen)
            rewards.append(numbers["reward"])
            step = step or training.compile(state, frozen, batch, shardings)
            state, _ = step(state, frozen, batch)
        params = gathered(state["params"])
    return np.array(rewards), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


STAGES = {"joint": train, "grpo": reinforce}


def worker(stage: str, name: str, num_steps: int, out: str) -> None:
    """One of two processes; the first writes what the stage's function gives."""
    from blip3o_jax.parallel.processes import is_process_zero, start_processes

    start_processes(timeout=120)
    import jax
    import numpy as np

    # Blocks, as hosts of a TPU have them: the first process has the shards 0 and 2 of four.
    devices, (mesh, _) = np.array(jax.devices()).reshape(2, 2, 2), PROCESSES[name]
    if "dcn" not in mesh:
        devices = devices.swapaxes(0, 1)
    losses, params = STAGES[stage](*PROCESSES[name], num_steps, [*devices.flat])
    if is_process_zero():
        np.savez(out, losses=losses, params=params)


def two_processes(stage: str, name: str, num_steps: int):
    """(losses, flat parameters) of two processes on this machine, with four devices each."""
    import numpy as np

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        out = str(pathlib.Path(folder) / "result.npz")
        command = [
            sys.executable,
            __file__,
            *("--stage", stage),
            *("--worker", name),
            "--steps",
            str(num_steps),
            "--out",
            out,
        ]
        common = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "BLIP3O_COORDINATOR": address,
        }
        running = [
            subprocess.Popen(
                command, env=common | {"BLIP3O_NUM_PROCESSES": "2", "BLIP3O_PROCESS_ID": str(i)}
            )
            for i in range(2)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"{name}: a process failed.")
        found = np.load(out)
        return found["losses"], found["params"]


def differences(
    num_steps: int, variants, processes, stage: str = "joint"
) -> dict[str, dict[str, float]]:
    """Variant -> its largest differences from the first of `variants`."""
    import jax
    import numpy as np

    results = {
        name: STAGES[stage](mesh, micro, num_steps, jax.devices()[:count])
        for name, (count, mesh, micro) in variants.items()
    }
    results |= {name: two_processes(stage, name, num_steps) for name in processes}
    losses, params = next(iter(results.values()))
    assert np.ptp(losses) > 0.01, "nothing was learned, so that equality says nothing"
    return {
        name: {
            "loss": float(np.max(np.abs(found[0] - losses) / np.abs(losses))),
            "params": float(np.linalg.norm(found[1] - params) / np.linalg.norm(params)),
        }
        for name, found in results.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stage", choices=STAGES, default="joint")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_force_host_platform_device_count=8"),
    }
    from blip3o_jax.kernels.platform import enable_compilation_cache

    enable_compilation_cache()
    if args.worker:
        worker(args.stage, args.worker, args.steps, args.out)
        return 0
    found = differences(args.steps, VARIANTS, PROCESSES, args.stage)
    worst = {kind: max(row[kind] for row in found.values()) for kind in ("loss", "params")}
    print(
        json.dumps(
            {
                "stage": args.stage,
                "steps": args.steps,
                "limit": LIMIT,
                "worst": worst,
                "variants": found,
            }
        )
    )
    return int(max(worst.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
