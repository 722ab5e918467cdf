r"""Whether a job of blip3o-jax can start, before a machine for it is asked for: its options, its
config, and whether that is for these chips. Touches no device. Prints preflight's options for the
job on one line, quoted; exit code 0, or 2 with one sentence.

    python launch/check_job.py --type v5litepod-256 -- train --config pretrain_3b:v5e:16x16 \
        --workdir /mnt/runs/pretrain_3b
"""

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Cloud's names: of which chip, and how many of what they count make one.
CLOUD_TYPES = {"v5litepod": ("v5e", 1), "v6e": ("v6e", 1), "v5p": ("v5p", 2), "v4": ("v4", 2)}
# Options of jobs that name what is read.
INPUTS = ("checkpoint", "prompts", "edits", "sources")


def slice_of(cloud_type: str) -> tuple[str, int] | None:
    """(name of the chip, number of chips) of e.g. "v5litepod-256"; None for an unknown type."""
    kind, _, size = cloud_type.rpartition("-")
    if kind not in CLOUD_TYPES or not re.fullmatch("[0-9]+", size):
        return None
    name, per_chip = CLOUD_TYPES[kind]
    return name, int(size) // per_chip


def inputs_of(cfg, is_run: bool) -> Iterator[tuple[str, str]]:
    """(key, path) of what a job reads by its config: of a run that has a cache, no source."""
    from blip3o_jax.checkpoints import embedded

    data = cfg.data
    yield from (("init", name) for name in cfg.init.values() if name not in embedded())
    yield from (("data.tokenizer", data.tokenizer), ("data.prompts", data.prompts))
    if is_run and data.cache:
        yield "data.cache", data.cache
    else:
        for source in data.sources:
            yield from (("data.sources", source.path), ("data.sources", source.root))


def check_config(
    name: str, overrides: list[str], job: str, cloud_type: str, is_fresh: bool
) -> None:
    """InputError when the config is wrong, of another job or for another slice, or names what fresh
    hosts do not have."""
    import jax

    from blip3o_jax.chips import CHIPS, parse_topology
    from blip3o_jax.errors import require
    from blip3o_jax.parallel.mesh import AXES, mesh_shape
    from blip3o_jax.train.read_config import read_config
    from blip3o_jax.train.start import check_batches

    cfg = read_config(name, overrides)
    is_run = job in ("train", "grpo")
    other = f"{name} is of stage {cfg.stage!r}; `blip3o-jax {cfg.record.job}` runs that."
    require(not is_run or cfg.record.job == job, other)
    # How many devices it will find, as far as the config or the type of the slice says it.
    present = slice_of(cloud_type)
    count = present and present[1] * CHIPS[present[0]].devices
    if cfg.topology:
        chip, count = parse_topology(cfg.topology)
        planned = cfg.topology.partition(":")[0], count // chip.devices
        sentence = f"--type {cloud_type} is not {cfg.topology}, which {name} is for"
        fix = "name another type, or --config NAME:TOPOLOGY"
        require(present in (None, planned), f"{sentence}: {planned[1]} chips; {fix}.")
    if is_run and count:
        mesh = jax.sharding.AbstractMesh(mesh_shape(cfg.mesh, count), AXES)
        check_batches(cfg, mesh)
    for key, path in inputs_of(cfg, is_run) if is_fresh else ():
        check_path(key, path)


def check_path(key: str, path: str) -> None:
    """InputError for a relative path, which leads into the clone."""
    from blip3o_jax.errors import require

    is_kept = not path or "://" in path or os.path.isabs(path)
    inside = f"{key} {path} is inside the clone, which is new on a host at every start"
    require(is_kept, f"{inside}; give a path that begins with /, on a disk that all hosts see.")


def check_options(job: argparse.Namespace, is_fresh: bool) -> None:
    """InputError for results that a restart would delete, and for what fresh hosts do not have."""
    from blip3o_jax.cli import RESUMED
    from blip3o_jax.errors import require

    option = "workdir" if hasattr(job, "workdir") else "out"
    folder = getattr(job, option, "")
    if is_fresh:
        from blip3o_jax.checkpoints import embedded

        check_path(f"--{option}", folder)
        for name in INPUTS:
            path = getattr(job, name, None) or ""
            check_path(f"--{name}", "" if path in embedded() else path)
    again = "--overwrite would delete what was made whenever the job is started again"
    is_deleted = job.job in RESUMED and getattr(job, "overwrite", False)
    require(not is_deleted, f"{again}; delete {folder} yourself, and leave it out.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    cloud_type = "Cloud's name of the slice, e.g. v5litepod-256"
    parser.add_argument("--type", default="", help=cloud_type)
    fresh = "hosts start with this clone and nothing else, each time"
    parser.add_argument("--fresh", action="store_true", help=fresh)
    parser.add_argument(
        "job", nargs=argparse.REMAINDER, help="of blip3o-jax with its options, behind --"
    )
    args = parser.parse_args(argv)
    words = args.job[1:] if args.job[:1] == ["--"] else args.job
    try:
        from blip3o_jax.cli import parse
        from blip3o_jax.errors import InputError

        # --help and --version are no jobs; what they print is not for the launcher to read.
        with contextlib.redirect_stdout(sys.stderr):
            job = parse(words)
        config, workdir = (getattr(job, name, None) for name in ("config", "workdir"))
        if config:
            check_config(config, job.overrides, job.job, args.type, args.fresh)
        check_options(job, args.fresh)
    except SystemExit:
        return 2
    except ImportError as error:
        problem = f"the job cannot be checked here, since {sys.executable} lacks {error.name}"
        print(f"{problem}; pip install --editable . in this clone.", file=sys.stderr)
        return 2
    except ValueError as error:
        if not isinstance(error, InputError):
            raise
        print(error, file=sys.stderr)
        return 2
    if workdir:
        options = ["--config", config] if config else []
        print(shlex.join([*options, "--workdir", workdir, *job.overrides]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
