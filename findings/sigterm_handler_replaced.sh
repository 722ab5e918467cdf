#!/usr/bin/env bash
# jax.distributed.initialize takes SIGTERM away from Python's handler, which stays registered.
# What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile jax==0.10.2 jaxlib==0.10.2
cat >job.py <<'EOF'
import os
import signal
import socket
import sys
import time

import jax

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
if sys.argv[1] == "off":
    jax.config.update("jax_enable_preemption_service", False)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)
is_registered = getattr(signal.getsignal(signal.SIGTERM), "__name__", "") == "<lambda>"
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(2)
print("RESULT", is_registered, len(heard))
EOF
result() { JAX_PLATFORMS=cpu timeout 120 venv/bin/python job.py "$1" 2>log | grep RESULT || tail -n 5 log; }
changed=0
expect() {
  [[ $2 == "$3" ]] && echo "as found: $1" || { echo "CHANGED:  $1: $3"; changed=1; }
}
venv/bin/python -c 'import jax; print("jax", jax.__version__)'
expect "by default getsignal names the handler, and it is not called" "RESULT True 0" "$(result on)"
expect "without jax_enable_preemption_service it is called" "RESULT True 1" "$(result off)"
exit "$changed"
