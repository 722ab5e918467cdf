"""The training state and one step of it; pure."""

import functools

import jax
import jax.numpy as jnp
import optax

from blip3o_jax.compilation import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.sharding import join, split
from blip3o_jax.train import losses
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.optimizer import optimizer, update_ema

LOSSES = {
    "autoencoder": losses.autoencoder_loss,
    "tokenizer": losses.tokenizer_loss,
    "practice": losses.practice_loss,
    "joint": losses.joint_loss,
}
PARTS = {
    "autoencoder": ("dc_ae",),
    "tokenizer": ("ta_tok",),
    "practice": ("qwen3",),
    "joint": ("qwen3", "diffusion_connector", "sana", "ta_tok", "dc_ae"),
    "grpo": ("qwen3", "diffusion_connector", "sana", "ta_tok", "dc_ae"),
}


def init_state(cfg: TrainConfig, params):
    """Params of all parts of the stage -> (state, frozen). The state holds the trained leaves, their average and Adam's moments."""
    params, frozen = split(params, cfg.trainable)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer(cfg.optimizer, cfg.num_steps).init(params)}
    if cfg.optimizer.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state, frozen


def weights(state, frozen):
    """The params to use and to keep: the average where there is one, and the frozen rest."""
    return join(frozen, state.get("ema", state["params"]))


def train_step(model: Blip3o, cfg: TrainConfig, state, frozen, batch):
    """(state, batch) -> (state, metrics): loss, gradients, clipped AdamW update, average. Randomness is a function of (seed, step)."""
    key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])

    def loss(params):
        return LOSSES[cfg.stage](model, cfg, join(frozen, params), batch, key)

    grads, metrics = jax.grad(loss, has_aux=True)(state["params"])
    updates, opt_state = optimizer(cfg.optimizer, cfg.num_steps).update(grads, state["opt_state"], state["params"])
    new = {"step": state["step"] + 1, "params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
    if "ema" in state:
        new["ema"] = update_ema(state["ema"], new["params"], state["step"], cfg.optimizer.ema_decay)
    norms = {f"grad_norm/{part}": optax.tree.norm(tree) for part, tree in grads.items()}
    return new, {**metrics, **norms}


def compile_step(model: Blip3o, cfg: TrainConfig, state_shardings):
    """The jitted step: the state is donated and comes back where it was."""
    step = functools.partial(train_step, model, cfg)
    return jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
