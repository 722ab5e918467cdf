"""A rollout that is rendered in pieces: each is rewarded by itself, and the batch is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from blip3o_jax.cli import main
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.errors import InputError
from blip3o_jax.rl.run import reinforced
from blip3o_jax.train import steps
from blip3o_jax.train.config import GrpoConfig
from blip3o_jax.train.sections import DiffusionRlConfig

PROMPTS = [{"prompt": "two red hearts"}, {"prompt": "a dog"}]
SECTIONS = {
    "decodes": {"decodes": 2},
    "joint": {"train": "joint", "diffusion": DiffusionRlConfig(num_train_timesteps=2)},
    "flow_grpo": {"train": "diffusion", "diffusion": DiffusionRlConfig("flow_grpo", 1)},
}


def config(kind, pieces, mesh):
    section = {"num_generations": 4, "num_inference_steps": 2, "guidance_scale": None}
    section = GrpoConfig(**section, **SECTIONS[kind], pieces=pieces)
    return tiny.config(stage="grpo", joint=None, grpo=section, mesh=mesh)


@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("kind", SECTIONS)
def test_pieces_are_rewarded_one_by_one_and_give_the_batch_of_the_whole(kind, mesh):
    seen = []

    def score(images, metadata):
        brightness = images.astype(np.float64).mean(axis=(1, 2, 3)) / 255
        seen.append((images, [m["prompt"] for m in metadata]))
        return lambda: (brightness[:, None], {"brightness": brightness})

    def rolled(pieces):
        cfg = config(kind, pieces, mesh)
        params = jax.tree.map(jnp.asarray, random_params(cfg.blip3o()))
        state, frozen = steps.init_state(cfg, params)
        run = reinforced(cfg, lambda step: PROMPTS, PROMPTS, tiny.text(), score, None)
        with jax.set_mesh(run.mesh):
            batch, numbers = run.batches(0)(1, state, frozen)
            heldout, _ = run.evaluate(params)
        return jax.device_get(batch), numbers, heldout

    (whole, numbers, heldout), count = rolled(1), len(seen)
    batch, again, shown = rolled(2)
    # Piece i has rows i, i + 2, ... of each rendering; the held-out images are judged together.
    for number, (images, asked) in enumerate(seen[: count - 1]):
        for i in range(2):
            part, prompts = seen[count + 2 * number + i]
            assert len(part) == 4
            np.testing.assert_allclose(part, images[i::2], atol=1)
            assert prompts == asked[i::2]
    np.testing.assert_allclose(seen[-1][0], seen[count - 1][0], atol=1)
    # Products of fewer rows round in other ways, which the advantages enlarge.
    assert jax.tree.structure(whole) == jax.tree.structure(batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-2), whole, batch)
    for name in ("reward", "brightness", "diversity"):
        np.testing.assert_allclose(numbers[name], again[name], rtol=1e-3)
    np.testing.assert_allclose(
        heldout["heldout/brightness"], shown["heldout/brightness"], rtol=1e-3
    )


def test_pieces_divide_the_batch_and_its_shards(tmp_path, capsys):
    with pytest.raises(InputError, match=r"batch_size 8 does not divide by grpo\.pieces 3; "):
        config("joint", 3, {})
    run = ["--config", "emoji_grpo", "--config.init=emoji_64", "--workdir", str(tmp_path / "run")]
    assert main(["grpo", *run, "--config.grpo.pieces=16"]) == 2
    sentence = "batch_size 64 does not divide by the mesh's 8 batch shards x 16 pieces of a rollout"
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
