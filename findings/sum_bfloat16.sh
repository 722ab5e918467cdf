#!/usr/bin/env bash
# A running sum in bfloat16 stops at 256 times what is added: NumPy's mean and std of a bfloat16
# array are far off, and so is optax.global_norm of a tree. What it means: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0 optax==0.2.8
JAX_PLATFORMS=cpu venv/bin/python - <<'EOF'
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


print("jax", jax.__version__, "optax", optax.__version__)
print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__)
latents = jnp.asarray(np.random.default_rng(0).normal(size=(32, 32, 32)), jnp.bfloat16)
host = np.asarray(latents)
print("Standard deviation of a [32,32,32] bfloat16 array of normal numbers:")
device_std, host_std = float(jnp.std(latents)), float(np.std(host))
print(f"  jnp.std {device_std:.3f}, np.std of the same array {host_std:.3f}")
threes = np.full((32, 32, 32), 3, ml_dtypes.bfloat16)
print("Mean of as many threes:")
print(f"  jnp.mean {float(jnp.mean(threes))}, np.mean {float(np.mean(threes))}", end="")
print(f", np.mean in float16 {float(np.mean(threes.astype(np.float16)))}")

print("Norm of 1000 bfloat16 gradients, each [1] of 1.0:")
grads = [jnp.ones(1, jnp.bfloat16)] * 1000
norm = float(optax.global_norm(grads))
clipped, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
after = float(np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in clipped)))
print(f"  optax.global_norm {norm:.2f}, the true norm {1000**0.5:.2f}; ", end="")
print(f"after clip_by_global_norm(1.0) it is {after:.2f}")

expect("np.std of bfloat16 is under half of the true one", host_std < 0.5 < 0.98 < device_std)
expect("np.mean of threes is not 3", float(np.mean(threes)) < 0.1)
half = np.mean(threes.astype(np.float16))
expect("jnp.mean and float16 are right", jnp.mean(threes) == 3 == half)
expect("optax.global_norm stops at 16", norm == 16)
expect("clipping to 1 leaves almost 2", 1.9 < after < 2.1)
raise SystemExit(bool(changed))
EOF
