"""Generation and editing on devices that are not here: the programs that `blip3o-jax generate` and
`edit` run one after the other beside all weights, and how many images fit at once."""

import dataclasses
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from blip3o_jax import flops
from blip3o_jax.chips import Chip
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.parallel.batches import batch_shards, check_batch
from blip3o_jax.parallel.mesh import BATCH
from blip3o_jax.plan import estimate
from blip3o_jax.plan.programs import Program, placed
from blip3o_jax.sample import int8
from blip3o_jax.sample import programs as sampling
from blip3o_jax.sample.condition import edit_options
from blip3o_jax.sample.settings import EditSettings, Settings

# In the order in which they run; an edit begins with the encoders of its sources.
PROGRAMS = ("write_tokens", "draw_latents", "pictures")
SOURCES = "encode_sources"
FEW = 4  # images a device at once that the search begins with
ENOUGH = 256  # and ends with: with so many, reading the weights is not what takes the time
LINES = 6  # tries that follow the programs' lines
log = logging.getLogger(__name__)


def weights_of(model: Blip3o, mesh: Mesh, weights: str) -> Params:
    """Shapes of the parameters where `generate` puts them."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.abstract())
    return placed(jax.eval_shape(int8.quantized, shapes) if weights == "int8" else shapes, mesh)


def programs_of(settings: Settings) -> tuple[str, ...]:
    """The names of the programs, in the order in which they run."""
    return (SOURCES, *PROGRAMS) if isinstance(settings, EditSettings) else PROGRAMS


def lower(
    config: Blip3oConfig, mesh: Mesh, settings: Settings, weights: str, rows: int
) -> dict[str, Program]:
    """The programs for `rows` prompts of full length, each with the FLOPs of all; those of edits
    with as many source images as the model has places for."""
    check_batch(rows, mesh)
    place = jax.NamedSharding(mesh, BATCH)
    is_edit, sources = isinstance(settings, EditSettings), config.max_sources
    options = edit_options(settings) if is_edit else dataclasses.asdict(settings)
    decoding = {name: options.pop(name) for name in sampling.DECODING}

    def input_(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)

    # What each is given: source images, prompts, their states, latents.
    size, side = config.image_size, config.sana.sample_size
    images = input_((sources, size, size, 3), jnp.uint8), input_((sources,), bool)
    length = config.max_prompt_tokens + is_edit * sources * config.ta_tok.num_tokens
    prompt, key = (input_((length,), jnp.int32), input_((length,), bool)), input_((3,), jnp.uint32)
    states = input_((config.num_condition_tokens, config.qwen3.hidden_size), jnp.bfloat16)
    latents = input_((side, side, config.dc_ae.latent_channels), jnp.float32)
    count = flops.edit if is_edit else flops.text_to_image
    count, lowered = count(config, rows, length, settings.num_inference_steps), {}
    with jax.set_mesh(mesh):
        model = Blip3o(config, jnp.bfloat16)
        params = weights_of(model, mesh, weights)
        run = sampling.programs(model, out_shardings=place)
        encoded = jax.eval_shape(run.encode_sources, params, *images) if is_edit else ()
        encoded = jax.tree.map(lambda x: input_(x.shape[1:], x.dtype), encoded)
        given = {
            SOURCES: (images, {}),
            "write_tokens": ((*prompt, key, *encoded[:1]), decoding),
            "draw_latents": ((states, key, *encoded[1:]), options),
            "pictures": ((latents,), {}),
        }
        # Every program gets all parameters, as in `generate`, so that what it does not read counts.
        for name in programs_of(settings):
            arrays, keywords = given[name]
            program = getattr(run, name).lower(params, *arrays, **keywords)
            kinds = {"parameters": params, "batch": arrays}
            lowered[name] = Program(program, (params, *arrays), kinds, count, rows)
    return lowered


def measure(programs: dict[str, Program], chip: Chip) -> dict:
    """`estimate.measure` of the program that needs most, with the code of all, which stays on the
    device, and what all send; "programs" has the bytes of each."""
    began = time.perf_counter()
    results = {name: estimate.measure(program, chip) for name, program in programs.items()}
    seconds = {"compile_seconds": round(time.perf_counter() - began, 1)}
    for name, result in results.items():
        if "total" not in result["bytes"]:
            return result | seconds | {"reason": f"{name}: {result['reason']}"}
    # The largest with what the others leave beside it.
    totals = {name: result["bytes"]["total"] for name, result in results.items()}
    result = results[max(totals, key=totals.get)]
    memory = result["bytes"]
    others = sum(one["bytes"]["code"] for one in results.values()) - memory["code"]
    memory |= {"code": memory["code"] + others, "total": memory["total"] + others}
    # What all of them send, unless one cannot be printed.
    sent = [one["communication"] for one in results.values()]
    if None in sent:
        unknown = next(one["unknown"] for one in results.values() if one["communication"] is None)
        result |= {"communication": None, "unknown": unknown}
    else:
        result["communication"] = {
            kind: {key: sum(one.get(kind, {}).get(key, 0) for one in sent) for key in numbers}
            for numbers_of in sent
            for kind, numbers in numbers_of.items()
        }
    fits = memory["total"] <= chip.hbm * estimate.MIB
    return result | seconds | {"fits": fits, "programs": totals}


def most(
    config: Blip3oConfig, mesh: Mesh, settings: Settings, weights: str, chip: Chip
) -> tuple[dict[str, Program], dict]:
    """(Programs, what they need) of the most images a device at once that fit, up to `ENOUGH`, or
    of one. Numbers are tried where the programs' lines say, until one fits and the next not."""
    room, shards = chip.hbm * estimate.MIB, batch_shards(mesh)
    totals: dict[int, dict[str, int]] = {}
    best, fitting, failing, images, tries = None, 0, ENOUGH + 1, FEW, 0
    while failing > fitting + 1:
        tries += 1
        lowered = lower(config, mesh, settings, weights, images * shards)
        result = measure(lowered, chip)
        log.info("%d images a device: %s", images, estimate.verdict(result))
        if result["fits"]:
            best, fitting = (lowered, result), images
        else:
            failing = images
        if "programs" in result:
            totals[images] = result["programs"]
            # What the largest has beside the code of the others.
            others = result["bytes"]["total"] - max(totals[images].values())
            room = chip.hbm * estimate.MIB - others
        # As many as fill the room, or twice as many. Halfway, where that is too much already, or
        # the lines have led nowhere: a compiler need not follow them.
        around = {n: totals[n] for n in (fitting, failing) if n in totals}
        images = _filling(around if len(around) == 2 else totals, room) or 2 * images
        if images >= failing or tries >= LINES:
            images = (fitting + failing) // 2
        images = max(images, fitting + 1)
    if best is None:
        log.warning("Not one image a device fits; --mesh fsdp=N shards the weights.")
    return best or (lowered, result)


def _filling(totals: dict[int, dict[str, int]], room: int) -> int:
    """Images, up to `ENOUGH`, with which the first program fills the room, on the lines through the
    programs' bytes of the fewest and the most images; 0 of one number alone."""
    few, many = min(totals, default=0), max(totals, default=0)
    if few == many:
        return 0
    # One that does not grow is never the first.
    more = min((room - size) / max(1, totals[many][n] - size) for n, size in totals[few].items())
    return min(ENOUGH, few + int(more * (many - few)))
