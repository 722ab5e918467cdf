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
if $all; then
  python -m pytest -m "" # every mark; tests that need what is not installed say so themselves
else
  python -m pytest
fi
