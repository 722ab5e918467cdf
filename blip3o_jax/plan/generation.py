"""Generation on devices that are not here: the programs that `blip3o-jax generate` runs one after
the other beside all weights, and how many images fit at once."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from blip3o_jax import flops
from blip3o_jax.chips import Chip
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import require
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.parallel.batches import batch_shards, check_batch
from blip3o_jax.parallel.mesh import BATCH
from blip3o_jax.plan import estimate
from blip3o_jax.plan.programs import Program, placed
from blip3o_jax.sample import int8
from blip3o_jax.sample import programs as sampling
from blip3o_jax.sample.settings import Settings

# In the order in which they run; the last, whose images are in full size, needs most by far.
PROGRAMS = ("write_tokens", "draw_latents", "pictures")
FEW = 4  # images a device at once that the search begins with


def weights_of(model: Blip3o, mesh: Mesh, weights: str) -> Params:
    """Shapes of the parameters where `generate` puts them."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.abstract())
    return placed(jax.eval_shape(int8.quantized, shapes) if weights == "int8" else shapes, mesh)


def lower(
    config: Blip3oConfig,
    mesh: Mesh,
    settings: Settings,
    weights: str,
    rows: int,
    names: tuple[str, ...] = PROGRAMS,
) -> dict[str, Program]:
    """The programs of these names for `rows` prompts of full length, each with the FLOPs of all."""
    check_batch(rows, mesh)
    place = jax.NamedSharding(mesh, BATCH)
    options = dataclasses.asdict(settings)
    decoding = {name: options.pop(name) for name in sampling.DECODING}

    def inputs(*columns: tuple) -> tuple:
        return tuple(
            jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place) for shape, dtype in columns
        )

    # What each is given: prompts, their states, latents.
    length, side = config.max_prompt_tokens, config.sana.sample_size
    key = (3,), jnp.uint32
    states = (config.num_condition_tokens, config.qwen3.hidden_size), jnp.bfloat16
    latents = (side, side, config.dc_ae.latent_channels), jnp.float32
    prompt = ((length,), jnp.int32), ((length,), bool)
    given = {
        "write_tokens": (inputs(*prompt, key), decoding),
        "draw_latents": (inputs(states, key), options),
        "pictures": (inputs(latents), {}),
    }
    # Every program gets all parameters, as in `generate`, so that what it does not read counts.
    count = flops.text_to_image(config, rows, length, settings.num_inference_steps)
    lowered = {}
    with jax.set_mesh(mesh):
        model = Blip3o(config, jnp.bfloat16)
        params = weights_of(model, mesh, weights)
        run = sampling.programs(model, out_shardings=place)
        for name in names:
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
    # What is sent, where every program can be printed.
    sent = [one["communication"] for one in results.values()]
    if None not in sent:
        result["communication"] = {
            kind: {key: sum(one.get(kind, {}).get(key, 0) for one in sent) for key in numbers}
            for numbers_of in sent
            for kind, numbers in numbers_of.items()
        }
    fits = memory["total"] <= chip.hbm * estimate.MIB
    return result | seconds | {"fits": fits, "programs": totals}


def most(config: Blip3oConfig, mesh: Mesh, settings: Settings, weights: str, chip: Chip) -> int:
    """The most images a device at once, as two numbers of them predict; InputError for none."""
    shards = batch_shards(mesh)

    def total(images: int) -> int:
        program = lower(config, mesh, settings, weights, images * shards, PROGRAMS[-1:])
        result = estimate.measure(program[PROGRAMS[-1]], chip)
        needs = f"{images} images a device do not fit: {result.get('reason')}"
        require("total" in result["bytes"], f"{needs}; take --mesh fsdp=N or --generate 1.")
        return result["bytes"]["total"]

    # What an image adds is the same however many there are.
    few, twice = total(FEW), total(2 * FEW)
    return max(1, FEW + int((chip.hbm * estimate.MIB - few) * FEW / (twice - few)))
