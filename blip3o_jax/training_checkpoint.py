"""Training checkpoints by Orbax, asynchronous, atomic, the newest N kept:
WORKDIR/checkpoints/STEP/{model,optimizer,config,model_config,notes} and hashes.json.

`model` is {"params", "frozen"[, "ema"]} and can be read alone; `optimizer` is {"step", "opt_state",
"guard"[, "old"]}; `config` the run's config, `model_config` the model's as in a published
config.json, `notes` the clock's totals. The data position is the step itself, and so is the state
of every random key. A folder appears under its number when everything in it is written; one that
was killed on the way is removed by the next run; one that lost files later, or of which a byte is
not what hashes.json recorded, is set aside under another name, and the run resumes from the one
before.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Iterator

import jax

from blip3o_jax import buckets, paths
from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.convert import hashes, orbax_io
from blip3o_jax.convert.config_json import config_from_json, config_to_json
from blip3o_jax.errors import InputError, about, disk_reason, first_line, require
from blip3o_jax.files import read_json
from blip3o_jax.moved import refuse
from blip3o_jax.parallel.processes import process_zero_first
from blip3o_jax.paths import AnyPath
from blip3o_jax.presets import preset

__getattr__ = functools.partial(refuse, "training_checkpoint")
log = logging.getLogger(__name__)

OPTIMIZER = ("step", "opt_state", "guard", "old")  # of the state, beside the weights
# bytes of an array in one piece of a file; its reader holds it once and a piece, not twice
PIECE = 64 << 20
# what Orbax writes last for each item
LAST_FILES = ("_CHECKPOINT_METADATA", "config/metadata")
LAST_FILES += ("model/_METADATA", "model/manifest.ocdbt")
LAST_FILES += ("optimizer/_METADATA", "optimizer/manifest.ocdbt")
UNFINISHED = "*.orbax-checkpoint-tmp*"  # folders of checkpoints that have no name yet
CONFIG_LIMIT = 4 << 20  # bytes
HASHING = 3600  # seconds that other processes wait while the first reads a checkpoint whole


def open_manager(workdir: str | AnyPath, keep: int = 1):
    """Orbax's manager of a workdir's checkpoints, after incomplete and damaged ones are set aside;
    InputError when no other is left."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_not_orbax)
    folder = paths.path(workdir).absolute() / "checkpoints"
    if paths.is_bucket(folder):
        orbax_io.teach_buckets()
    # The hashes: runs in the background before a checkpoint takes its name, and in process 0 only.
    then = ocp.options.AsyncOptions(post_finalization_callback=lambda: _record_hashes(folder))
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, async_options=then)
    with paths.remote_errors(f"The checkpoints {folder} cannot be written"):
        with process_zero_first("the checkpoints", HASHING) as first:
            if first:
                _set_aside(folder)
        # A run that has lost all it had does not begin anew unasked.
        broken = sorted(path.name for path in folder.glob("*.broken-*"))
        is_left = bool(complete(folder)) or not broken
        lost = f"{folder} holds damaged checkpoints alone ({', '.join(broken)})"
        require(is_left, f"{lost}; restore one under its number, or remove them to begin anew.")
        return ocp.CheckpointManager(os.fspath(folder), options=options)


def _not_orbax(record: logging.LogRecord) -> bool:
    """False for tracebacks from Orbax's threads: they are raised again in ours, as one sentence."""
    return "orbax" not in record.pathname


def _set_aside(folder: AnyPath) -> None:
    """Removes checkpoints that a killed run was writing; renames those that lost files later, and
    the newest ones until one is as it was written."""
    for unfinished in _unfinished(folder):
        log.warning("%s was not written to its end and is removed.", unfinished)
        paths.remove_folder(unfinished)
    for broken in _numbered(folder) - complete(folder):
        _rename(broken, f"{broken} lacks some of its files")
    for checkpoint in sorted(complete(folder), key=lambda path: -int(path.name)):
        try:
            hashes.compare(checkpoint, _recorded(checkpoint), whole=True)
            break
        except InputError as error:
            _rename(checkpoint, str(error))


def _rename(checkpoint: AnyPath, reason: str) -> None:
    """Sets a checkpoint aside."""
    names = (checkpoint.with_name(f"{checkpoint.name}.broken-{n}") for n in itertools.count())
    aside = next(name for name in names if not name.exists())
    log.warning("%s It is set aside as %s.", reason.rstrip(".") + ".", aside.name)
    paths.move_folder(checkpoint, aside, orbax_io.MARKER)


def _unfinished(folder: AnyPath) -> list[AnyPath]:
    """Checkpoints that are being written, or were when their run was killed."""
    if paths.is_bucket(folder):
        return [x for x in _numbered(folder) if not (x / orbax_io.MARKER).is_file()]
    return list(folder.glob(UNFINISHED))


def _recorded(checkpoint: AnyPath) -> list[AnyPath]:
    """The files of a checkpoint whose hashes were recorded; those of version 0.1 have none."""
    if not (checkpoint / hashes.RECORD).is_file():
        return []
    names = read_json(checkpoint / hashes.RECORD, hashes.RECORD_LIMIT)
    return [checkpoint / name for name in names if (checkpoint / name).is_file()]


def _record_hashes(folder: AnyPath) -> None:
    """Records the hashes of all that the checkpoint holds that is just being written: Orbax's
    format has none of arrays."""
    for unfinished in _unfinished(folder):
        inner = paths.files_below(unfinished)
        hashes.record(unfinished, [file for file in inner if file.parent != unfinished])


