"""What it costs to train a diffusion part of few steps (what it saves: `bench`).

    python tests/train/distill_cost.py [--preset mid_128] [--repeats 3]

Runs a training step of stage `joint` with the transformer frozen and one of `distill`, taking
turns, at random weights from a cache: seconds and the memory of temporaries. One JSON line last.
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
    parser.add_argument("--preset", default="mid_128")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(training(args.preset, args.repeats)))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
