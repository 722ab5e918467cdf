#!/usr/bin/env bash
# Format, lint and tests in .venv.  `bash launch/test.sh`: all that needs neither PyTorch nor libtpu.
# `--all`: also parity with PyTorch's own modules, the pod configs through the TPU's compiler, and the
# page in a browser, which root installs from Debian's packages.
set -euo pipefail

case "$*" in
  "") all=false ;;
  --all) all=true ;;
  *)
    echo "Unknown argument '$*'; usage: bash launch/test.sh [--all]" >&2
    exit 2
    ;;
esac

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

echo "Installing the package and what its tests need into $PWD/.venv: some minutes the first time, seconds later."
if $all; then
  # PyTorch alone and first: named exactly, a CPU build on disk or on an index set for pip
  # (PIP_INDEX_URL, PIP_FIND_LINKS) is taken, and the extra below then finds it installed instead of
  # fetching the CUDA packages.
  python -m pip install --quiet torch==2.13.0
  # Newer than the pair that the extra [tpu] pins for running on TPUs: it compiles in half the time
  # and prints what it made.
  python -m pip install --quiet --editable ".[test,parity]" libtpu==0.0.52
  # The browser of tests/page, which is no Python package; without it they are skipped.
  if ((EUID == 0)) && ! command -v chromium-headless-shell chromium && command -v apt-get; then
    apt-get update --quiet=2 && apt-get install --quiet=2 --no-install-recommends -y \
      chromium-headless-shell || echo "Chromium cannot be installed: the page is not tested." >&2
  fi >/dev/null
else
  python -m pip install --quiet --editable ".[test]"
fi

ruff format --check .
ruff check .

# A worker for each core that has 4 GB of memory, two at least: XLA hardly uses two cores for the
# tests' small programs. One more with --all: the TPU's compiler keeps one busy for some minutes.
workers=$(python - <<'PYTHON'
import os
cores = len(os.sched_getaffinity(0))
memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 32
print(max(2, min(cores, memory, 8)))
PYTHON
)
if $all; then
  workers=$((workers + 1))
  only=(-m "") # tests that need what is not installed say so themselves
else
  only=()
fi

# In a process group of its own, which an interrupted run takes with it.
set -m
python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "${only[@]}" &
tests=$!
trap 'kill -- -"$tests" 2>/dev/null || true' EXIT
wait "$tests"