def weight_files(folder: AnyPath) -> list[AnyPath]:
    """The files with the weights in the checkpoint `folder`."""
    return paths.files_below(folder / "model")


def _numbered(folder: AnyPath) -> set[AnyPath]:
    return {child for child in folder.glob("*") if child.name.isdigit()}


def complete(folder: AnyPath) -> set[AnyPath]:
    """The checkpoints below `folder` that have all that Orbax writes last."""
    last = LAST_FILES + ((orbax_io.MARKER,) if paths.is_bucket(folder) else ())
    return {child for child in _numbered(folder) if all((child / x).is_file() for x in last)}


def is_workdir(directory: str | AnyPath) -> bool:
    """Whether the directory is a training run's with at least one complete checkpoint."""
    return bool(complete(paths.path(directory) / "checkpoints"))


@contextlib.contextmanager
def _writing(manager) -> Iterator[None]:
    """InputError for what went wrong while a checkpoint, this or the one before, was written."""
    try:
        yield
    except Exception as error:
        is_disk = isinstance(error, OSError | ValueError | RuntimeError)
        if not (is_disk or buckets.is_clients(error)):
            raise
        reason = disk_reason(error) or first_line(error)[:200]
        what = f"A checkpoint cannot be written to {manager.directory}: {reason}"
        raise InputError(f"{what}; those before it are whole.") from error


def save(manager, config, state, frozen, notes: dict) -> None:
    """Saves in the background under the state's step; `notes` come back from `restore`. The arrays
    may be donated when this returns. InputError when this or the one before cannot be written."""
    import orbax.checkpoint as ocp

    # Each item can be read alone: a model without its optimizer.
    model = _model_item(state, frozen)
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE), model)
    items = ocp.args.Composite(
        model=ocp.args.StandardSave(model, save_args=pieces),
        optimizer=ocp.args.StandardSave(_optimizer_item(state)),
        config=ocp.args.JsonSave(dataclasses.asdict(config)),
        model_config=ocp.args.JsonSave(config_to_json(config.blip3o())),
        notes=ocp.args.JsonSave(notes),
    )
    with _writing(manager):
        manager.save(int(state["step"]), args=items, force=True)


def _model_item(state: dict, frozen: dict) -> dict:
    """The weights, with their average where there is one."""
    return {name: state[name] for name in ("params", "ema") if name in state} | {"frozen": frozen}


def _optimizer_item(state: dict) -> dict:
    return {name: state[name] for name in OPTIMIZER if name in state}


def finish(manager) -> None:
    """Waits until everything is written; InputError when it cannot be."""
    with _writing(manager):
        manager.wait_until_finished()


def restore(manager, state, frozen):
    """(state, frozen, notes) of the newest checkpoint, placed as these, arrays or abstract ones;
    InputError when it cannot be read, or is of other arrays."""
    import orbax.checkpoint as ocp

    def abstract(x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    # What Orbax reads, and where it places it: the shardings saved with it are not trusted.
    trees = {"model": _model_item(state, frozen), "optimizer": _optimizer_item(state)}
    items = {x: ocp.args.StandardRestore(jax.tree.map(abstract, tree)) for x, tree in trees.items()}
    items["notes"], step = ocp.args.JsonRestore(), manager.latest_step()
    try:
        saved = manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax raises plain ones too
        reason = first_line(error)[:300]
        what = f"The checkpoint {manager.directory / str(step)} cannot be read: {reason}"
        fix = "Move it away, and the run resumes from the one before."
        raise InputError(f"{what} {fix}") from error
    # The state as it was saved, its parts in two items.
    model = dict(saved["model"])
    frozen = model.pop("frozen")
    return {**model, **saved["optimizer"]}, frozen, saved["notes"]


def newest(workdir: str | AnyPath) -> AnyPath:
    """The folder of a run's newest checkpoint; InputError when there is no complete one."""
    folders = complete(paths.path(workdir).absolute() / "checkpoints")
    require(len(folders) > 0, f"{workdir} holds no complete training checkpoint.")
    return max(folders, key=lambda folder: int(folder.name))


def read_config(folder: AnyPath) -> dict:
    """The run's config as nested dicts, as the checkpoint in `folder` has it."""
    return read_json(folder / "config" / "metadata", CONFIG_LIMIT)


def model_config(folder: AnyPath) -> Blip3oConfig:
    """The config of the model in the checkpoint `folder`, without padding of the vocabulary."""
    file = folder / "model_config" / "metadata"
    if file.is_file():
        fields = read_json(file, CONFIG_LIMIT)
    else:  # version 0.1 saved the run's config alone: a preset and changes to it
        run = read_config(folder)
        with about(folder / "config" / "metadata"):
            name, changes = run.get("preset"), run.get("model")
            is_model = isinstance(name, str) and isinstance(changes, dict)
            require(is_model, "it has no preset with changes to it.")
            fields = config_to_json(replace(preset(name), **changes))
    with about(file):
        return config_from_json(fields, None)


def open_weights(folder: AnyPath) -> dict[str, orbax_io.Leaf]:
    """The weights, or their average if it was kept, by "part/.../leaf", unread."""
    leaves = orbax_io.open_leaves(folder / "model")
    groups = ("frozen", "ema" if any(path.startswith("ema/") for path in leaves) else "params")
    parted = ((path.partition("/"), leaf) for path, leaf in leaves.items())
    return {path: leaf for (group, _, path), leaf in parted if group in groups}
