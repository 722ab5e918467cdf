"""`blip3o-jax compile`: the programs of a checkpoint, compiled before they are needed."""

from __future__ import annotations

import argparse
import json
import logging
import time

from blip3o_jax.errors import os_errors, require
from blip3o_jax.jobs.options import check_devices, checkpoint_option, device_options, load_for
from blip3o_jax.sample.settings import Settings

HELP = "compile a checkpoint's programs ahead of time; later starts on such devices run them"

log = logging.getLogger(__name__)


def options(parser: argparse.ArgumentParser) -> None:
    checkpoint_option(parser)
    device_options(parser)
    steps = "Euler steps of the images (default: as `generate` takes them for the checkpoint)"
    parser.add_argument("--num-inference-steps", type=int, help=steps)
    top_k = Settings.top_k
    parser.add_argument(
        "--top-k", type=int, default=top_k, help=f"tokens to sample from (default: {top_k})"
    )
    server = "the programs of `serve`, which do for any number of steps, instead"
    parser.add_argument("--server", action="store_true", help=server)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compiles what requests of any length need that is not there yet; prints one JSON line last.

    Of several processes each compiles for its own devices, as in a job of `generate`.
    """
    count = args.num_inference_steps
    steps = {} if count is None else {"num_inference_steps": count}
    Settings(top_k=args.top_k, **steps)  # which checks them
    both = args.server and (steps or args.top_k != Settings.top_k)
    require(not both, "--server compiles for any number of steps and its own --top-k alone.")
    check_devices(args)
    from blip3o_jax import executables, paths
    from blip3o_jax.parallel.processes import share
    from blip3o_jax.request import of_each_shape

    share()
    begun, pipeline = time.monotonic(), load_for(args)
    folder = executables.folder()
    nowhere = "Programs are kept nowhere: JAX_ENABLE_COMPILATION_CACHE is off, or see above."
    require(folder is not None, nowhere)
    with os_errors(f"{folder} cannot be written"):
        paths.write_bytes(trial := folder / f"{paths.NEW}trial", b"")
        trial.unlink(missing_ok=True)  # of several processes one does
    before = executables.kept(folder)
    if args.server:
        steps = {"num_inference_steps": 1}
        pipeline.watch(lambda steps: (), lambda step, steps, show: show())
    shapes = of_each_shape(
        pipeline.model.config, pipeline.text, guided=args.server, top_k=args.top_k, **steps
    )
    for request in (requests := list(shapes)):
        start = time.monotonic()
        list(pipeline.run([request]))
        what = "an edit" if request.images else "an image"
        log.info("Compiled what %s needs: %.1f s.", what, time.monotonic() - start)
    new = dict(executables.kept(folder).items() - before.items())
    report = {
        "checkpoint": pipeline.identity,
        "shapes": len(requests),
        "programs_compiled": len(new),
        "bytes": sum(size for size, _ in new.values()),
        "seconds": round(time.monotonic() - begun, 1),
        "folder": str(folder),
    }
    print(json.dumps(report))
    return 0
