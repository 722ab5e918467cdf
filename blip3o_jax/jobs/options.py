"""Options that several jobs share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blip3o_jax.errors import InputError, check_seed, require
from blip3o_jax.resources import shipped_configs
from blip3o_jax.sample.settings import AnySettings, Settings, defaults

if TYPE_CHECKING:
    from blip3o_jax.pipeline import Pipeline


def option(parser: argparse.ArgumentParser, flag: str, default: object, text: str) -> None:
    """Adds an option of the default's type, whose help says the default."""
    help_text = f"{text} (default: %(default)s)"
    parser.add_argument(flag, type=type(default), default=default, help=help_text)


def config_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds --config, beside which `cli.main` accepts --config.key=value."""
    text = f"a config file or a shipped one{more}: {', '.join(shipped_configs())}"
    parser.add_argument("--config", required=True, help=text)
    parser.set_defaults(overridable=True)


def run_options(parser: argparse.ArgumentParser) -> None:
    """Adds --config, --workdir and --allow, whose keys become a tuple."""
    config_option(parser)
    parser.add_argument("--workdir", required=True)
    text = "config keys, comma-separated, that may differ from the workdir's (docs/data.md)"
    keys = {"default": (), "type": lambda value: tuple(filter(None, value.split(",")))}
    parser.add_argument("--allow", metavar="KEYS", help=text, **keys)


def overwrite_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --overwrite; `what` is replaced by it."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint."""
    folders = "folder in the published PyTorch layout or of `convert to-jax`, or training workdir"
    folders += ", of which WORKDIR@STEP is the checkpoint of a step"
    option(parser, "--checkpoint", "emoji_64", f"embedded name, {folders}")


def device_options(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size and --mesh."""
    parser.add_argument("--batch-size", type=int, help="images made at once (default: by device)")
    parser.add_argument("--mesh", default="", help="e.g. data=4,fsdp=2 (default: data over all)")


def model_options(
    parser: argparse.ArgumentParser, kind: type[Settings] = Settings, to_file: bool = False
) -> None:
    """Adds the checkpoint, how it samples, and where the results go: `to_file` allows one image."""
    checkpoint_option(parser)
    more = ", or NAME.png, .webp or .jpg for one image" if to_file else ""
    option(parser, "--out", "out", f"folder for the results{more}")
    overwrite_option(parser, "earlier results")
    option(parser, "--seed", 0, "seed of the images")
    device_options(parser)
    for field in dataclasses.fields(kind):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=field.metadata["help"])
        elif field.name == "num_inference_steps":
            text = f"{field.metadata['help']} (default: {field.default}, or the few of a checkpoint"
            parser.add_argument(flag, type=int, help=f"{text} of few steps)")
        else:
            option(parser, flag, field.default, field.metadata["help"])


def share_option(parser: argparse.ArgumentParser) -> None:
    """Adds --share."""
    share = "make share I, from 0, of N alone (default: as the launcher's variables say)"
    parser.add_argument("--share", default="", metavar="I/N", help=share)


def job_options(parser: argparse.ArgumentParser) -> None:
    """Adds what belongs to a job of many requests."""
    share_option(parser)
    formats = "format of the pictures; tar, array_record: files of many (default: %(default)s)"
    kinds = ("png", "webp", "jpeg", "tar", "array_record")
    parser.add_argument("--format", choices=kinds, default="png", help=formats)
    option(parser, "--best-of", 1, "keep the best by --reward of so many candidates for each image")
    reward = "score images in the manifest by scenes or strict (the embedded world's judge), ocr or"
    reward += " http://HOST/PATH; several times for the mean of several"
    parser.add_argument("--reward", action="append", default=[], metavar="NAME", help=reward)
    status = "print what is done of the job in --out, and how fast, as JSON"
    parser.add_argument("--status", action="store_true", help=status)


def check_devices(args: argparse.Namespace) -> None:
    """InputError for a --batch-size or --mesh that no devices have."""
    from blip3o_jax.parallel.mesh import parse_mesh

    size = args.batch_size
    require(size is None or size >= 1, f"--batch-size is at least 1, not {size}.")
    parse_mesh(args.mesh)


def load_for(args: argparse.Namespace) -> Pipeline:
    """The checkpoint of the command line on its mesh."""
    from blip3o_jax import checkpoints, pipeline
    from blip3o_jax.kernels.platform import is_narrow
    from blip3o_jax.parallel import mesh

    check_devices(args)
    size = args.batch_size
    # A narrow model is faster with each core of a CPU as a device; --mesh decides otherwise.
    if not args.mesh and is_narrow(checkpoints.config_of(args.checkpoint)):
        mesh.split_cpu_into_devices(size or pipeline.CPU_BATCH)
    return pipeline.load(args.checkpoint, mesh=mesh.parse_mesh(args.mesh), batch_size=size)


def settings_of(args: argparse.Namespace, kind: type[AnySettings] = Settings) -> AnySettings:
    """The sampling options of the command line, of its checkpoint; InputError also for its seed."""
    from blip3o_jax import checkpoints

    check_seed(args.seed, "--seed")
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}
    if values["num_inference_steps"] is not None:
        return kind(**values)
    del values["num_inference_steps"]
    return defaults(checkpoints.config_of(args.checkpoint), kind, **values)


@contextlib.contextmanager
def needs_torch(flag: str) -> Iterator[None]:
    """Names the extra where PyTorch or what belongs to it cannot be imported."""
    try:
        yield
    except ImportError as error:
        problem = f"{flag} needs PyTorch, transformers and diffusers ({error.name} is missing)"
        raise InputError(f"{problem}: pip install 'blip3o-jax[parity]'.") from error
