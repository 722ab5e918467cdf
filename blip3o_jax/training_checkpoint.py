"""Training checkpoints by Orbax: WORKDIR/checkpoints/STEP/{model,optimizer,config,notes},
asynchronous, atomic, the newest N kept.

`model` is {"params", "frozen"[, "ema"]} and can be read alone; `optimizer` is {"step", "opt_state",
"guard"}; `config` the run's config and `notes` the clock's totals as JSON. The data position is the
step itself, and so is the state of every random key. A folder appears under its number when
everything in it is written; one that was killed on the way is swept out by the next run. One that
lost files later is set aside under another name.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from blip3o_jax.errors import InputError, disk_reason
from blip3o_jax.parallel.processes import process_zero_first
from blip3o_jax.tree import join

log = logging.getLogger(__name__)

OPTIMIZER = ("step", "opt_state", "guard")  # of the state, beside the weights

# bytes of an array that are one file's piece; whoever reads the array holds it once and a piece,
# not twice
PIECE = 64 << 20


def open_manager(workdir, keep: int = 1):
    """Orbax's manager of a workdir's checkpoints, those that are not whole out of the way.

    InputError when it cannot be written.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_not_orbax)
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    try:
        with process_zero_first("the checkpoints"):
            for half in folder.glob("*.orbax-checkpoint-tmp*"):
                log.warning("%s was not written to its end and is removed.", half)
                shutil.rmtree(half, ignore_errors=True)
            for broken in _numbered(folder) - whole(folder):
                aside = next(
                    path
                    for n in itertools.count()
                    if not (path := folder / f"{broken.name}.broken-{n}").exists()
                )
                log.warning("%s lacks some of its files and is now %s.", broken, aside.name)
                broken.rename(aside)
        return ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise InputError(
            f"The checkpoints {folder} cannot be written: {error.strerror}."
        ) from error


def _not_orbax(record: logging.LogRecord) -> bool:
    """What goes wrong in Orbax's threads it logs with its traceback, and raises in ours, where it
    becomes one sentence."""
    return "orbax" not in record.pathname


def _numbered(folder: pathlib.Path) -> set[pathlib.Path]:
    return (
        {child for child in folder.iterdir() if child.name.isdigit()} if folder.is_dir() else set()
    )


def whole(folder: pathlib.Path) -> set[pathlib.Path]:
    """The checkpoints below `folder` with all their items, each with the file that Orbax writes
    last."""
    files = ["_CHECKPOINT_METADATA", "config/metadata"]
    files += [
        f"{item}/{file}"
        for item in ("model", "optimizer")
        for file in ("_METADATA", "manifest.ocdbt")
    ]
    return {child for child in _numbered(folder) if all((child / file).is_file() for file in files)}


def is_workdir(directory) -> bool:
    """Whether the directory is a training run's with at least one whole checkpoint."""
    return bool(whole(pathlib.Path(directory) / "checkpoints"))


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

    The arrays may be donated when this returns.

    InputError when this checkpoint or the one before it cannot be written.
    """
    import orbax.checkpoint as ocp

    model = {"params": state["params"], "frozen": frozen}
    if "ema" in state:
        model["ema"] = state["ema"]
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE), model)
    with _writing(manager):
        manager.save(
            int(state["step"]),
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model, save_args=pieces),
                optimizer=ocp.args.StandardSave({name: state[name] for name in OPTIMIZER}),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
                notes=ocp.args.JsonSave(notes),
            ),
            force=True,
        )


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
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
        )

    model = {"params": abstract(state["params"]), "frozen": abstract(frozen)}
    if "ema" in state:
        model["ema"] = abstract(state["ema"])
    optimizer = abstract({name: state[name] for name in OPTIMIZER})
    args = ocp.args.Composite(
        model=ocp.args.StandardRestore(model),
        optimizer=ocp.args.StandardRestore(optimizer),
        notes=ocp.args.JsonRestore(),
    )
    step = manager.latest_step()
    try:
        saved = manager.restore(step, args=args)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"The checkpoint {manager.directory / str(step)} cannot be read: "
            f"{str(error).strip().splitlines()[0][:300]} "
            "Move it away, and the run goes on from the one before."
        ) from error
    model = dict(saved["model"])
    frozen = model.pop("frozen")
    return {**model, **saved["optimizer"]}, frozen, saved["notes"]


@dataclasses.dataclass(frozen=True)
class RunLeaf:
    """An array of a run's checkpoint, unread, under `keys` in its tree."""

    folder: pathlib.Path
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def layers(self, stacked: bool) -> Iterator[np.ndarray]:
        """The array, or its layers along the first axis; the array is whole in memory meanwhile."""
        item, wanted = 0, self.keys
        for key in reversed(wanted):
            item = {key: item}
        array = _read(self.folder, item)
        for key in wanted:
            array = array[key]
        yield from array if stacked else (array,)


def _read(folder: pathlib.Path, item: dict) -> dict:
    """The arrays at the leaves of `item`, on the host; InputError when they cannot be read."""
    import orbax.checkpoint as ocp

    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(
                folder,
                args=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True),
            )
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"The checkpoint {folder} cannot be read: {str(error).splitlines()[0]}"
        ) from error


def _newest(workdir) -> tuple[pathlib.Path, dict]:
    """(folder, config as nested dicts) of a run's newest checkpoint; InputError when there is no
    whole one or it cannot be read."""
    folders = whole(pathlib.Path(workdir).absolute() / "checkpoints")
    if not folders:
        raise InputError(f"{workdir} holds no training checkpoint.")
    folder = max(folders, key=lambda folder: int(folder.name))
    try:
        return folder, json.loads((folder / "config" / "metadata").read_text())
    except (ValueError, OSError) as error:
        raise InputError(
            f"The checkpoint {folder} cannot be read: {str(error).splitlines()[0]}"
        ) from error


def config_of_run(workdir) -> dict:
    """The config of a run, as its newest checkpoint has it, as nested dicts. Touches no device."""
    return _newest(workdir)[1]


def open_run(workdir) -> tuple[dict, dict[str, RunLeaf], int]:
    """(config as nested dicts, arrays by "part/.../leaf", step) of a run's newest checkpoint; of
    the average of the weights where one was kept. Nothing is read yet. Raises InputError when there
    is no whole checkpoint or it cannot be read."""
    import orbax.checkpoint as ocp

    newest, config = _newest(workdir)
    folder, step = newest / "model", int(newest.name)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(folder).item_metadata.tree
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"The checkpoint {folder} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    leaves = {}
    for group in ("frozen", "ema" if "ema" in tree else "params"):
        for keys, leaf in flatten_dict(tree.get(group, {})).items():
            leaves["/".join(keys)] = RunLeaf(
                folder, (group, *keys), tuple(leaf.shape), np.dtype(leaf.dtype)
            )
    return config, leaves, step


def load_run(workdir) -> tuple[dict, dict]:
    """(config as nested dicts, weights) of a run's newest checkpoint, on the host; as `open_run`
    otherwise."""
    config, leaves, _ = open_run(workdir)
    folder = next(iter(leaves.values())).folder
    saved = _read(folder, unflatten_dict({leaf.keys: 0 for leaf in leaves.values()}))
    return config, join(*saved.values())
