"""Options that several jobs share."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TypeVar

from blip3o_jax.errors import InputError
from blip3o_jax.sample.settings import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)


def option(parser: argparse.ArgumentParser, flag: str, default: object, text: str) -> None:
    """Adds an option of the default's type, whose help says the default."""
    help_text = f"{text} (default: %(default)s)"
    parser.add_argument(flag, type=type(default), default=default, help=help_text)


def config_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds --config, beside which `cli.main` accepts --config.key=value."""
    text = f"a config file or the name of a shipped one{more}"
    parser.add_argument("--config", required=True, help=text)
    parser.set_defaults(overridable=True)


def overwrite_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --overwrite; `what` is replaced by it."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def model_options(parser: argparse.ArgumentParser, kind: type[Settings] = Settings) -> None:
    """Adds the checkpoint, how it samples, and where the results go."""
    folders = "folder in the published PyTorch layout or of `convert to-jax`, or training workdir"
    option(parser, "--checkpoint", "emoji_64", f"embedded name, {folders}")
    option(parser, "--out", "out", "folder for the results, or NAME.png for one image")
    overwrite_option(parser, "earlier results")
    option(parser, "--seed", 0, "of the images")
    parser.add_argument("--batch-size", type=int, help="images made at once (default: by device)")
    parser.add_argument("--mesh", default="", help="e.g. data=4,fsdp=2 (default: data over all)")
    for field in dataclasses.fields(kind):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=field.metadata["help"])
        else:
            option(parser, flag, field.default, field.metadata["help"])


def settings_of(args: argparse.Namespace, kind: type[AnySettings] = Settings) -> AnySettings:
    """The sampling options of the command line."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


@contextlib.contextmanager
def needs_torch(flag: str) -> Iterator[None]:
    """Names the extra where PyTorch or what belongs to it cannot be imported."""
    try:
        yield
    except ImportError as error:
        problem = f"{flag} needs PyTorch, transformers and diffusers ({error.name} is missing)"
        raise InputError(f"{problem}: pip install 'blip3o-jax[parity]'.") from error
