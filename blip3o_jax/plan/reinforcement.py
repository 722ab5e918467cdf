"""A step of GRPO on devices that are not here: the programs of the rollout, which run one after the
other beside the training state, and the update."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from blip3o_jax import flops
from blip3o_jax.errors import require
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import BATCH, dividing
from blip3o_jax.plan.programs import Program, abstract_state, kinds_of, placed
from blip3o_jax.rl import rollout, update
from blip3o_jax.sample import programs as sampling
from blip3o_jax.text import row_length
from blip3o_jax.train import start
from blip3o_jax.train.config import TrainConfig


def lower(cfg: TrainConfig, mesh: Mesh) -> dict[str, Program]:
    """The programs of a step that reinforces the transformer on prompts, each with the FLOPs of
    all; InputError for other steps, and where batch or parameters do not divide."""
    # What is not planned is refused.
    section, config = cfg.grpo, cfg.blip3o()
    sentence = f"plan compiles the step of grpo.train 'transformer', not of {section.train!r}."
    require(section.halves == ("transformer",), sentence)
    require(not cfg.data.edits, "plan compiles GRPO on prompts; leave data.edits out.")
    start.check_batches(cfg, mesh)
    place = jax.NamedSharding(mesh, BATCH)

    def rows(dtype: Any, *shape: int, count: int = cfg.batch_size) -> jax.ShapeDtypeStruct:
        where = jax.NamedSharding(mesh, PartitionSpec(dividing(count, mesh)))
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=where)

    piece = functools.partial(rows, count=cfg.batch_size // section.pieces)
    asked = functools.partial(rows, count=cfg.batch_size // section.num_generations)

    # What each program is given: prompts, their states, latents; and rows of what was drawn.
    prompt, length = config.max_prompt_tokens, cfg.data.row_length or row_length(config)
    side, channels = config.sana.sample_size, config.dc_ae.latent_channels
    states = cfg.dtype, config.num_condition_tokens, config.qwen3.hidden_size
    numbers = rows(jnp.float32)
    given = {
        "write_tokens": (asked(jnp.int32, prompt), asked(bool, prompt), rows(jnp.uint32, 3)),
        "draw_latents": (piece(*states), piece(jnp.uint32, 3)),
        "pictures": (piece(jnp.float32, side, side, channels),),
    }
    options = {"write_tokens": rollout.decoding(section), "pictures": {}}
    options["draw_latents"] = rollout.rendering(config, section, editing=False)
    drawn = {"tokens": rows(jnp.int32, length), "start": rows(jnp.int32)}
    drawn |= {"logprobs": rows(jnp.float32, config.ta_tok.num_tokens)}
    batch = {"transformer": drawn | {"advantages": numbers, "mask": numbers}}

    # The state, and what is on the devices beside it.
    count, programs = _flops(cfg, length), {}
    with jax.set_mesh(mesh):
        model = Blip3o(config, jnp.dtype(cfg.dtype), cfg.remat)
        state, frozen = abstract_state(cfg, model, mesh)
        reference = {part: state["params"][part] for part in update.reference_parts(cfg, state)}
        kept = kinds_of(state) | {"first policy": reference}
        trained = kept.pop("parameters")
        gathered = jax.eval_shape(rollout.gathering(mesh, model), trained["qwen3"])
        gathered = placed({"qwen3": gathered}, mesh, without="fsdp")["qwen3"]
        run = sampling.programs(model, out_shardings=place)
        # While tokens are written, the policy's own weights lie beside those that were gathered;
        # while a piece is rendered, the states and images of all, whole and in pieces.
        for name, arrays in given.items():
            kinds, beside = {"frozen": frozen, "batch": arrays}, kept
            if name == "write_tokens":
                kinds, beside = kinds | {"gathered": gathered}, kept | {"parameters": trained}
                params = frozen | {"qwen3": gathered}
            else:
                kinds, params = kinds | {"parameters": trained}, frozen | trained
                pixels = rows(jnp.uint8, config.image_size, config.image_size, 3)
                beside = kept | {"states": [rows(*states)] * 2, "images": [pixels] * 2}
            lowered = getattr(run, name).lower(params, *arrays, **options[name])
            arguments = params, *arrays
            programs[name] = Program(lowered, arguments, kinds, count, cfg.batch_size, beside)
        places = jax.tree.map(lambda x: x.sharding, state)
        arguments = state, frozen, reference, batch
        lowered = update.compile_update(model, cfg, places).lower(*arguments)
        kinds = {"parameters": trained, "frozen": frozen, **kept, "batch": batch}
        programs["update"] = Program(lowered, arguments, kinds, count, cfg.batch_size)
    return programs


def _flops(cfg: TrainConfig, length: int) -> int:
    """Of tokens, their pictures and the updates."""
    section, config, rows = cfg.grpo, cfg.blip3o(), cfg.batch_size
    written = flops.decode(config, rows, config.max_prompt_tokens, section.num_generations)
    # The rendering may be repeated, and the update too.
    guided = section.guidance_scale is not None
    drawn = flops.render(config, rows, section.num_inference_steps, guided)
    vocab = config.qwen3.vocab_size if section.full_vocabulary else config.vocab.num_image_tokens
    updates = section.num_iterations, section.beta > 0
    return (
        written + section.decodes * drawn + flops.policy_step(config, rows, length, vocab, *updates)
    )
