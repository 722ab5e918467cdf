#!/usr/bin/env bash
# Four pictures from a fresh clone: installs the package into .venv and generates with the embedded checkpoint. Safe to run again.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

python -m pip install --quiet --editable .

blip3o-jax generate "two red hearts" "a blue cat left of a tree" "three birds on pink" "a purple key and a green apple" \
  --out out/quickstart --overwrite

echo "The pictures are in $PWD/out/quickstart"
