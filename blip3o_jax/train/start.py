"""How a run starts: config -> model -> parts from elsewhere or at random, on the mesh -> training
state -> newest checkpoint, if any."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from blip3o_jax import training_checkpoint
from blip3o_jax.convert.padding import fit_channels, fit_vocabulary
from blip3o_jax.errors import require
from blip3o_jax.kernels.platform import dtype_for
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.batches import check_batch
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.train import steps
from blip3o_jax.train.config import TrainConfig

log = logging.getLogger(__name__)

NAMED = 0.9  # share of the word in the row of an image token that it names

LoadPart = Callable[[str, str], dict]  # (checkpoint, part) -> its parameters


def check_batches(cfg: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """InputError unless the mesh divides a step's micro-batches, and the pieces of a rollout."""
    check_batch(cfg.batch_size, mesh, cfg.accumulate)
    if cfg.grpo:
        check_batch(cfg.batch_size, mesh, cfg.grpo.pieces, "pieces of a rollout")


def build_model(cfg: TrainConfig) -> Blip3o:
    """The run's modules, which compute in the config's dtype."""
    return Blip3o(cfg.blip3o(), jnp.dtype(dtype_for(cfg.dtype)), cfg.remat)


def name_tokens(embedding: jax.Array, image_start: int, words: jax.Array) -> jax.Array:
    """embedding [V,D] whose image rows are mostly the rows of the words that name them, and a
    little of their own; words [codes] holds ids, -1 for a code without one.

    A text-aligned tokenizer's codes mean words, so the transformer need not find that out.
    """
    rows = jax.lax.dynamic_slice_in_dim(embedding, image_start, len(words))
    mixed = NAMED * embedding[jnp.maximum(words, 0)] + (1 - NAMED**2) ** 0.5 * rows
    named = jnp.where((words < 0)[:, None], rows, mixed)
    return jax.lax.dynamic_update_slice_in_dim(embedding, named, image_start, axis=0)


def encoder_params(cfg: TrainConfig, load_part: LoadPart) -> dict:
    """The run's `ta_tok` and `dc_ae` as it starts with them, float32 on the host: from `init`, or
    at random from the seed."""
    params = {}
    for part in ("ta_tok", "dc_ae"):
        if part in cfg.init:
            tree = load_part(cfg.init[part], part)
        else:
            tree = Blip3o(cfg.blip3o()).init(jax.random.key(cfg.seed), (part,))[part]
        params[part] = jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    return params


def initial_params(
    cfg: TrainConfig,
    model: Blip3o,
    load_part: LoadPart | None,
    mesh: Mesh,
    parts: tuple[str, ...] | None = None,
    words: np.ndarray | None = None,
) -> dict:
    """Parameters of `parts`, or of all of the stage, on the mesh: those in `cfg.init` from there,
    the others at random from the seed.

    `words` [codes]: what image tokens start as (`name_tokens`).
    """
    parts = parts or cfg.parts
    fresh = tuple(part for part in parts if part not in cfg.init)

    def make(key: jax.Array) -> dict:
        params = model.init(key, fresh)
        if words is not None and "qwen3" in fresh:
            table = params["qwen3"]["embed_tokens"]
            start = model.config.vocab.image_start_token_id
            table["embedding"] = name_tokens(table["embedding"], start, jnp.asarray(words))
        return params

    key = jax.random.key(cfg.seed)
    params = jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key), mesh))(key)

    # The other parts, leaf by leaf, with the rows that the mesh adds to the vocabulary and with or
    # without the channels that a reference adds to the latents.
    loaded_parts = tuple(part for part in parts if part in cfg.init)
    expected = model.abstract(loaded_parts)
    for part in loaded_parts:
        directory = cfg.init[part]
        leaves = flatten_dict(load_part(directory, part), sep="/")
        rows, channels = model.config.qwen3.vocab_rows, model.config.sana.in_channels
        leaves = {path: fit_vocabulary(f"{part}/{path}", x, rows) for path, x in leaves.items()}
        if part == "sana":
            leaves = fit_source(cfg, channels, leaves)
            leaves = fit_spans(cfg, model, key, leaves)
        shapes = {path: x.shape for path, x in flatten_dict(expected[part], sep="/").items()}
        require(
            shapes == {path: x.shape for path, x in leaves.items()},
            f"init.{part}: the weights in {directory} have other shapes than this run's model.",
        )
        tree = unflatten_dict(leaves, sep="/")
        params[part] = jax.tree.map(
            lambda x, place: jax.device_put(np.asarray(x, np.float32), place),
            tree,
            shardings({part: tree}, mesh)[part],
        )
    return params


