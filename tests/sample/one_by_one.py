"""Proof that decoding in windows gives the tokens that one by one gives, in fewer rounds.

    python tests/sample/one_by_one.py [--images 2000] [--batch-size 8] [--window 8]
        [--top-k 1200] [--top-p 0.95] [--temperature 1] [--mesh data=2,fsdp=2,tensor=2]

Draws images of held-out prompts with the embedded model in float32, both ways. Windows are those of
`--window`, whatever this machine would choose. One JSON line last: images, those whose tokens
differ, the mean rounds as a share of the tokens, and the draws whose two best scores lie closer
than NEAR, where the last bits of the states may decide; exit code 1 if tokens differ.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blip3o_jax.config import VocabConfig
from blip3o_jax.models.qwen3 import Qwen3, init_cache, positions_of, step_logits
from blip3o_jax.parallel.activations import STEP
from blip3o_jax.sample import decode

NEAR = 1e-4  # between scores: logits over temperature, plus Gumbel noise


def one_by_one(
    model: Qwen3,
    params: Any,
    vocab: VocabConfig,
    num_tokens: int,
    prompt: Array,
    valid: Array,
    keys: Array,
    top_k: int,
    top_p: float,
    temperature: float,
) -> dict[str, Array]:
    """`decode.generate_tokens`, a token after the other: draw from the last state, feed the token,
    keep the state that the next one is drawn from. "gaps" [B,n] are those of the two best scores.
    """
    apply = functools.partial(model.apply, {"params": params})
    lengths = valid.sum(axis=1, dtype=jnp.int32)
    cache = init_cache(model.cfg, len(prompt), prompt.shape[1] + num_tokens, model.dtype)
    hidden, cache = apply(prompt, positions_of(valid), valid, cache)
    head = apply(vocab.image_start_token_id, vocab.num_image_tokens, method="head")

    def step(carry, i):
        hidden, cache = carry
        logits, own = step_logits(hidden, head), jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        tokens, logprobs = decode.sample(logits, own, top_k, top_p, temperature)
        fed = (vocab.image_start_token_id + tokens)[:, None]
        after, cache = apply(
            fed, (lengths + i)[:, None], jnp.ones_like(fed, bool), cache, layout=STEP
        )
        # How close the draw was.
        size = min(top_k or logits.shape[-1], logits.shape[-1])
        values = jax.lax.top_k(logits / jnp.where(temperature == 0, 1, temperature), size)[0]
        probs = jax.nn.softmax(values)
        keep = (jnp.cumsum(probs, axis=-1) - probs < top_p).at[:, 0].set(True)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(own)
        scores = jnp.where(keep, values, -jnp.inf) + jnp.where(temperature == 0, 0, noise)
        best = jax.lax.top_k(scores, 2)[0]
        return (after[:, 0], cache), (tokens, logprobs, hidden, best[:, 0] - best[:, 1])

    (last, _), steps = jax.lax.scan(step, (hidden[:, -1], cache), jnp.arange(num_tokens))
    tokens, logprobs, states, gaps = (jnp.swapaxes(x, 0, 1) for x in steps)
    hidden = jnp.concatenate([states, last[:, None]], axis=1)
    return {"tokens": tokens, "hidden": hidden, "logprobs": logprobs, "gaps": gaps}


@contextlib.contextmanager
def windows_of(tokens: int) -> Iterator[None]:
    """Lets `generate_tokens` take windows of this many tokens, whatever the hardware."""
    with mock.patch.object(decode, "tokens_of_a_round", return_value=tokens):
        yield


def main() -> int:
    parser = argparse.ArgumentParser()
    for name, value in (("images", 2000), ("batch-size", 8), ("top-k", 1200), ("window", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("top-p", 0.95), ("temperature", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--mesh", default="")
    args = parser.parse_args()

    import blip3o_jax
    from blip3o_jax.parallel.mesh import BATCH, make_mesh
    from blip3o_jax.parallel.parameters import shardings
    from blip3o_jax.sample.generate import fold_keys, sample_key
    from blip3o_jax.scenes import prompts
    from blip3o_jax.scenes.config import WorldConfig
    from blip3o_jax.text import left_pad

    pipeline = blip3o_jax.load("emoji_64")
    model, text, config = pipeline.model, pipeline.text, pipeline.model.config
    pairs = (pair.split("=") for pair in filter(None, args.mesh.split(",")))
    sizes = {name: int(size) for name, size in pairs} or {"data": 1}
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    params = pipeline.params["qwen3"]
    alone = jax.device_put(params, jax.devices()[0])
    params = jax.device_put(params, shardings({"qwen3": params}, mesh)["qwen3"])
    settings = args.top_k, jnp.float32(args.top_p), jnp.float32(args.temperature)

    def draw(function, params, prompt, valid, numbers):
        keys = jax.vmap(jax.random.fold_in, (0, None))(fold_keys(numbers), 0)
        shapes = config.vocab, config.ta_tok.num_tokens
        return function(model.qwen3, params, *shapes, prompt, valid, keys, *settings)

    single = jax.jit(functools.partial(draw, one_by_one))
    windows = jax.jit(
        functools.partial(draw, decode.generate_tokens),
        out_shardings=jax.NamedSharding(mesh, BATCH),
    )
    scenes = [
        prompts.sample(WorldConfig(seed=1), i, "heldout")[0]["prompt"] for i in range(args.images)
    ]
    differ, near, rounds = 0, 0, []
    for begin in range(0, args.images - args.batch_size + 1, args.batch_size):
        batch = scenes[begin : begin + args.batch_size]
        rows = [text.encode_prompt(prompt) for prompt in batch]
        prompt, valid = left_pad(rows, config.max_prompt_tokens, text.vocab.pad_token_id)
        numbers = np.array(
            [sample_key(begin + i, prompt, 0) for i, prompt in enumerate(batch)], np.uint32
        )
        expected = jax.device_get(single(alone, prompt, valid, numbers))
        placed = jax.device_put((prompt, valid, numbers), jax.NamedSharding(mesh, BATCH))
        with windows_of(args.window), jax.set_mesh(mesh):
            found = jax.device_get(windows(params, *placed))
        differ += int((found["tokens"] != expected["tokens"]).any(axis=1).sum())
        near += int((expected["gaps"] < NEAR).sum())
        rounds += found["rounds"].tolist()
        np.testing.assert_allclose(found["hidden"], expected["hidden"], atol=1e-3)
    share = float(np.mean(rounds)) / config.ta_tok.num_tokens
    numbers = {"images": len(rounds), "differ": differ, "rounds": round(share, 4), "near": near}
    print(json.dumps(vars(args) | numbers))
    return int(differ > 0)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
