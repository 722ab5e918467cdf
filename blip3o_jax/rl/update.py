"""One step of reinforcement on the device: the updates that a rollout gives each half of the model
(docs/model.md §7.1, §7.5).

The arrays of a batch stand under the halves that the step trains. A half is updated by its own
gradients, moments and guard; what belongs to the other one stays as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.parallel.activations import interleaved, row_shards
from blip3o_jax.rl import diffusion, grpo
from blip3o_jax.rl.logprobs import image_logprobs
from blip3o_jax.sample import condition, flow
from blip3o_jax.train import optimizer
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.steps import advance, group_state, with_group

SHARED = ("learning_rate", "skipped", "skipped_in_a_row")  # metrics of a step, whatever it trains

fixed = jax.lax.stop_gradient


def update(
    model: Blip3o, cfg: TrainConfig, state: dict, frozen: dict, reference: dict, batch: dict
) -> tuple[dict, dict]:
    """(state, batch) -> (state, metrics), after `num_iterations` updates of each half in the batch;
    those of the diffusion part are called diffusion/NAME.

    `reference` holds the trained parts as the run began with them, Qwen3 unless beta is 0.
    """
    new, metrics = state, {}
    if arrays := batch.get("transformer"):
        own = group_state(cfg, state, "transformer")
        own, metrics = update_transformer(model, cfg, own, reference, arrays)
        new = with_group(cfg, new, "transformer", own)
    if arrays := batch.get("diffusion"):
        own = group_state(cfg, state, "diffusion")
        key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
        policies = frozen | reference, state.get("old")
        own, others = update_diffusion(model, cfg, own, frozen, policies, arrays, key)
        new = with_group(cfg, new, "diffusion", own)
        if "old" in state:
            new = new | {"old": _moved(cfg, state, own["params"])}
        counted = {name: others.pop(name) for name in SHARED}
        if metrics:
            counted["skipped"] += metrics["skipped"]
            worse = jnp.maximum(counted["skipped_in_a_row"], metrics["skipped_in_a_row"])
            counted["skipped_in_a_row"] = worse
        norms = {name: others.pop(name) for name in list(others) if "grad_norm" in name}
        named = {f"diffusion/{name}": value for name, value in others.items()}
        metrics = metrics | named | norms | counted
    return new | {"step": state["step"] + 1}, metrics


def unchanged(cfg: TrainConfig, state: dict) -> tuple[dict, dict]:
    """As `update`, for a batch that teaches nothing: only the step is counted."""
    metrics = {"skipped": 0, "skipped_in_a_row": 0}
    for half in cfg.grpo.halves_at(int(state["step"]) + 1):
        own = group_state(cfg, state, half)
        rates = optimizer.schedule(cfg.optimizer, cfg.updates_of(half))
        metrics["learning_rate"] = rates(own["opt_state"].count)
        metrics["skipped"] += own["guard"]["skipped"]
        in_a_row = own["guard"]["in_a_row"]
        metrics["skipped_in_a_row"] = jnp.maximum(metrics["skipped_in_a_row"], in_a_row)
    return state | {"step": state["step"] + 1}, metrics


def _moved(cfg: TrainConfig, state: dict, params: dict) -> dict:
    """The average of past policies after this step."""
    decay = diffusion.old_decay(cfg.grpo.diffusion, state["step"])
    return jax.tree.map(lambda old, new: new + decay * (old - new), state["old"], params)


def update_transformer(
    model: Blip3o, cfg: TrainConfig, state: dict, reference: dict, batch: dict
) -> tuple[dict, dict]:
    """`batch`: tokens [B,T], start, advantages and mask [B], and the rollout's own logprobs [B,n].

    The policy that drew the tokens is that of the first update's own forward pass, so that its
    ratio is 1 with a gradient. The metric `logprob_gap` compares that pass with decoding.
    """
    # Pieces of the batch, each with its share of the losses' sums, which are those of all rows.
    section = cfg.grpo
    whole = jnp.broadcast_to(batch["mask"][:, None], batch["logprobs"].shape)
    pieces = _learning_first(batch | {"mask": whole}, batch["mask"], cfg.accumulate)
    pieces = interleaved(pieces, cfg.accumulate)

    def probabilities(params: dict, piece: dict) -> tuple[jax.Array, jax.Array]:
        rows = piece["tokens"], piece["start"], section.temperature, section.full_vocabulary
        return image_logprobs(model, params["qwen3"], *rows)

    if section.beta:
        first = _if_learning(lambda piece: probabilities(reference, piece)[0])
        pieces["first"] = jax.lax.map(first, pieces)

    def one(carry: tuple, iteration: jax.Array) -> tuple[tuple, dict]:
        state, old = carry

        def loss(params: dict, piece: dict) -> tuple[jax.Array, tuple]:
            logprobs, entropies = probabilities(params, piece)
            before = jnp.where(iteration == 0, fixed(logprobs), piece["old"])
            inputs = logprobs, before, piece.get("first"), piece["advantages"], piece["mask"]
            value, metrics = grpo.policy_loss(section, *inputs, entropies, whole)
            return value, (metrics, before)

        gradients, (metrics, old) = _summed(loss, state["params"], pieces | {"old": old})
        new, metrics = advance(cfg, state, gradients, _total(metrics), "transformer")
        return (state | new, old), metrics

    (new, old), metrics = _iterated(section.num_iterations, one, (state, pieces["logprobs"]))
    if not section.full_vocabulary:
        # Decoding gives them among the image tokens.
        gaps = jnp.abs(old - pieces["logprobs"])
        metrics["logprob_gap"] = jnp.max(gaps, initial=0.0, where=pieces["mask"] > 0)
    return new, metrics


def update_diffusion(
    model: Blip3o,
    cfg: TrainConfig,
    state: dict,
    frozen: dict,
    policies: tuple[Params, dict | None],
    batch: dict,
    key: jax.Array,
) -> tuple[dict, dict]:
    """`batch`: hidden [B,n+1,D] of the drawn tokens, which stay as they are, advantages and mask
    [B], what the method draws ("x0" or "path"), and "sources" where there are any. `policies` are
    the first one and the average of past ones, if the method has it.

    A policy that drew the images itself is that of the first update's own forward pass.
    """
    section, lagged = cfg.grpo.diffusion, policies[1] is not None
    schedule = flow.sigmas(cfg.grpo.num_inference_steps)
    points = diffusion.METHODS[section.method].points(section, batch, schedule, key)
    # All draws are those of the whole batch, so that they do not depend on the pieces.
    levels, count = len(points["sigma"]), jnp.maximum(jnp.sum(batch["mask"]), 1.0)
    # One level of some of the rows after the other; the rows' own arrays are those of all levels.
    names = ("hidden", "sources", "advantages", "mask")
    rows = {name: batch[name] for name in names if name in batch}
    if row_shards() == 1:  # states are too large to change devices
        order = batch["mask"], cfg.accumulate
        rows, points = _learning_first(rows, *order), _learning_first(points, *order, axis=1)
    rows = interleaved(rows, cfg.accumulate)
    split = jax.vmap(functools.partial(interleaved, count=cfg.accumulate))
    pieces = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), split(points))
    pieces = {"point": pieces, "rows": jnp.arange(levels * cfg.accumulate) % cfg.accumulate}
    pieces["mask"] = rows["mask"][pieces["rows"]]

    def velocity(params: dict, piece: dict) -> jax.Array:
        params, point, own = frozen | params, piece["point"], _at(rows, piece["rows"])
        t = flow.NUM_TRAIN_TIMESTEPS * point["sigma"]
        whole = condition.build(model, params, own["hidden"], own.get("sources"))
        return condition.velocity(model, params, point["x"], t, whole).astype(jnp.float32)

    def fixed_policy(params: dict) -> jax.Array:
        """Velocities of all pieces, one after the other."""
        return jax.lax.map(_if_learning(functools.partial(velocity, params)), pieces)

    pieces["first"] = fixed_policy(policies[0])
    drew = fixed_policy(policies[1]) if lagged else jnp.zeros_like(pieces["first"])

    def one(carry: tuple, iteration: jax.Array) -> tuple[tuple, dict]:
        state, drew = carry

        def loss(params: dict, piece: dict) -> tuple[jax.Array, tuple]:
            present, own = velocity(params, piece), _at(rows, piece["rows"])
            before = piece["drew"]
            if not lagged:
                before = jnp.where(iteration == 0, fixed(present), before)
            inputs = present, before, piece["first"], piece["point"], own["advantages"], own["mask"]
            value, metrics = diffusion.loss(section, *inputs, levels * count)
            return value, (metrics, before)

        gradients, (metrics, drew) = _summed(loss, state["params"], pieces | {"drew": drew})
        new, metrics = advance(cfg, state, gradients, _total(metrics), "diffusion")
        return (state | new, drew), metrics

    (new, _), metrics = _iterated(cfg.grpo.num_iterations, one, (state, drew))
    return new, metrics


def _learning_first(tree: Any, mask: jax.Array, count: int, axis: int = 0) -> Any:
    """Arrays with their rows, along an axis, in an order in which `interleaved` fills its `count`
    pieces one after the other, first with the rows where the mask [B] is not 0."""
    if count == 1:
        return tree
    order = jnp.argsort(mask == 0, stable=True).reshape(count, -1).T.ravel()
    return jax.tree.map(lambda x: jnp.take(x, order, axis), tree)


def _if_learning(function: Callable) -> Callable:
    """function(piece), or zeros where the piece's mask is 0 throughout, at no cost."""

    def guarded(piece: dict) -> Any:
        like = jax.eval_shape(function, piece)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return jax.lax.cond(jnp.any(piece["mask"]), function, lambda _: nothing, piece)

    return guarded


