#!/usr/bin/env bash
# A compiled program that JAX read from its compilation cache serializes without an error, to a file
# that loads without an error and cannot run. What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cat > program.py <<'EOF'
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

mode, file = sys.argv[1], pathlib.Path(sys.argv[2])
x = jnp.arange(8.0)
if mode == "write":
    program = jax.jit(lambda x: jnp.cumsum(jnp.sin(x) @ jnp.outer(x, x))).lower(x).compile()
    program(x)
    file.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
else:
    program = serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
    print("loaded", flush=True)
    print("ran", program(x).shape)
EOF
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$folder/cache"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# The first process compiles; the second finds the program in the cache; both serialize it.
for n in 1 2; do
  venv/bin/python program.py write "$n.bin"
  venv/bin/python program.py read "$n.bin" > "$n.txt" 2>&1 || true
  echo "Process $n wrote $(stat -c %s "$n.bin") bytes, of which another says: $(grep -v '^ ' "$n.txt" | sed '/^Traceback/d;/^For simp/d;/^---/d;/^The above/d' | tr '\n' ' ')"
done
changed=0
expect() { # what, command...
  if "${@:2}"; then echo "as found: $1"; else
    echo "CHANGED:  $1"
    changed=1
  fi
}
echo "jax $(venv/bin/python -c 'import jax; print(jax.__version__)')"
expect "what was compiled here runs elsewhere" grep -q "^ran" 1.txt
expect "what came from the cache is written and loaded without an error" grep -q "^loaded" 2.txt
expect "but does not run: a function is not found" grep -q "NOT_FOUND: Function" 2.txt
exit "$changed"
