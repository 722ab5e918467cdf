"""Rows behind the vocabulary are in memory and nowhere else."""

import dataclasses

import jax
import numpy as np
import pytest
from reading import load

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert.padding import fit_vocabulary, padded
from blip3o_jax.models.qwen3 import Qwen3
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.parallel.parameters import shardings


def test_leaves_are_padded_and_cut():
    embedding, head = np.ones((5, 2)), np.ones((2, 5))
    wide = fit_vocabulary("qwen3/lm_head/kernel", head, 8)
    assert wide.shape == (2, 8)
    assert wide.sum() == 10
    assert (wide[:, 5:] == 0).all()
    np.testing.assert_array_equal(fit_vocabulary("qwen3/lm_head/kernel", wide, 5), head)
    tall = fit_vocabulary("qwen3/embed_tokens/embedding", embedding, 8)
    np.testing.assert_array_equal(
        fit_vocabulary("qwen3/embed_tokens/embedding", tall, 5), embedding
    )
    assert fit_vocabulary("qwen3/norm/scale", head, 8) is head


def test_the_published_vocabulary_divides_by_128_with_six_rows():
    from blip3o_jax.presets import preset

    assert padded(preset("blip3o_next_3b"), 128).qwen3.vocab_rows == 217216


@pytest.mark.parametrize("kind", ["published", "converted"])
def test_an_odd_vocabulary_is_cut_in_two_and_says_the_same(checkpoint, cfg, tmp_path, kind):
    """43 ids on tensor=2: the file's 43 rows become 44, and the logits are still 43 and equal."""
    assert cfg.qwen3.vocab_size % 2 == 1
    folder = checkpoint
    if kind == "converted":
        folder = tmp_path / "jax"
        assert main(["convert", "to-jax", str(checkpoint), str(folder)]) == 0
    mesh = make_mesh({"data": 1, "tensor": 2}, jax.devices()[:2])
    wider = checkpoints.open(folder).padded(2)
    found, params = wider.config, wider.load(shardings=lambda tree: shardings(tree, mesh))
    assert found.qwen3.vocab_padding == 1
    embedding = params["qwen3"]["embed_tokens"]["embedding"]
    assert embedding.shape[0] == 44
    assert embedding.addressable_shards[0].data.shape[0] == 22
    np.testing.assert_array_equal(embedding[43], 0)
    hidden = np.random.default_rng(0).standard_normal((1, 3, cfg.qwen3.hidden_size), np.float32)
    plain = load(checkpoint)[1]
    ours, theirs = (
        jax.jit(lambda p, h, c=c: Qwen3(c).apply({"params": p}, h, method="logits"))(p, hidden)
        for c, p in ((found.qwen3, params["qwen3"]), (cfg.qwen3, plain["qwen3"]))
    )
    assert ours.shape[-1] == 43
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_with_padding_comes_out_without(tmp_path):
    """The embedded model in a run that pads by six rows, back in the published layout: 826 rows,
    and all values as they were."""
    from blip3o_jax import training_checkpoint
    from blip3o_jax.checkpoints import load_part
    from blip3o_jax.parallel.mesh import make_mesh
    from blip3o_jax.train import start, steps
    from blip3o_jax.train.config import TrainConfig

    parts = ("qwen3", "diffusion_connector", "sana", "ta_tok", "dc_ae")
    cfg = TrainConfig(
        stage="distill",
        model={"qwen3.vocab_padding": 6, "sana.few_steps": 4},
        init=dict.fromkeys(parts, "emoji_64"),
    )
    params = start.initial_params(
        cfg, start.build_model(cfg), load_part, make_mesh({}, jax.devices()[:1])
    )
    assert params["qwen3"]["embed_tokens"]["embedding"].shape[0] == 832
    state, frozen = steps.init_state(cfg, params)
    manager = training_checkpoint.open_manager(tmp_path / "run")
    training_checkpoint.save(manager, cfg, state, frozen, {})
    manager.wait_until_finished()
    assert main(["convert", "to-torch", str(tmp_path / "run"), str(tmp_path / "torch")]) == 0
    assert main(["convert", "verify", "emoji_64", str(tmp_path / "torch")]) == 0
    back = load(tmp_path / "torch")[0]
    assert dataclasses.replace(back, name="emoji_64") == replace(
        cfg.blip3o(), **{"qwen3.vocab_padding": 0}
    )
