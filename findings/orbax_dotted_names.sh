#!/usr/bin/env bash
# Orbax joins the names of a tree with dots: two leaves whose joined names agree are saved as one,
# and both come back with the values of one of them. What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0 \
  orbax-checkpoint==0.12.8 tensorstore==0.1.86
JAX_PLATFORMS=cpu venv/bin/python - 2>log <<'EOF' || { status=$?; tail -n 5 log; exit "$status"; }
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


print("jax", jax.__version__, "orbax-checkpoint", ocp.__version__)
saved = {
    "encoder": {"norm": jnp.full(3, 1.0), "kernel": jnp.full(3, 2.0)},
    "encoder.norm": jnp.full(3, 3.0),
}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
restored = {}
for name, handler in {
    "one database (OCDBT)": ocp.StandardCheckpointHandler(),
    "a folder a leaf": ocp.StandardCheckpointHandler(use_ocdbt=False),
}.items():
    with ocp.Checkpointer(handler) as checkpointer:
        path = pathlib.Path(name.replace(" ", "_")).absolute()
        checkpointer.save(path, args=ocp.args.StandardSave(saved))
        restored[name] = checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))

for name, tree in ({"saved": saved} | restored).items():
    print(f"{name}:")
    for path, leaf in jax.tree.leaves_with_path(tree):
        print("  ", jax.tree_util.keystr(path), leaf.tolist())

for name, tree in restored.items():
    nested, dotted = tree["encoder"]["norm"], tree["encoder.norm"]
    expect(f"{name}: both leaves come back the same, silently", bool((nested == dotted).all()))
    expect(f"{name}: one of them is not what was saved", bool(nested[0] != 1 or dotted[0] != 3))
    expect(f"{name}: the others are", bool((tree["encoder"]["kernel"] == 2).all()))
raise SystemExit(bool(changed))
EOF
