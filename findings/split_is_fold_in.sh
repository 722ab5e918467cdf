#!/usr/bin/env bash
# jax.random.split(key, n)[i] is jax.random.fold_in(key, i): a key that is both split and folded
# gives the same numbers twice. What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
JAX_PLATFORMS=cpu venv/bin/python - <<'EOF'
import jax
import numpy as np

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


def same(count, impl=None):
    """Which of `count` keys by split are those by fold_in, of a few seeds and all i."""
    pairs = []
    for seed in (0, 7, 12345):
        key = jax.random.key(seed, impl=impl)
        for i, part in enumerate(jax.random.split(key, count)):
            folded = jax.random.fold_in(key, i)
            pairs.append(np.array_equal(jax.random.key_data(part), jax.random.key_data(folded)))
    return pairs


print("jax", jax.__version__)
key = jax.random.key(0)
init, shuffle = jax.random.split(key)
print("init, shuffle = split(key); normal of each:")
print("  init   ", jax.random.normal(init, (3,)), " shuffle", jax.random.normal(shuffle, (3,)))
print("normal of fold_in(key, step), step 0 and 1:")
first, second = (jax.random.normal(jax.random.fold_in(key, step), (3,)) for step in (0, 1))
print("  step 0 ", first, " step 1 ", second)

results = {f"split into {n}": same(n) for n in (2, 5, 64)} | {"rbg, into 5": same(5, "rbg")}
for name, pairs in results.items():
    print(f"  {name}: {sum(pairs)} of {len(pairs)} keys are fold_in's")
with jax.threefry_partitionable(False):
    before = same(5)
print(f"  jax_threefry_partitionable off (before jax 0.5): {sum(before)} of {len(before)}")

expect("step 0 draws what `init` drew", bool((jax.random.normal(init, (3,)) == first).all()))
expect("split(key, n)[i] is fold_in(key, i), whatever n", all(all(p) for p in results.values()))
expect("the old form had no such pairs", not any(before))
raise SystemExit(bool(changed))
EOF
