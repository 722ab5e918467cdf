"""The training state and one step of it; pure."""

import functools

import jax
import jax.numpy as jnp
import optax

from blip3o_jax.kernels.platform import jit
from blip3o_jax.kernels.products import materialized
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.train import guard, losses, optimizer
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.optimizer import norm
from blip3o_jax.tree import join, split

LOSSES = {
    "autoencoder": losses.autoencoder_loss,
    "tokenizer": losses.tokenizer_loss,
    "practice": losses.practice_loss,
    "joint": losses.joint_loss,
}


def init_state(cfg: TrainConfig, params):
    """Params of all parts of the stage -> (state, frozen).

    The state holds the trained leaves, their average, Adam's moments, the guard's counters and the
    number of steps.
    """
    params, frozen = split(params, cfg.trainable)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(params),
    }
    state["guard"] = guard.init()
    if cfg.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state, frozen


def weights(state, frozen):
    """The params to use and to keep: the average where there is one, and the frozen rest."""
    return join(frozen, state.get("ema", state["params"]))


def gradients(model: Blip3o, cfg: TrainConfig, params, frozen, batch, key, shardings=None):
    """(gradients of `params`, metrics) of the stage's loss over the batch; in `cfg.accumulate`
    micro-batches, whose mean is that of the whole. `shardings` of params keep the sum of gradients
    where the parameters are."""

    def loss(params, batch, key):
        return LOSSES[cfg.stage](model, cfg, join(frozen, params), batch, key)

    gradient = jax.grad(loss, has_aux=True)
    if cfg.accumulate == 1:
        return gradient(params, batch, key)

    def pinned(tree):
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)

    def micro_step(total, micro):
        grads, metrics = gradient(params, *micro)
        return pinned(jax.tree.map(jnp.add, total, grads)), metrics

    micro = losses.interleaved(losses.whole_batch(model, cfg, batch, key), cfg.accumulate)
    zeros = pinned(jax.tree.map(jnp.zeros_like, params))
    total, metrics = jax.lax.scan(micro_step, zeros, (micro, jax.random.split(key, cfg.accumulate)))
    return jax.tree.map(lambda x: x / cfg.accumulate, total), jax.tree.map(jnp.mean, metrics)


def advance(cfg: TrainConfig, state, grads, metrics):
    """(state, gradients, metrics of the loss) -> (state, metrics): clipped AdamW update and
    average, unless the guard forbids them."""
    norms = {part: norm(tree) for part, tree in grads.items()}
    whole = norm(norms)
    good, counters = guard.judge(cfg.guard, state["guard"], state["step"], metrics["loss"], whole)
    taken = state["opt_state"].count
    # Moments and parameters are in memory before what reads them, which would else be computed from
    # what they replace, and that copied.
    after = materialized(
        guard.keep(
            good,
            optimizer.moments(cfg.optimizer, grads, whole, state["opt_state"]),
            state["opt_state"],
        )
    )
    params = optax.apply_updates(
        state["params"], optimizer.updates(cfg.optimizer, cfg.num_steps, after, state["params"])
    )
    params = materialized(guard.keep(good, params, state["params"]))
    new = {"step": state["step"] + 1, "params": params, "opt_state": after, "guard": counters}
    if "ema" in state:
        new["ema"] = guard.keep(
            good,
            optimizer.update_ema(state["ema"], params, taken, cfg.optimizer.ema_decay),
            state["ema"],
        )
    metrics = metrics | {
        "learning_rate": optimizer.schedule(cfg.optimizer, cfg.num_steps)(taken),
        "skipped": counters["skipped"],
        "skipped_in_a_row": counters["in_a_row"],
        **{f"grad_norm/{part}": value for part, value in norms.items()},
    }
    return new, metrics


def update_ratios(cfg: TrainConfig, state) -> dict[str, jax.Array]:
    """Of each trained part |last update| / |parameters|, the decay's share being that of the
    weights after the step."""
    made = optimizer.updates(cfg.optimizer, cfg.num_steps, state["opt_state"], state["params"])
    return {
        f"update_ratio/{part}": norm(tree) / norm(state["params"][part])
        for part, tree in made.items()
    }


def train_step(model: Blip3o, cfg: TrainConfig, state, frozen, batch, shardings=None):
    """(state, batch) -> (state, metrics).

    Randomness is a function of (seed, step); `shardings` are the state's, as in `compile_step`.
    """
    key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
    placed = shardings and shardings["params"]
    return advance(cfg, state, *gradients(model, cfg, state["params"], frozen, batch, key, placed))


def compile_step(model: Blip3o, cfg: TrainConfig, state_shardings):
    """The jitted step: the state is donated and comes back where it was."""
    step = functools.partial(train_step, model, cfg, shardings=state_shardings)
    return jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
