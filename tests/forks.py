"""Processes of the rounds that kill them, forked from one that has imported all they need."""

import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable


def fork(log: pathlib.Path, function: Callable, *args) -> int:
    """Starts a process that runs `function(*args)`, its output in `log`, and ends with what that
    returns, 0 for nothing; gives its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr, force=True
        )
        code = function(*args) or 0
    except SystemExit as left:
        code = left.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
