#!/usr/bin/env bash
# Four pictures from a fresh clone: installs the package into .venv and generates with the embedded checkpoint. Safe to run again.
set -euo pipefail
if (($#)); then
  echo "quickstart.sh takes no options, not '$1'; blip3o-jax generate does." >&2
  exit 2
fi
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

echo "Installing the package, JAX and what they need into $PWD/.venv: some minutes the first time, seconds later."
python -m pip install --quiet --editable .

echo "Generating four pictures: the programs are compiled first, a minute or two on two cores; later starts take them from disk."

blip3o-jax generate "two red hearts" "a blue cat left of a tree" "three birds on pink" "a purple key and a green apple" \
  --out out/quickstart --overwrite

echo "The pictures are in $PWD/out/quickstart"
