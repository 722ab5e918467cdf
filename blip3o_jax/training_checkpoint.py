"""Training checkpoints by Orbax, asynchronous, atomic, the newest N kept:
WORKDIR/checkpoints/STEP/{model,optimizer,config,model_config,notes} and hashes.json.

`model` is {"params", "frozen"[, "ema"]} and can be read alone; `optimizer` is {"step", "opt_state",
"guard"}; `config` the run's config, `model_config` the model's as in a published config.json, and
`notes` the clock's totals, as JSON; hashes.json has the SHA-256 of the files of `model`. The data
position is the step itself, and so is the state of every random key. A folder appears under its
number when everything in it is written; one that was killed on the way is removed by the next run.
One that lost files later is set aside under another name.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import pathlib
import shutil

import jax

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import hashes
from blip3o_jax.convert.config_json import config_from_json, config_to_json
from blip3o_jax.convert.orbax_io import Leaf, open_leaves
from blip3o_jax.convert.published import about
from blip3o_jax.convert.safetensors_io import read_json
from blip3o_jax.errors import InputError, disk_reason
from blip3o_jax.moved import refuse
from blip3o_jax.parallel.processes import process_zero_first
from blip3o_jax.presets import preset

__getattr__ = functools.partial(refuse, "training_checkpoint")

log = logging.getLogger(__name__)

OPTIMIZER = ("step", "opt_state", "guard")  # of the state, beside the weights

# bytes of an array that are one file's piece; whoever reads the array holds it once and a piece,
# not twice
PIECE = 64 << 20

# what Orbax writes last for each item
LAST_FILES = (
    "_CHECKPOINT_METADATA",
    "config/metadata",
    *("model/_METADATA", "model/manifest.ocdbt"),
    *("optimizer/_METADATA", "optimizer/manifest.ocdbt"),
)
UNFINISHED = "*.orbax-checkpoint-tmp*"  # folders of checkpoints that have no name yet
CONFIG_LIMIT = 4 << 20  # bytes


def open_manager(workdir: str | pathlib.Path, keep: int = 1):
    """Orbax's manager of a workdir's checkpoints, after those that are incomplete are set aside;
    InputError when it cannot be written."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_not_orbax)
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    # Runs in the background before a checkpoint takes its name, and in process 0 only.
    then = ocp.options.AsyncOptions(post_finalization_callback=lambda: _record_hashes(folder))
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, async_options=then)
    try:
        with process_zero_first("the checkpoints"):
            for unfinished in folder.glob(UNFINISHED):
                log.warning("%s was not written to its end and is removed.", unfinished)
                shutil.rmtree(unfinished, ignore_errors=True)
            for broken in _numbered(folder) - complete(folder):
                names = (folder / f"{broken.name}.broken-{n}" for n in itertools.count())
                aside = next(name for name in names if not name.exists())
                log.warning("%s lacks some of its files and is now %s.", broken, aside.name)
                broken.rename(aside)
        return ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise InputError(
            f"The checkpoints {folder} cannot be written: {error.strerror}."
        ) from error


def _record_hashes(folder: pathlib.Path) -> None:
    """Records the hashes of the weights of the checkpoint that is just being written."""
    for unfinished in folder.glob(UNFINISHED):
        hashes.record(unfinished, weight_files(unfinished))


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files with the weights in the checkpoint `folder`."""
    return [file for file in (folder / "model").rglob("*") if file.is_file()]


def _not_orbax(record: logging.LogRecord) -> bool:
    """False for what Orbax logs, with a traceback, in its own threads: it is raised again in ours,
    where it becomes one sentence."""
    return "orbax" not in record.pathname


def _numbered(folder: pathlib.Path) -> set[pathlib.Path]:
    return {child for child in folder.glob("*") if child.name.isdigit()}


def complete(folder: pathlib.Path) -> set[pathlib.Path]:
    """The checkpoints below `folder` with all their items, each with the file that Orbax writes
    last."""
    return {child for child in _numbered(folder) if all((child / x).is_file() for x in LAST_FILES)}


def is_workdir(directory: str | pathlib.Path) -> bool:
    """Whether the directory is a training run's with at least one complete checkpoint."""
    return bool(complete(pathlib.Path(directory) / "checkpoints"))


