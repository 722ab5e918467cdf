#!/usr/bin/env bash
# A label of -100 is not ignored by optax's cross-entropy: it is the 100th class from the end, and
# is learned. What it means for you: findings/README.md.
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


cross_entropy = optax.softmax_cross_entropy_with_integer_labels
CLASSES, IGNORED = 1000, -100
print("jax", jax.__version__, "optax", optax.__version__)
logits = jax.random.normal(jax.random.key(0), (1, CLASSES))


def losses(label, classes=CLASSES):
    return float(cross_entropy(logits[:, :classes], jnp.array([label]))[0])


print(f"Loss of one row of {CLASSES} logits, by its label:")
for label in (IGNORED, CLASSES + IGNORED, CLASSES, 3):
    print(f"  {label:5}  {losses(label):.4f}")
few = 90
print(f"And of its first {few} logits:")
print(f"  {IGNORED:5}  {losses(IGNORED, few):.4f}")

print("100 steps of gradient descent from zero logits on the labels [3, -100, -100, -100]:")
labels = jnp.array([3, IGNORED, IGNORED, IGNORED])
gradient = jax.jit(jax.grad(lambda shared: cross_entropy(jnp.tile(shared, (4, 1)), labels).mean()))
shared = jnp.zeros(CLASSES)
for _ in range(100):
    shared -= 10 * gradient(shared)
probabilities = jax.nn.softmax(shared)
best = int(jnp.argmax(probabilities))
print(f"  the likeliest class is {best}, of probability {float(probabilities[best]):.2f}")

expect("-100 has the loss of class 900", losses(IGNORED) == losses(CLASSES + IGNORED))
expect("a label beyond the last class gives NaN", losses(CLASSES) != losses(CLASSES))
expect("so does -100 where there are fewer classes", losses(IGNORED, few) != losses(IGNORED, few))
expect("class 900 is learned, which no row named", best == CLASSES + IGNORED)
raise SystemExit(bool(changed))
EOF
