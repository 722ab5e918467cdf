#!/usr/bin/env bash
# jax's create_device_mesh on a TPU pod: a host's chips hold rows of the batch that do not follow
# each other. What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 libtpu==0.0.52
# The TPU's compiler knows pods that are not here.
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost venv/bin/python - <<'EOF'
from importlib.metadata import version

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


def rows(name, shape):
    """Shards of the batch, along both axes of the mesh, by process."""
    devices = topologies.get_topology_desc(name, platform="tpu").devices
    mesh = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    processes = [device.process_index for device in mesh.flat]
    return [np.flatnonzero(np.equal(processes, i)).tolist() for i in range(max(processes) + 1)]


print("jax", jax.__version__, "libtpu", version("libtpu"))
print("Shards of a batch that the first hosts hold:")
pods = {"v5e:4x4": (4, 4), "v5e:16x16": (16, 16), "v5p:4x4x4": (16, 4), "v6e:8x8": (8, 8)}
found = {name: rows(name, shape) for name, shape in pods.items()}
for name, hosts in found.items():
    print(f"  {name:10} mesh {pods[name]}: {hosts[0]}, {hosts[1]}, ...")

in_runs = [h == list(range(h[0], h[0] + len(h))) for hosts in found.values() for h in hosts]
expect("no host of these pods has shards that follow each other", not any(in_runs))
expect("the first of v5e:16x16 has 0, 1, 16 and 17", found["v5e:16x16"][0] == [0, 1, 16, 17])
raise SystemExit(bool(changed))
EOF
