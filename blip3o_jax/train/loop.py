"""The loop around the step: the only part of training that touches clock, disk and devices.

Set-up order: config -> mesh -> abstract state -> its shardings -> parts from elsewhere or at random -> newest checkpoint of this
workdir, if any -> steps.
"""

import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from blip3o_jax import checkpoint
from blip3o_jax.config import ConfigError
from blip3o_jax.convert.padding import fit_vocabulary
from blip3o_jax.mesh import batch_shards, make_mesh, put_batch
from blip3o_jax.metrics import MetricWriter
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.sharding import shardings
from blip3o_jax.train import evaluation, steps
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.optimizer import schedule

log = logging.getLogger(__name__)

NAMED = 0.9  # share of the word in the row of an image token that it names


def build_model(cfg: TrainConfig) -> Blip3o:
    """The run's modules; compute is bfloat16 on accelerators and float32 on CPU unless the config says otherwise."""
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Blip3o(cfg.blip3o(), dtype=jnp.dtype(default if cfg.dtype == "auto" else cfg.dtype), remat=cfg.remat)


def name_tokens(embedding, image_start: int, words):
    """embedding [V,D] whose image rows are mostly the rows of the words that name them, and a little of their own: words [codes] holds ids,
    -1 for a code without one. A text-aligned tokenizer's codes mean words; a transformer that knows so need not find it out."""
    rows = jax.lax.dynamic_slice_in_dim(embedding, image_start, len(words))
    named = jnp.where((words < 0)[:, None], rows, NAMED * embedding[jnp.maximum(words, 0)] + (1 - NAMED**2) ** 0.5 * rows)
    return jax.lax.dynamic_update_slice_in_dim(embedding, named, image_start, axis=0)


def initial_params(cfg: TrainConfig, model: Blip3o, load_parts: Callable, mesh, words=None):
    """Params of the stage's parts on the mesh: those named in `cfg.init` from there, the others at random from the seed.

    `words` [codes] are given with `cfg.named_tokens`, for `name_tokens`.
    """
    parts = steps.PARTS[cfg.stage]
    if unknown := sorted(set(cfg.init) - set(parts)):
        raise ConfigError(f"init names {unknown[0]!r}, which stage {cfg.stage!r} does not use; its parts: {', '.join(parts)}.")
    fresh = tuple(part for part in parts if part not in cfg.init)

    def make(key):
        params = model.init(key, fresh)
        if cfg.named_tokens and "qwen3" in fresh:
            table = params["qwen3"]["embed_tokens"]
            table["embedding"] = name_tokens(table["embedding"], model.config.vocab.image_start_token_id, jnp.asarray(words))
        return params

    key = jax.random.key(cfg.seed)
    params = jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key), mesh))(key)
    expected = model.abstract()
    for part, directory in cfg.init.items():
        loaded = flatten_dict(load_parts(directory, part), sep="/")
        rows = model.config.qwen3.vocab_rows
        loaded = unflatten_dict({path: fit_vocabulary(f"{part}/{path}", leaf, rows) for path, leaf in loaded.items()}, sep="/")
        want, got = (jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (expected[part], loaded))
        if want != got:
            raise ConfigError(f"init.{part}: the weights in {directory} have other shapes than this run's model.")
        placed = shardings({part: loaded}, mesh)[part]
        params[part] = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x, np.float32), s), loaded, placed)
    return params


def run(
    cfg: TrainConfig,
    workdir,
    batches: Callable[[int], Iterator[dict]],
    heldout: dict,
    load_parts: Callable[[str, str], dict],
    words: np.ndarray | None = None,
) -> dict[str, float]:
    """Trains to `cfg.num_steps` and returns the last evaluation; resumes when the workdir holds a checkpoint.

    `batches(step)` iterates over host batches from that step on; `heldout` is one host batch; `load_parts(directory, part)` gives a
    part's params; `words` as in `initial_params`. Raises ConfigError before compilation for anything the config gets wrong, and when the
    loss stops being finite.
    """
    workdir = pathlib.Path(workdir)
    mesh = make_mesh(cfg.mesh)
    if cfg.batch_size % batch_shards(mesh):
        raise ConfigError(f"batch_size {cfg.batch_size} does not divide by the mesh's {batch_shards(mesh)} batch shards.")
    model = build_model(cfg)
    writer = MetricWriter(workdir)
    manager = checkpoint.open_manager(workdir, cfg.keep_checkpoints)

    params = initial_params(cfg, model, load_parts, mesh, words)
    abstract = jax.eval_shape(lambda p: steps.init_state(cfg, p), params)
    placed = shardings(abstract, mesh)
    state, frozen = jax.jit(lambda p: steps.init_state(cfg, p), out_shardings=placed)(params)
    del params
    if manager.latest_step() is not None:
        state, frozen = checkpoint.restore(manager, state, frozen)
        log.info("Resumed %s at step %d.", workdir, int(state["step"]))
    count = sum(x.size for x in jax.tree.leaves(state["params"]))
    log.info("Stage %s on mesh %s: %.2f M parameters trained.", cfg.stage, dict(mesh.shape), count / 1e6)

    step = steps.compile_step(model, cfg, placed[0])
    evaluate = evaluation.make_evaluate(model, cfg)
    learning_rate = schedule(cfg.optimizer, cfg.num_steps)
    start = int(state["step"])
    iterator = batches(start)
    metrics, waited, began, last = [], 0.0, time.perf_counter(), start
    result = {}
    for now in range(start + 1, cfg.num_steps + 1):
        before = time.perf_counter()
        batch = put_batch(next(iterator), mesh)
        waited += time.perf_counter() - before
        with jax.profiler.StepTraceAnnotation("train", step_num=now):
            state, values = step(state, frozen, batch)
        metrics.append(values)
        if now % cfg.log_every == 0 or now == cfg.num_steps:
            means = {name: float(np.mean([float(m[name]) for m in metrics])) for name in metrics[0]}
            seconds = time.perf_counter() - began
            means |= {
                "learning_rate": float(learning_rate(now)),
                "step_ms": 1e3 * seconds / (now - last),
                "data_wait_ms": 1e3 * waited / (now - last),
            }
            writer.write(now, means)
            eta = seconds / (now - last) * (cfg.num_steps - now) / 60
            log.info("step %d/%d %s eta %.0f min", now, cfg.num_steps, " ".join(f"{k} {v:.4g}" for k, v in means.items()), eta)
            if not np.isfinite(means["loss"]):
                raise ConfigError(f"The loss is not finite at step {now}; the newest checkpoint in {workdir} is from before.")
            metrics, waited, began, last = [], 0.0, time.perf_counter(), now
        if now % cfg.eval_every == 0 or now == cfg.num_steps:
            result, picture = evaluate(steps.weights(state, frozen), heldout)
            writer.write(now, result)
            if picture is not None:
                writer.write_image(now, "sheet", picture)
            log.info("held out at step %d: %s", now, json.dumps(result))
            began, last = time.perf_counter(), now
        if now % cfg.checkpoint_every == 0 or now == cfg.num_steps:
            checkpoint.save(manager, cfg, state, frozen)
    manager.wait_until_finished()
    return result