def _summed(loss: Callable, params: dict, pieces: dict) -> tuple[dict, Any]:
    """(Gradients of the sum of the losses of pieces [N,...], what comes beside each), one piece in
    memory at a time; zeros for those that teach nothing."""
    gradient = jax.grad(loss, has_aux=True)
    # Of one piece there is no sum, for which there would be a second copy of the gradient.
    if len(jax.tree.leaves(pieces)[0]) == 1:
        total, beside = gradient(params, _at(pieces, 0))
        return total, jax.tree.map(lambda x: x[None], beside)

    def add(total: dict, piece: dict) -> tuple[dict, Any]:
        own, beside = _if_learning(functools.partial(gradient, params))(piece)
        return jax.tree.map(jnp.add, total, own), beside

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), pieces)


def _total(metrics: dict) -> dict:
    """Of pieces, each with its share of the whole."""
    return jax.tree.map(functools.partial(jnp.sum, axis=0), metrics)


def _at(tree: Any, i: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _iterated(count: int, one: Callable, carry: tuple) -> tuple[tuple, dict]:
    """`one(carry, iteration) -> (carry, metrics)`, `count` times: the last counters, and the means
    of the other metrics."""
    if count == 1:
        return one(carry, jnp.int32(0))
    carry, every = jax.lax.scan(one, carry, jnp.arange(count))
    return carry, {
        name: x[-1] if jnp.issubdtype(x.dtype, jnp.integer) else jnp.mean(x)
        for name, x in every.items()
    }


def reference_parts(cfg: TrainConfig, state: dict) -> tuple[str, ...]:
    """The parts whose first weights the update reads."""
    return tuple(part for part in state["params"] if part != "qwen3" or cfg.grpo.beta)


def compile_update(model: Blip3o, cfg: TrainConfig, state_shardings: dict | None) -> Callable:
    """The jitted update: the state is donated and comes back where it was."""
    step = functools.partial(update, model, cfg)
    return jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
