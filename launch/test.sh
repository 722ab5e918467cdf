#!/usr/bin/env bash
# Format, lint and tests in .venv.  `bash launch/test.sh`: all that needs neither PyTorch nor libtpu.  `--all`: also parity with PyTorch's
# own modules, and the pod configs through the TPU's compiler.
set -euo pipefail

case "${1:-}" in
  "") all=false ;;
  --all) all=true ;;
  *)
    echo "Unknown argument '$1'; usage: bash launch/test.sh [--all]" >&2
    exit 2
    ;;
esac

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

if $all; then
  # PyTorch alone and first: named exactly, a CPU build on disk or on an index set for pip (PIP_INDEX_URL, PIP_FIND_LINKS) is taken,
  # and the extra below then finds it installed instead of fetching the CUDA packages.
  python -m pip install --quiet torch==2.13.0
  # Newer than the pair that the extra [tpu] pins for running on TPUs: it compiles in half the time and prints what it made.
  python -m pip install --quiet --editable ".[test,parity]" libtpu==0.0.52
else
  python -m pip install --quiet --editable ".[test]"
fi

ruff format --check .
ruff check .
if ! $all; then
  exec python -m pytest
fi

# The TPU's compiler works on one core, a minute or three at a time: beside the other tests, its own lines after theirs.
log=$(mktemp)
python -m pytest -m tpu_compile >"$log" 2>&1 &
compiling=$!
trap 'kill "$compiling" 2>/dev/null || true; rm -f "$log"' EXIT
python -m pytest -m "not tpu_compile" # tests that need what is not installed say so themselves
code=0
wait "$compiling" || code=$?
cat "$log"
exit "$code"
