"""Training checkpoints by Orbax: WORKDIR/checkpoints/STEP/{model,optimizer,config}, asynchronous, atomic, the newest N kept.

`model` is {"params", "frozen"[, "ema"]} and can be read alone; `optimizer` is {"step", "opt_state"}; `config` the run's config as JSON.
The data position is the step itself.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from blip3o_jax.config import ConfigError
from blip3o_jax.sharding import join

PIECE = 64 << 20  # bytes of an array that are one file's piece; whoever reads the array holds it once and a piece, not twice


def open_manager(workdir, keep: int = 1, create: bool = True):
    """Orbax's manager of a workdir's checkpoints."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
    return ocp.CheckpointManager(pathlib.Path(workdir).absolute() / "checkpoints", options=options)


def is_workdir(directory) -> bool:
    """Whether the directory is a training run's with at least one whole checkpoint."""
    folder = pathlib.Path(directory) / "checkpoints"
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def save(manager, config, state, frozen) -> None:
    """Saves in the background under the state's step."""
    import orbax.checkpoint as ocp

    model = {"params": state["params"], "frozen": frozen}
    if "ema" in state:
        model["ema"] = state["ema"]
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE), model)
    manager.save(
        int(state["step"]),
        args=ocp.args.Composite(
            model=ocp.args.StandardSave(model, save_args=pieces),
            optimizer=ocp.args.StandardSave({"step": state["step"], "opt_state": state["opt_state"]}),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
        ),
    )


def restore(manager, state, frozen):
    """The newest checkpoint onto the placement of (state, frozen), which may be arrays or abstract ones with shardings."""
    import orbax.checkpoint as ocp

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

    model = {"params": abstract(state["params"]), "frozen": abstract(frozen)}
    if "ema" in state:
        model["ema"] = abstract(state["ema"])
    optimizer = abstract({"step": state["step"], "opt_state": state["opt_state"]})
    args = ocp.args.Composite(model=ocp.args.StandardRestore(model), optimizer=ocp.args.StandardRestore(optimizer))
    saved = manager.restore(manager.latest_step(), args=args)
    model = saved["model"]
    frozen = model.pop("frozen")
    return {**model, **saved["optimizer"]}, frozen


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
    """The arrays at the leaves of `item`, on the host; ConfigError when they cannot be read."""
    import orbax.checkpoint as ocp

    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(folder, args=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True))
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"The checkpoint {folder} cannot be read: {str(error).splitlines()[0]}") from error


def open_run(workdir) -> tuple[dict, dict[str, RunLeaf], int]:
    """(config as nested dicts, arrays by "part/.../leaf", step) of a run's newest checkpoint; of the average of the weights where one
    was kept. Nothing is read yet. Raises ConfigError when there is no whole checkpoint or it cannot be read."""
    import orbax.checkpoint as ocp

    if not is_workdir(workdir):
        raise ConfigError(f"{workdir} holds no training checkpoint.")
    manager = open_manager(workdir, create=False)
    step = manager.latest_step()
    folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "model"
    try:
        config = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(folder).item_metadata.tree
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"The checkpoint {folder} cannot be read: {str(error).splitlines()[0]}") from error
    leaves = {}
    for group in ("frozen", "ema" if "ema" in tree else "params"):
        for keys, leaf in flatten_dict(tree.get(group, {})).items():
            leaves["/".join(keys)] = RunLeaf(folder, (group, *keys), tuple(leaf.shape), np.dtype(leaf.dtype))
    return config, leaves, step


def load_run(workdir) -> tuple[dict, dict]:
    """(config as nested dicts, weights) of a run's newest checkpoint, on the host; as `open_run` otherwise."""
    config, leaves, _ = open_run(workdir)
    folder = next(iter(leaves.values())).folder
    saved = _read(folder, unflatten_dict({leaf.keys: 0 for leaf in leaves.values()}))
    return config, join(*saved.values())
