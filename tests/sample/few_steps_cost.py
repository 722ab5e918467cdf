"""What a diffusion part of few steps saves, and what it costs to train.

    python tests/sample/few_steps_cost.py [--checkpoint emoji_64] [--repeats 9]
    python tests/sample/few_steps_cost.py --train mid_128 [--repeats 3]

The first makes four pictures by the checkpoint without its spans in 30 guided steps and by itself
in its few, taking turns: seconds of the denoising and of the whole, medians, and their ratios. The
second runs a training step of stage `joint` with the transformer frozen and one of `distill`,
taking turns, at random weights from a cache: seconds and the memory of temporaries. One JSON line
last.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable


def turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, after a call that compiles."""
    seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def ratio(seconds: dict[str, float]) -> dict[str, float]:
    first, second = seconds.values()
    return seconds | {"ratio": round(first / second, 2)}


def sampling(checkpoint: str, repeats: int) -> dict:
    import jax
    import numpy as np

    import blip3o_jax
    from blip3o_jax.config import replace
    from blip3o_jax.models.blip3o import Blip3o
    from blip3o_jax.pipeline import Pipeline
    from blip3o_jax.sample import generate, programs
    from blip3o_jax.sample.settings import defaults

    prompts = ["a red heart", "two blue stars", "a green tree left of a moon", "a yellow cat"]
    whole, denoise = {}, {}
    few = blip3o_jax.load(checkpoint)
    model = Blip3o(replace(few.model.config, **{"sana.few_steps": 0}), few.model.dtype)
    sana = {name: x for name, x in few.params["sana"].items() if name != "span_embed"}
    params = {**few.params, "sana": sana}
    plain = Pipeline(model, params, few.text, few.mesh, few.identity, few.batch_size)
    for name, own in (("plain", plain), ("few", few)):
        settings = defaults(own.model.config)
        options = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": 2.0}
        rng, config = np.random.default_rng(0), own.model.config
        hidden = rng.standard_normal(
            (4, config.num_condition_tokens, config.qwen3.hidden_size), np.float32
        )
        keys = np.array([generate.sample_key(0, prompt, 0) for prompt in prompts], np.uint32)
        draw = programs.programs(own.model).draw_latents
        args = jax.device_put((hidden, keys))

        def drawn(own=own, draw=draw, args=args, options=options):
            with jax.set_mesh(own.mesh):
                jax.block_until_ready(draw(own.params, *args, **options, shift=1.0))

        denoise[name] = drawn
        whole[name] = lambda own=own: own.generate(prompts)
    return {"denoise": ratio(turns(denoise, repeats)), "whole": ratio(turns(whole, repeats))}


STAGES = {
    "distill": {"model": {"sana": {"few_steps": 4}}},
    "joint": {"joint": {"trainable_sana": "all"}, "frozen_parts": ["qwen3"]},
}


def training(preset: str, repeats: int) -> dict:
    import jax
    import jax.numpy as jnp

    from blip3o_jax.bench import stages
    from blip3o_jax.convert.random_weights import random_params
    from blip3o_jax.models.blip3o import Blip3o
    from blip3o_jax.train import steps
    from blip3o_jax.train.config import TrainConfig
    from blip3o_jax.train.read_config import from_dict

    sides, memory = {}, {}
    for stage, own in STAGES.items():
        cfg = from_dict(TrainConfig, {"stage": stage, "preset": preset, "batch_size": 4, **own})
        model = Blip3o(cfg.blip3o())
        work = stages.make(model.config, 4, 1)
        batch = {"tokens": work.tokens, "start": work.start, "latents": work.noise}
        batch["codes"] = jnp.zeros((4, model.config.ta_tok.num_tokens), jnp.int32)
        params = jax.tree.map(jnp.asarray, random_params(model.config))
        state, frozen = steps.init_state(cfg, params)
        step = steps.compile_step(model, cfg, None).lower(state, frozen, batch).compile()
        memory[stage] = step.memory_analysis().temp_size_in_bytes
        held = {"state": state}

        def run(held=held, frozen=frozen, batch=batch, step=step):
            held["state"], _ = step(held["state"], frozen, batch)
            jax.block_until_ready(held["state"])

        sides[stage] = run
    return {"seconds": ratio(turns(sides, repeats)), "temporary_bytes": ratio(memory)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="emoji_64")
    parser.add_argument("--train", metavar="PRESET")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.train:
        print(json.dumps(training(args.train, args.repeats)))
    else:
        print(json.dumps(sampling(args.checkpoint, args.repeats)))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
