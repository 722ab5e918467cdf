"""Options that several jobs share."""

import argparse
import dataclasses

from blip3o_jax.sample.settings import Settings


def config_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds --config, beside which `cli.main` accepts --config.key=value."""
    text = f"a config file or the name of a shipped one{more}"
    parser.add_argument("--config", required=True, help=text)
    parser.set_defaults(overridable=True)


def overwrite_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --overwrite; `what` is replaced by it."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, how it samples, and where the results go."""
    parser.add_argument(
        "--checkpoint",
        default="emoji_64",
        help="embedded name, folder in the published PyTorch layout or of `convert to-jax`, or "
        "training workdir (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        default="out",
        help="folder for the results, or NAME.png for one image (default: %(default)s)",
    )
    overwrite_option(parser, "earlier results")
    parser.add_argument("--seed", type=int, default=0, help="of the images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="images made at once (default: by device)")
    parser.add_argument("--mesh", default="", help="e.g. data=4,fsdp=2 (default: data over all)")
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=field.type,
            default=field.default,
            help=f"{field.metadata['help']} (default: %(default)s)",
        )


def settings_of(args: argparse.Namespace) -> Settings:
    """The sampling options of the command line."""
    return Settings(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    )
