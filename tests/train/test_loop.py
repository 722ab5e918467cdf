import json

import jax
import numpy as np
import pytest
from tiny import batch_at, batches, config

from blip3o_jax import checkpoint
from blip3o_jax.config import ConfigError
from blip3o_jax.pipeline import tokenizer_of
from blip3o_jax.scenes.exercises import name_ids
from blip3o_jax.text import Text, load_tokenizer
from blip3o_jax.train import loop, start
from blip3o_jax.train.config import TrainConfig


def test_named_image_tokens_start_as_their_words():
    table = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    named = np.asarray(start.name_tokens(table, 6, np.array([2, -1, 5])))
    np.testing.assert_array_equal(named[[0, 1, 2, 3, 4, 5, 7, 9]], table[[0, 1, 2, 3, 4, 5, 7, 9]])
    for row, word in ((6, 2), (8, 5)):
        np.testing.assert_allclose(named[row], 0.9 * table[word] + 0.19**0.5 * table[row], rtol=1e-5)


def test_codes_are_named_by_words_of_the_tokenizer():
    model = TrainConfig(stage="joint").blip3o()
    text = Text(load_tokenizer(tokenizer_of("emoji_64")), model.vocab, model.max_prompt_tokens)
    ids = name_ids(text)
    assert len(ids) == model.vocab.num_image_tokens
    assert [text.tokenizer.id_to_token(int(ids[i])) for i in (0, 4, 5)] == ["Ġapple", "Ġapple", "Ġbanana"]
    assert (ids >= 0).sum() > 150
    assert ids[-1] == -1


def train(cfg, workdir):
    workdir.mkdir(exist_ok=True)
    loop.run(cfg, workdir, batches, batch_at(10**6, 8), load_parts=None)
    losses = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in losses if "loss" in row], checkpoint.load_run(workdir)[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(config(mesh={"data": 8}), tmp_path_factory.mktemp("whole"))


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_loss_is_finite_and_weights_move(uninterrupted):
    losses, params = uninterrupted
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    assert np.std(leaves(params)["['qwen3']['norm']['scale']"]) > 0


def test_resuming_gives_the_bits_of_an_uninterrupted_run(uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stop_after = checkpoint.save

    def killed(manager, cfg, state, frozen, notes):
        stop_after(manager, cfg, state, frozen, notes)
        manager.wait_until_finished()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(mesh={"data": 8}), run)
    monkeypatch.undo()
    losses, params = train(config(mesh={"data": 8}), run)
    assert losses == uninterrupted[0]
    for name, leaf in leaves(params).items():
        np.testing.assert_array_equal(leaf, leaves(uninterrupted[1])[name], err_msg=name)


def test_a_mesh_with_fsdp_and_tensor_gives_the_same_losses_and_weights(uninterrupted, tmp_path):
    losses, params = train(config(mesh={"data": 2, "fsdp": 2, "tensor": 2}), tmp_path / "run")
    np.testing.assert_allclose(losses, uninterrupted[0], rtol=1e-5)
    for name, leaf in leaves(params).items():
        whole = leaves(uninterrupted[1])[name]
        assert np.linalg.norm(leaf - whole) <= 1e-4 * np.linalg.norm(whole), name


def test_what_does_not_divide_or_belong_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 12 does not divide by the mesh's 8"):
        train(config(mesh={"data": 8}, batch_size=12), tmp_path / "a")
    with pytest.raises(ConfigError, match="does not use"):
        train(config(mesh={"data": 8}, init={"vae": "x"}), tmp_path / "b")
