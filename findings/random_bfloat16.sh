#!/usr/bin/env bash
# jax.random in bfloat16 draws one of 128 values: noise has no tails, and sampling from a large
# vocabulary never gets past its beginning. What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
JAX_PLATFORMS=cpu venv/bin/python - <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


key = jax.random.key(0)
print("jax", jax.__version__)
print("A million normal numbers of one key, drawn in each dtype:")
noise = {}
for dtype in ("float32", "float16", "bfloat16"):
    x = np.asarray(jax.random.normal(key, (1_000_000,), dtype), np.float64)
    noise[dtype] = x
    print(f"  {dtype:9} {x.min():6.3f} to {x.max():6.3f}, mean {x.mean():8.5f},", end="")
    print(f" {len(np.unique(x))} distinct values")

VOCABULARY = 65536
print(f"2000 draws from {VOCABULARY} equally likely tokens, by the dtype of the logits:")
drawn = {}
for dtype in ("float32", "float16", "bfloat16"):
    logits = jnp.zeros(VOCABULARY, dtype)
    draw = jax.jit(jax.vmap(jax.random.categorical, in_axes=(0, None)))
    drawn[dtype] = np.asarray(draw(jax.random.split(key, 2000), logits))
    print(f"  {dtype:9} median {np.median(drawn[dtype]):8.0f}  largest {drawn[dtype].max()}")

low, top = noise["bfloat16"], {name: ids.max() for name, ids in drawn.items()}
expect("normal in bfloat16 has 128 distinct values", len(np.unique(low)) == 128)
expect("none is beyond 2.9", abs(low).max() < 2.9)
expect("float32 passes 4.5", abs(noise["float32"]).max() > 4.5)
expect("its mean is off by over 10 standard errors", abs(low.mean()) > 10 / 1000)
expect("in bfloat16 the upper 98 % of the tokens never come", top["bfloat16"] < 0.02 * VOCABULARY)
expect("in float32 they do", top["float32"] > 0.98 * VOCABULARY)
raise SystemExit(bool(changed))
EOF
