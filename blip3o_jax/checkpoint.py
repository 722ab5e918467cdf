"""Training checkpoints by Orbax: WORKDIR/checkpoints/STEP/{model,optimizer,config}, asynchronous, atomic, the newest N kept.

`model` is {"params", "frozen"[, "ema"]} and can be read alone; `optimizer` is {"step", "opt_state"}; `config` the run's config as JSON.
The data position is the step itself.
"""

import dataclasses
import pathlib

import jax

from blip3o_jax.config import ConfigError
from blip3o_jax.sharding import join


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
    manager.save(
        int(state["step"]),
        args=ocp.args.Composite(
            model=ocp.args.StandardSave(model),
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


def load_run(workdir) -> tuple[dict, dict]:
    """(config as nested dicts, weights) of a run's newest checkpoint, on the host; the average of the weights where one was kept.

    Raises ConfigError when there is no whole checkpoint or it cannot be read.
    """
    import numpy as np
    import orbax.checkpoint as ocp

    if not is_workdir(workdir):
        raise ConfigError(f"{workdir} holds no training checkpoint.")
    manager = open_manager(workdir, create=False)
    step = manager.latest_step()
    folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step)
    try:
        config = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(folder / "model").item_metadata.tree
            wanted = {"frozen": tree.get("frozen", {}), "params": tree.get("ema", tree["params"])}
            if "ema" in tree:
                wanted["ema"] = wanted.pop("params")
            item = jax.tree.map(lambda _: 0, wanted)
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            saved = reader.restore(folder / "model", args=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True))
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"The checkpoint {folder} cannot be read: {str(error).splitlines()[0]}") from error
    return config, join(*saved.values())
