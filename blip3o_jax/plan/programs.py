"""A run's own programs, lowered for a mesh of a TPU topology that is not here.

Nothing is allocated: parameters are shapes.
"""

import dataclasses
import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from blip3o_jax import flops
from blip3o_jax.chips import Chip, parse_topology
from blip3o_jax.errors import InputError
from blip3o_jax.kernels.platform import dtype_for, jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.batches import check_batch
from blip3o_jax.parallel.mesh import BATCH
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.sample import generate
from blip3o_jax.sample.settings import Settings
from blip3o_jax.train import steps
from blip3o_jax.train.config import TrainConfig


def open_topology(name: str) -> tuple[list[jax.Device], Chip]:
    """The devices of e.g. "v5e:4x4", none of which is here, and their chip; InputError for an
    unknown one or without libtpu."""
    chip, _ = parse_topology(name)
    # libtpu reads these once, when it is loaded: it must neither ask a cloud's server what this
    # machine is, nor refuse a second plan at the same time.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform="tpu").devices, chip
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"The TPU's compiler cannot be loaded ({reason}); pip install 'blip3o-jax[tpu]'."
        ) from error


def on_accelerator(cfg: TrainConfig) -> TrainConfig:
    """The config as an accelerator runs it."""
    return dataclasses.replace(cfg, dtype=dtype_for(cfg.dtype, on="tpu"))


def shallow(cfg: TrainConfig, depth: int) -> TrainConfig:
    """The run with `depth` layers of each transformer and at most as many of each of the
    autoencoder's stages: what costs minutes less to compile and has the same kinds of everything.
    """
    if depth < 1:
        raise InputError(f"--depth is at least 1, not {depth}.")
    model = cfg.blip3o()
    unread = -model.ta_tok.select_layer_id - 1  # layers of the encoder that are loaded and not used
    layers = {
        "qwen3.num_hidden_layers": depth,
        "sana.num_layers": depth,
        "ta_tok.encoder.num_hidden_layers": depth + unread,
    }
    for side in ("encoder_layers_per_block", "decoder_layers_per_block"):
        layers[f"dc_ae.{side}"] = tuple(min(depth, count) for count in getattr(model.dc_ae, side))
    return dataclasses.replace(cfg, model={**cfg.model, **layers})


def _placed(tree, mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh)
    )


def abstract_batch(cfg: TrainConfig, mesh) -> dict:
    """Shapes of a global batch of the run's stage, sharded along the mesh."""
    if cfg.record.batch is None:
        raise InputError(
            f"plan compiles the step of supervised stages, not of {cfg.stage!r}; see how "
            "it generates with --generate."
        )
    place = jax.NamedSharding(mesh, BATCH)
    arrays = cfg.record.batch(cfg.blip3o(), cfg.data, cfg.batch_size)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in arrays.items()
    }


@dataclass(frozen=True)
class Program:
    """A program lowered for a mesh: its arguments, the same by kind, and the FLOPs and images of
    one run, of all devices."""

    lowered: jax.stages.Lowered
    arguments: tuple
    kinds: dict
    flops: int | None
    images: int


def lower_step(cfg: TrainConfig, mesh) -> Program:
    """The run's training step.

    InputError as from `mesh.check_batch`, `sharding.spec` and `abstract_batch`.
    """
    check_batch(cfg.batch_size, mesh, cfg.accumulate)
    batch = abstract_batch(cfg, mesh)
    with jax.set_mesh(mesh):
        model = Blip3o(cfg.blip3o(), jnp.dtype(cfg.dtype), cfg.remat)
        state, frozen = jax.eval_shape(
            lambda: steps.init_state(cfg, model.init(jax.random.key(0), cfg.record.parts))
        )
        state, frozen = _placed(state, mesh), _placed(frozen, mesh)
        lowered = steps.compile_step(model, cfg, jax.tree.map(lambda x: x.sharding, state)).lower(
            state, frozen, batch
        )
    names = {"params": "parameters", "opt_state": "optimizer", "ema": "average"}
    kinds = {kind: state.get(name) for name, kind in names.items()} | {
        "frozen": frozen,
        "batch": batch,
    }
    kinds["counters"] = {name: tree for name, tree in state.items() if name not in names}
    count = cfg.record.flops(cfg.blip3o(), cfg.section, batch)
    return Program(lowered, (state, frozen, batch), kinds, count, cfg.batch_size)


def lower_generation(cfg: TrainConfig, mesh, rows: int, num_inference_steps: int) -> Program:
    """Text to image of `rows` prompts with bfloat16 weights, as `blip3o-jax generate` runs it, but
    in one program: prefill, decoding, denoising, pixels."""
    check_batch(rows, mesh)
    config, place = cfg.blip3o(), jax.NamedSharding(mesh, BATCH)
    with jax.set_mesh(mesh):
        model = Blip3o(config, jnp.bfloat16)
        # Abstract weights and inputs, where `generate` would put them.
        params = _placed(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.abstract()),
            mesh,
        )
        columns = (
            (config.max_prompt_tokens, jnp.int32),
            (config.max_prompt_tokens, bool),
            (3, jnp.uint32),
        )
        batch = tuple(
            jax.ShapeDtypeStruct((rows, size), dtype, sharding=place) for size, dtype in columns
        )
        settings = dataclasses.asdict(Settings(num_inference_steps=num_inference_steps))

        def run(params, prompt, valid, numbers, top_k, top_p, temperature, **settings):
            made = generate.write_tokens(
                model,
                params,
                prompt,
                valid,
                numbers,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
            )
            latents = generate.draw_latents(model, params, made.pop("hidden"), numbers, **settings)
            return {"images": generate.pictures(model, params, latents), **made}

        # One program, since the compiler counts memory by program.
        static = ("num_inference_steps", "top_k")
        lowered = jit(run, config, static_argnames=static, out_shardings=place).lower(
            params, *batch, **settings
        )
    count = flops.text_to_image(config, rows, config.max_prompt_tokens, num_inference_steps)
    return Program(lowered, (params, *batch), {"parameters": params, "batch": batch}, count, rows)
