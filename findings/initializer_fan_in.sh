#!/usr/bin/env bash
# JAX's initializers take every axis but the last two for the window of a convolution: a kernel of
# [D,N,H] or a stack of [L,D,F] starts far too small. What it means: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
JAX_PLATFORMS=cpu venv/bin/python - <<'EOF'
import jax
import jax.numpy as jnp

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


initializers = jax.nn.initializers
width, heads, size, hidden, layers = 1024, 16, 64, 512, 24
x = jax.random.normal(jax.random.key(1), (256, width))


def spread(equation, kernel):
    return float(jnp.std(jnp.einsum(equation, x, kernel)))


print("jax", jax.__version__)
print("Standard deviation of x @ kernel, x [256,1024] of standard deviation 1, by lecun_normal():")
kernels = {
    "[D,N*H]": ("bd,dn->bn", (width, heads * size), {}),
    "[D,N,H]": ("bd,dnh->bnh", (width, heads, size), {}),
    "[L,D,F]": ("bd,ldf->lbf", (layers, width, hidden), {}),
    "[D,N,H] in_axis=0, out_axis=(1, 2)": (
        "bd,dnh->bnh",
        (width, heads, size),
        {"in_axis": 0, "out_axis": (1, 2)},
    ),
    "[L,D,F] batch_axis=0": ("bd,ldf->lbf", (layers, width, hidden), {"batch_axis": 0}),
}
outputs = {}
for name, (equation, shape, axes) in kernels.items():
    outputs[name] = spread(equation, initializers.lecun_normal(**axes)(jax.random.key(0), shape))
    print(f"  {name:35} {shape!s:16} {outputs[name]:.3f}")


def near(name, value):
    return abs(outputs[name] / value - 1) < 0.05


expect("a matrix keeps the scale", near("[D,N*H]", 1))
expect("the same numbers as [D,N,H] are too small by sqrt(N) = 4", near("[D,N,H]", heads**-0.5))
expect("a stack is too small by sqrt(L) = 4.9", near("[L,D,F]", layers**-0.5))
expect("with the axes named both are right", all(near(name, 1) for name in list(kernels)[3:]))
raise SystemExit(bool(changed))
EOF
