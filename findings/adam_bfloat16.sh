#!/usr/bin/env bash
# optax.adamw on bfloat16 parameters: the second moment never forgets, because 0.999 is 1 in
# bfloat16. What it means for you: findings/README.md.
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
import optax

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


print("jax", jax.__version__, "optax", optax.__version__)
print("One gradient of 100, then 4999 of 0.01; optax.adamw(1e-3, weight_decay=0):")
optimizer = optax.adamw(1e-3, b1=0.9, b2=0.999, weight_decay=0.0)
update = jax.jit(optimizer.update)
moments, steps = {}, {}
for dtype in ("float32", "bfloat16"):
    params = jnp.ones(1, dtype)
    state = optimizer.init(params)
    for i in range(5000):
        step, state = update(jnp.full(1, 100.0 if i == 0 else 0.01, dtype), state, params)
        if i == 0:
            first = float(state[0].nu[0])
    last = float(state[0].nu[0])
    moments[dtype], steps[dtype] = (first, last), float(step[0])
    print(f"  {dtype:9} second moment {first:.4g}, 4999 steps later {last:.4g};", end="")
    print(f" the last update {steps[dtype]:.3g}")

print("One step of optax.inject_hyperparams(optax.adamw) on bfloat16, gradient 0.1:")
injected = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
params = jnp.ones(1, "bfloat16")
step, state = injected.update(jnp.full(1, 0.1, "bfloat16"), injected.init(params), params)
print("  b2 is", float(state.hyperparams["b2"]), "and the update", float(step[0]))

first, last = moments["bfloat16"]
expect("in bfloat16 the second moment is what it was", first == last == 10.0)
first, last = moments["float32"]
expect("in float32 it has decayed by 0.999 a step", 0.005 * first < last < 0.008 * first)
ratio = steps["float32"] / steps["bfloat16"]
expect("the bfloat16 update is over 10 times smaller", ratio > 10)
expect("hyperparameters take the gradients' dtype: b2 is 1", state.hyperparams["b2"] == 1)
expect("and the first update is NaN", bool(jnp.isnan(step).all()))
raise SystemExit(bool(changed))
EOF