def fit_source(cfg: TrainConfig, channels: int, leaves: dict[str, jax.Array]) -> dict:
    """SANA's leaves for a model of so many input channels: those of a source among them change
    nothing at first, and are left out where the model has none."""
    kernel = leaves["patch_embed/kernel"]
    fitted = fit_channels(kernel, channels)
    if len(fitted) < len(kernel):
        what = "sees a source among its channels, which this run's model does not"
        log.warning("init.sana: %s %s.", cfg.init["sana"], what)
    return leaves | {"patch_embed/kernel": fitted}


def fit_spans(
    cfg: TrainConfig, model: Blip3o, key: jax.Array, leaves: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """SANA's leaves for a model with or without spans: fresh ones add nothing at first, and without
    them SANA gives the velocity at a noise level."""
    if model.config.sana.few_steps:
        make = jax.jit(lambda key: model.init(key, ("sana",))["sana"]["span_embed"])
        return flatten_dict({"span_embed": make(key)}, sep="/") | leaves
    plain = {path: x for path, x in leaves.items() if not path.startswith("span_embed/")}
    if len(plain) < len(leaves):
        # One that is frozen needs not lose what it has learned.
        keep = (
            "" if "sana" in cfg.trained_parts else "; --config.model.sana.few_steps=4 keeps it so"
        )
        sentence = "init.sana: %s is of few steps, which this run's checkpoints are not%s."
        log.warning(sentence, cfg.init["sana"], keep)
    return plain


def begin(
    cfg: TrainConfig, model: Blip3o, mesh: Mesh, manager: Any, make_params: Callable[[], dict]
) -> tuple[dict, dict, dict, dict]:
    """(state, frozen, shardings of the state, notes) of the newest whole checkpoint, if there is
    one, else of the parameters that `make_params()` gives, at step 0 without notes."""
    abstract = jax.eval_shape(
        lambda: steps.init_state(cfg, model.init(jax.random.key(0), cfg.parts))
    )
    placed = shardings(abstract, mesh)
    if manager.latest_step() is None:
        new_state = jax.jit(lambda params: steps.init_state(cfg, params), out_shardings=placed)
        state, frozen = new_state(make_params())
        return state, frozen, placed[0], {}
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )
    state, frozen, notes = training_checkpoint.restore(manager, *target)
    log.info("Resumed at step %d.", int(state["step"]))
    return state, frozen, placed[0], notes


def overview(state: dict, frozen: dict) -> str:
    """A line for each part: parameters and bytes, trained and frozen."""
    lines = [f"{'part':24}{'trained':>16}{'frozen':>16}{'MB':>12}"]
    for part in sorted({*state["params"], *frozen}):
        trees = [jax.tree.leaves(tree.get(part, {})) for tree in (state["params"], frozen)]
        counts = [sum(x.size for x in leaves) for leaves in trees]
        size = sum(x.nbytes for leaves in trees for x in leaves) / 1e6
        lines.append(f"{part:24}{counts[0]:>16,}{counts[1]:>16,}{size:>12,.1f}")
    return "\n".join(lines)


def parameters(state: dict, frozen: dict) -> str:
    """A line for each parameter: name, shape, dtype, size, sharding; trained first, then frozen."""
    table = functools.partial(parameter_overview.get_parameter_overview, include_stats="sharding")
    return f"Trained\n{table(state['params'])}\nFrozen\n{table(frozen)}"