@contextlib.contextmanager
def _writing(manager):
    """Says in one sentence what went wrong while a checkpoint was written, which may have been the
    one before."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = disk_reason(error) or str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"A checkpoint cannot be written to {manager.directory}: {reason}; those "
            "before it are whole."
        ) from error


def save(manager, config, state, frozen, notes: dict) -> None:
    """Saves in the background under the state's step; `notes` come back from `restore`.

    The arrays may be donated when this returns. InputError when this checkpoint or the one before
    it cannot be written.
    """
    import orbax.checkpoint as ocp

    model = _model_item(state, frozen)
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE), model)
    with _writing(manager):
        manager.save(
            int(state["step"]),
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model, save_args=pieces),
                optimizer=ocp.args.StandardSave({name: state[name] for name in OPTIMIZER}),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
                model_config=ocp.args.JsonSave(config_to_json(config.blip3o())),
                notes=ocp.args.JsonSave(notes),
            ),
            force=True,
        )


def _model_item(state: dict, frozen: dict) -> dict:
    """The weights, with their average where there is one."""
    weights = {name: state[name] for name in ("params", "ema") if name in state}
    return {**weights, "frozen": frozen}


def finish(manager) -> None:
    """Waits until everything is written; InputError when it cannot be."""
    with _writing(manager):
        manager.wait_until_finished()


def restore(manager, state, frozen):
    """(state, frozen, notes) of the newest checkpoint, onto the placement of (state, frozen):
    arrays, or abstract ones with shardings.

    InputError when it cannot be read, or is of other arrays.
    """
    import orbax.checkpoint as ocp

    def abstract(tree):
        def describe(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        return ocp.args.StandardRestore(jax.tree.map(describe, tree))

    # What Orbax reads, and where it places it: the shardings saved with it are not trusted.
    optimizer = {name: state[name] for name in OPTIMIZER}
    args = ocp.args.Composite(
        model=abstract(_model_item(state, frozen)),
        optimizer=abstract(optimizer),
        notes=ocp.args.JsonRestore(),
    )
    step = manager.latest_step()
    try:
        saved = manager.restore(step, args=args)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"The checkpoint {manager.directory / str(step)} cannot be read: "
            f"{str(error).strip().splitlines()[0][:300]} "
            "Move it away, and the run resumes from the one before."
        ) from error
    model = dict(saved["model"])
    frozen = model.pop("frozen")
    return {**model, **saved["optimizer"]}, frozen, saved["notes"]


def newest(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder of a run's newest checkpoint; InputError when there is no complete one."""
    folders = complete(pathlib.Path(workdir).absolute() / "checkpoints")
    if not folders:
        raise InputError(f"{workdir} holds no complete training checkpoint.")
    return max(folders, key=lambda folder: int(folder.name))


def read_config(folder: pathlib.Path) -> dict:
    """The run's config as nested dicts, as the checkpoint in `folder` has it."""
    return read_json(folder / "config" / "metadata", CONFIG_LIMIT)


def model_config(folder: pathlib.Path) -> Blip3oConfig:
    """The config of the model in the checkpoint `folder`, without padding of the vocabulary."""
    file = folder / "model_config" / "metadata"
    fields = read_json(file, CONFIG_LIMIT) if file.is_file() else _older_model(folder)
    with about(file):
        return config_from_json(fields, None)


def _older_model(folder: pathlib.Path) -> dict:
    """The same fields for a checkpoint of version 0.1, which has the run's config alone: a preset
    and changes to it."""
    run = read_config(folder)
    with about(folder / "config" / "metadata"):
        return config_to_json(replace(preset(run["preset"]), **run["model"]))


def open_weights(folder: pathlib.Path) -> dict[str, Leaf]:
    """The weights in the checkpoint `folder` by "part/.../leaf", unread; their average where one
    was kept."""
    leaves = open_leaves(folder / "model")
    averaged = any(path.startswith("ema/") for path in leaves)
    groups = ("frozen", "ema" if averaged else "params")
    parted = ((path.partition("/"), leaf) for path, leaf in leaves.items())
    return {path: leaf for (group, _, path), leaf in parted if group in groups}
