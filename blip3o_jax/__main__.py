"""`python -m blip3o_jax`: the command line, where its script is not on PATH."""

import sys

from blip3o_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
