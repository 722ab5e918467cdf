"""The training state and one step of it; pure."""

import functools

import jax
import jax.numpy as jnp
import optax

from blip3o_jax.compilation import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.sharding import join, split
from blip3o_jax.train import guard, losses
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.optimizer import norm, optimizer, schedule, update_ema

LOSSES = {
    "autoencoder": losses.autoencoder_loss,
    "tokenizer": losses.tokenizer_loss,
    "practice": losses.practice_loss,
    "joint": losses.joint_loss,
}


def init_state(cfg: TrainConfig, params):
    """Params of all parts of the stage -> (state, frozen). The state holds the trained leaves, their average, Adam's moments, the guard's
    counters and the number of steps."""
    params, frozen = split(params, cfg.trainable)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer(cfg.optimizer, cfg.num_steps).init(params)}
    state["guard"] = guard.init()
    if cfg.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state, frozen


def weights(state, frozen):
    """The params to use and to keep: the average where there is one, and the frozen rest."""
    return join(frozen, state.get("ema", state["params"]))


def gradients(model: Blip3o, cfg: TrainConfig, params, frozen, batch, key, shardings=None):
    """(gradients of `params`, metrics) of the stage's loss over the batch; in `cfg.accumulate` micro-batches, whose mean is that of the
    whole. `shardings` of params keep the sum of gradients where the parameters are."""

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
    """(state, gradients, metrics of the loss) -> (state, metrics): clipped AdamW update and average, unless the guard forbids them."""
    norms = {part: norm(tree) for part, tree in grads.items()}
    whole = norm(norms)
    good, counters = guard.judge(cfg.guard, state["guard"], state["step"], metrics["loss"], whole)
    params, taken = state["params"], state["step"] - state["guard"]["skipped"]
    updates, opt_state = optimizer(cfg.optimizer, cfg.num_steps).update(grads, state["opt_state"], params)
    new = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
    if "ema" in state:
        new["ema"] = update_ema(state["ema"], new["params"], taken, cfg.optimizer.ema_decay)
    new = guard.keep(good, new, {name: state[name] for name in new})
    metrics = metrics | {
        "learning_rate": schedule(cfg.optimizer, cfg.num_steps)(taken),
        "skipped": counters["skipped"],
        "skipped_in_a_row": counters["in_a_row"],
        **{f"grad_norm/{part}": value for part, value in norms.items()},
        **{f"update_ratio/{part}": norm(tree) / norm(params[part]) for part, tree in updates.items()},
    }
    return new | {"step": state["step"] + 1, "guard": counters}, metrics


def train_step(model: Blip3o, cfg: TrainConfig, state, frozen, batch, shardings=None):
    """(state, batch) -> (state, metrics). Randomness is a function of (seed, step); `shardings` are the state's, as in `compile_step`."""
    key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
    placed = shardings and shardings["params"]
    return advance(cfg, state, *gradients(model, cfg, state["params"], frozen, batch, key, placed))


def compile_step(model: Blip3o, cfg: TrainConfig, state_shardings):
    """The jitted step: the state is donated and comes back where it was."""
    step = functools.partial(train_step, model, cfg, shardings=state_shardings)
    return jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
