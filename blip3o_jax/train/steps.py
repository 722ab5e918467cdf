"""The training state and one step of it; pure."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from blip3o_jax.kernels.platform import jit
from blip3o_jax.kernels.products import materialized
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.activations import interleaved
from blip3o_jax.train import guard, losses, optimizer
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.optimizer import norm
from blip3o_jax.train.sections import HALVES
from blip3o_jax.tree import join, split

WEIGHTS = ("params", "ema")  # of a state


def init_state(cfg: TrainConfig, params: dict) -> tuple[dict, dict]:
    """Parameters of all parts of the stage -> (state, frozen).

    The state holds the trained leaves, their average, Adam's moments, the guard's counters and the
    number of steps; moments and counters of each of `cfg.groups`, if there are any; and the "old"
    policy that draws images while the diffusion part is reinforced.
    """
    params, frozen = split(params, cfg.trainable)
    groups = {name: parts_in(params, parts) for name, parts in cfg.groups.items()}
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": {name: optimizer.init(own) for name, own in groups.items()}
        or optimizer.init(params),
        "guard": {name: guard.init() for name in groups} or guard.init(),
    }
    if cfg.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if cfg.grpo and cfg.grpo.diffusion and cfg.grpo.diffusion.lagged:
        state["old"] = jax.tree.map(jnp.copy, parts_in(params, HALVES["diffusion"]))
    return state, frozen


def parts_in(tree: dict, parts: tuple[str, ...]) -> dict:
    """Those of the parts that the tree has."""
    return {part: tree[part] for part in parts if part in tree}


def group_state(cfg: TrainConfig, state: dict, group: str) -> dict:
    """The state of one of `cfg.groups` as a run of it alone would have it; where there are no
    groups, the state itself."""
    if not cfg.groups:
        return state
    weights = {name: parts_in(state[name], cfg.groups[group]) for name in WEIGHTS if name in state}
    return state | weights | {name: state[name][group] for name in ("opt_state", "guard")}


def with_group(cfg: TrainConfig, state: dict, group: str, own: dict) -> dict:
    """The state with a group's new one; what belongs to the others stays as it is."""
    if not cfg.groups:
        return state | own
    weights = {name: state[name] | own[name] for name in WEIGHTS if name in state}
    apart = {name: state[name] | {group: own[name]} for name in ("opt_state", "guard")}
    return state | weights | apart


def weights(state: dict, frozen: dict) -> dict:
    """The parameters to use and to keep: the average where there is one, and the frozen rest."""
    return join(frozen, state.get("ema", state["params"]))


def gradients(
    model: Blip3o,
    cfg: TrainConfig,
    params: dict,
    frozen: dict,
    batch: losses.Batch,
    key: jax.Array,
    shardings: dict | None = None,
) -> tuple[dict, dict]:
    """(gradients of `params`, metrics) of the stage's loss over the batch.

    With `cfg.accumulate` micro-batches their mean is that of the whole batch; `shardings` of the
    parameters keep the sum of gradients where the parameters are.
    """

    def loss(params: dict, batch: losses.Batch, key: jax.Array) -> losses.LossAndMetrics:
        return cfg.record.loss(model, cfg.section, join(frozen, params), batch, key)

    gradient = jax.grad(loss, has_aux=True)
    if cfg.accumulate == 1:
        return gradient(params, batch, key)

    def pinned(tree: dict) -> dict:
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)

    def micro_step(total: dict, micro: tuple) -> tuple[dict, dict]:
        grads, metrics = gradient(params, *micro)
        return pinned(jax.tree.map(jnp.add, total, grads)), metrics

    # Drawn for the whole batch, so that it does not depend on the micro-batches; what the batch
    # brings itself is kept.
    whole = cfg.record.draws(model, cfg.section, batch, key) | batch
    micro = interleaved(whole, cfg.accumulate)
    zeros = pinned(jax.tree.map(jnp.zeros_like, params))
    total, metrics = jax.lax.scan(micro_step, zeros, (micro, jax.random.split(key, cfg.accumulate)))
    return jax.tree.map(lambda x: x / cfg.accumulate, total), jax.tree.map(jnp.mean, metrics)


def advance(
    cfg: TrainConfig, state: dict, grads: dict, metrics: dict, group: str = ""
) -> tuple[dict, dict]:
    """(state, gradients, metrics of the loss) -> (state, metrics): clipped AdamW update and
    average, unless the guard forbids them. The state may be that of a group."""
    before, num_updates = state["opt_state"], cfg.updates_of(group)
    norms = {part: norm(tree) for part, tree in grads.items()}
    total = norm(norms)
    attempts = before.count + state["guard"]["skipped"]
    good, counters = guard.judge(cfg.guard, state["guard"], attempts, metrics["loss"], total)

    # Moments and parameters are materialized before they are read: else they would be computed
    # from what they replace, and that copied.
    moments = optimizer.moments(cfg.optimizer, grads, total, before)
    after = materialized(guard.keep(good, moments, before))
    updates = optimizer.updates(cfg.optimizer, num_updates, after, state["params"])
    params = optax.apply_updates(state["params"], updates)
    params = materialized(guard.keep(good, params, state["params"]))

    new = {"step": state["step"] + 1, "params": params, "opt_state": after, "guard": counters}
    if "ema" in state:
        ema = optimizer.update_ema(state["ema"], params, before.count, cfg.optimizer.ema_decay)
        new["ema"] = guard.keep(good, ema, state["ema"])
    return new, metrics | {
        "learning_rate": optimizer.schedule(cfg.optimizer, num_updates)(before.count),
        "skipped": counters["skipped"],
        "skipped_in_a_row": counters["in_a_row"],
        **{f"grad_norm/{part}": value for part, value in norms.items()},
    }


def update_ratios(cfg: TrainConfig, state: dict) -> dict[str, jax.Array]:
    """|last update| / |parameters| of each trained part, the share of weight decay being that of
    the weights after the step."""
    ratios = {}
    for group in cfg.groups or [""]:
        own, count = group_state(cfg, state, group), cfg.updates_of(group)
        updates = optimizer.updates(cfg.optimizer, count, own["opt_state"], own["params"])
        for part, tree in updates.items():
            ratios[f"update_ratio/{part}"] = norm(tree) / norm(own["params"][part])
    return ratios


def train_step(
    model: Blip3o,
    cfg: TrainConfig,
    state: dict,
    frozen: dict,
    batch: losses.Batch,
    shardings: dict | None = None,
) -> tuple[dict, dict]:
    """(state, batch) -> (state, metrics).

    Randomness is a function of (seed, step); `shardings` are the state's, as in `compile_step`.
    """
    key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
    placed = shardings and shardings["params"]
    return advance(cfg, state, *gradients(model, cfg, state["params"], frozen, batch, key, placed))


def compile_step(model: Blip3o, cfg: TrainConfig, state_shardings: dict | None) -> Callable:
    """The jitted step: the state is donated and comes back where it was."""
    step = functools.partial(train_step, model, cfg, shardings=state_shardings)
    return jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
