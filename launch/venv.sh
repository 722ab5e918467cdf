# Sourced by the other scripts: goes to the clone's root and puts .venv, made on first use, at the front of PATH.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# Prints the first Python of version 3.11 or newer; a version manager's shim that does not run is passed over.
find_python() {
  local candidate
  for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or newer found (tried python3, python3.11 to python3.14, python); install one and run this again." >&2
  return 1
}

# $1: folder of the environment. Does nothing when it is there and works.
make_venv() {
  local python
  if ! "$1/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making $1 with $("$python" --version)"
    "$python" -m venv --clear "$1"
  fi
}

make_venv .venv
export PATH="$PWD/.venv/bin:$PATH"
