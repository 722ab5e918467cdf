"""How a run starts: config -> model -> parts from elsewhere or at random, on the mesh -> training
state -> newest checkpoint, if any."""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from flax.traverse_util import flatten_dict, unflatten_dict

from blip3o_jax import training_checkpoint
from blip3o_jax.convert.padding import fit_vocabulary
from blip3o_jax.errors import InputError
from blip3o_jax.kernels.platform import dtype_for
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.train import steps
from blip3o_jax.train.config import PARTS, TrainConfig

log = logging.getLogger(__name__)

NAMED = 0.9  # share of the word in the row of an image token that it names


def build_model(cfg: TrainConfig) -> Blip3o:
    """The run's modules; compute is bfloat16 on accelerators and float32 on CPU unless the config
    says otherwise."""
    return Blip3o(cfg.blip3o(), jnp.dtype(dtype_for(cfg.dtype)), cfg.remat)


def name_tokens(embedding, image_start: int, words):
    """embedding [V,D] whose image rows are mostly the rows of the words that name them, and a
    little of their own: words [codes] holds ids, -1 for a code without one. A text-aligned
    tokenizer's codes mean words; a transformer that knows so need not find it out."""
    rows = jax.lax.dynamic_slice_in_dim(embedding, image_start, len(words))
    named = jnp.where(
        (words < 0)[:, None],
        rows,
        NAMED * embedding[jnp.maximum(words, 0)] + (1 - NAMED**2) ** 0.5 * rows,
    )
    return jax.lax.dynamic_update_slice_in_dim(embedding, named, image_start, axis=0)


def check_init(cfg: TrainConfig) -> None:
    """InputError when `cfg.init` names a part that the stage does not have."""
    if unknown := sorted(set(cfg.init) - set(PARTS[cfg.stage])):
        raise InputError(
            f"init names {unknown[0]!r}, which stage {cfg.stage!r} does not use; its "
            f"parts: {', '.join(PARTS[cfg.stage])}."
        )


def encoder_params(cfg: TrainConfig, load_parts: Callable[[str, str], dict]) -> dict:
    """The run's `ta_tok` and `dc_ae` as it starts with them, float32 on the host: from `init`, or
    at random from the seed."""
    params = {}
    for part in ("ta_tok", "dc_ae"):
        if part in cfg.init:
            tree = load_parts(cfg.init[part], part)
        else:
            tree = Blip3o(cfg.blip3o()).init(jax.random.key(cfg.seed), (part,))[part]
        params[part] = jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    return params


def initial_params(cfg: TrainConfig, model: Blip3o, load_parts: Callable, mesh, words=None):
    """Params of the stage's parts on the mesh: those named in `cfg.init` from there, the others at
    random from the seed.

    `words` [codes] are given with `cfg.named_tokens`, for `name_tokens`.
    """
    check_init(cfg)
    fresh = tuple(part for part in PARTS[cfg.stage] if part not in cfg.init)

    def make(key):
        params = model.init(key, fresh)
        if cfg.named_tokens and "qwen3" in fresh:
            table = params["qwen3"]["embed_tokens"]
            table["embedding"] = name_tokens(
                table["embedding"], model.config.vocab.image_start_token_id, jnp.asarray(words)
            )
        return params

    key = jax.random.key(cfg.seed)
    params = jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key), mesh))(key)
    expected = model.abstract(tuple(cfg.init))
    for part, directory in cfg.init.items():
        loaded = flatten_dict(load_parts(directory, part), sep="/")
        rows = model.config.qwen3.vocab_rows
        loaded = unflatten_dict(
            {path: fit_vocabulary(f"{part}/{path}", leaf, rows) for path, leaf in loaded.items()},
            sep="/",
        )
        want, got = (
            jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (expected[part], loaded)
        )
        if want != got:
            raise InputError(
                f"init.{part}: the weights in {directory} have other shapes than this run's model."
            )
        placed = shardings({part: loaded}, mesh)[part]
        params[part] = jax.tree.map(
            lambda x, s: jax.device_put(np.asarray(x, np.float32), s), loaded, placed
        )
    return params


def begin(cfg: TrainConfig, model: Blip3o, mesh, manager, make_params: Callable):
    """(state, frozen, shardings of the state, what the checkpoint notes): of the newest whole
    checkpoint, if there is one, else of the params of all parts that `make_params()` gives, at step
    0 with nothing noted."""
    check_init(cfg)
    abstract = jax.eval_shape(
        lambda: steps.init_state(cfg, model.init(jax.random.key(0), PARTS[cfg.stage]))
    )
    placed = shardings(abstract, mesh)
    if manager.latest_step() is None:
        state, frozen = jax.jit(lambda params: steps.init_state(cfg, params), out_shardings=placed)(
            make_params()
        )
        return state, frozen, placed[0], {}
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )
    state, frozen, notes = training_checkpoint.restore(manager, *target)
    log.info("Resumed at step %d.", int(state["step"]))
    return state, frozen, placed[0], notes


def overview(state, frozen) -> str:
    """A line a part: parameters and bytes, trained and frozen."""
    lines = [f"{'part':24}{'trained':>16}{'frozen':>16}{'MB':>12}"]
    for part in sorted({*state["params"], *frozen}):
        trees = [jax.tree.leaves(tree.get(part, {})) for tree in (state["params"], frozen)]
        counts = [sum(x.size for x in leaves) for leaves in trees]
        size = sum(x.nbytes for leaves in trees for x in leaves) / 1e6
        lines.append(f"{part:24}{counts[0]:>16,}{counts[1]:>16,}{size:>12,.1f}")
    return "\n".join(lines)


def parameters(state, frozen) -> str:
    """One line per parameter: name, shape, dtype, size, sharding; trained first, then frozen."""
    tables = (
        parameter_overview.get_parameter_overview(tree, include_stats="sharding")
        for tree in (state["params"], frozen)
    )
    return "\n".join(
        f"{title}\n{table}" for title, table in zip(("Trained", "Frozen"), tables, strict=True)
    )
