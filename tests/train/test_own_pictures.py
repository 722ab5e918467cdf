"""The first stages on own pictures: a folder of them, the autoencoder, and a tokenizer whose
teacher is that autoencoder or its own encoder."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import SMALL

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.resources import shipped_configs
from blip3o_jax.train import losses
from blip3o_jax.train.config import TokenizerConfig, TrainConfig
from blip3o_jax.train.read_config import from_dict, read_config
from blip3o_jax.train.stages import STAGES

LATENTS = TokenizerConfig(teacher="latents")
ENCODER = TokenizerConfig(teacher="encoder", entropy=0.0)


@pytest.fixture(scope="module")
def tiny():
    """(model, parameters, images): 2 x 2 latents and tokens of 16 x 16 pixels."""
    config = replace(preset("emoji_64"), **SMALL)
    params = jax.tree.map(jnp.asarray, random_params(config))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    return Blip3o(config), params, images


def test_the_latents_that_teach_are_those_of_the_diffusion_part(tiny):
    """At the tokens' places: on a grid of 4 x 4, by linear interpolation between pixel centres."""
    model, params, images = tiny
    encode = jax.jit(partial(model.dc_ae.apply, method="encode"))
    latents = encode({"params": params["dc_ae"]}, images / 127.5 - 1.0)
    scaled = model.config.dc_ae.scaling_factor * np.asarray(latents)
    taught = jax.jit(partial(losses.teacher_features, model, LATENTS))(params, images)
    np.testing.assert_allclose(taught, scaled.reshape(3, 4, 16), rtol=1e-4, atol=1e-5)
    finer = Blip3o(replace(model.config, **{"ta_tok.encoder.image_size": 32}))
    taught = jax.jit(partial(losses.teacher_features, finer, LATENTS))(params, images)
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = np.einsum("ai,bj,nijc->nabc", weights, weights, scaled).reshape(3, 16, 16)
    np.testing.assert_allclose(taught, expected, rtol=1e-4, atol=1e-5)


def test_the_states_that_teach_are_the_encoders_with_mean_0_and_variance_1(tiny):
    model, params, images = tiny
    encode = jax.jit(partial(model.ta_tok.apply, method="pooled"))
    states = encode({"params": params["ta_tok"]}, images / 127.5 - 1.0)
    states = np.asarray(states, np.float64)
    taught = jax.jit(partial(losses.teacher_features, model, ENCODER))(params, images)
    centred = states - states.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(taught, centred / centred.std(axis=-1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("cfg", [LATENTS, ENCODER, TokenizerConfig()], ids=lambda c: c.teacher)
def test_the_tokenizers_loss_is_that_of_its_terms(cfg, tiny):
    model, params, images = tiny
    patches = np.random.default_rng(1).integers(0, 256, (3, 2, 2))
    batch = {"images": images, "patches": patches}
    apply = jax.jit(model.ta_tok.apply)
    outputs = apply({"params": params["ta_tok"]}, images / 127.5 - 1.0)
    _, decoded, quantized = jax.tree.map(np.asarray, outputs)
    loss_of = jax.jit(partial(losses.tokenizer_loss, model, cfg))
    loss, metrics = loss_of(params, batch, None)
    distance = np.mean(np.sum((quantized.z - quantized.codes) ** 2, axis=-1))
    if cfg.teacher == "words":
        scores = np.exp(quantized.cosines / 0.03)
        words = patches.reshape(3, 4, 1)
        chosen = np.take_along_axis(scores, words, axis=-1)[..., 0]
        codes = metrics["naming"]
        np.testing.assert_allclose(codes, -np.mean(np.log(chosen / scores.sum(-1))), rtol=1e-4)
        teacher = np.asarray(losses.word_vectors(model))[words[..., 0]]
    else:
        np.testing.assert_allclose(metrics["codebook"], distance, rtol=1e-4)
        probs = np.exp(quantized.cosines / 0.03)
        probs /= probs.sum(axis=-1, keepdims=True)
        mean = probs.mean(axis=(0, 1))
        sure = -np.mean(np.sum(probs * np.log(probs), axis=-1))
        codes = distance + cfg.entropy * (sure + np.sum(mean * np.log(mean + 1e-9)))
        assert metrics["codes_used"] == len(np.unique(quantized.ids))
        teacher_of = jax.jit(partial(losses.teacher_features, model, cfg))
        teacher = np.asarray(teacher_of(params, images))
    features = np.mean((decoded[..., : teacher.shape[-1]] - teacher) ** 2)
    np.testing.assert_allclose(metrics["features"], features, rtol=1e-4)
    np.testing.assert_allclose(loss, codes + 0.25 * distance + features, rtol=1e-4)


def test_each_term_moves_what_it_is_for(tiny):
    """The codebook's loss the codes, the commitment what they are chosen for, and neither both."""
    model, params, images = tiny
    cfg = TokenizerConfig(teacher="encoder", entropy=0.0)
    apply = jax.jit(model.ta_tok.apply)
    _, decoded, quantized = apply({"params": params["ta_tok"]}, images / 127.5 - 1.0)

    def codebook(z, codes):
        moved = quantized._replace(z=z, codes=codes)
        return losses.features_loss(model, cfg, decoded, decoded, moved)[0]

    to_z, to_codes = jax.jit(jax.grad(codebook, (0, 1)))(quantized.z, quantized.codes)
    assert np.all(to_z == 0)
    tokens = quantized.ids.size
    expected = 2 / tokens * (quantized.codes - quantized.z)
    np.testing.assert_allclose(to_codes, expected, rtol=1e-4, atol=1e-6)

    def loss(ta_tok, commitment):
        cfg = TokenizerConfig(teacher="encoder", entropy=0.0, commitment=commitment)
        joined = params | {"ta_tok": ta_tok}
        return losses.tokenizer_loss(model, cfg, joined, {"images": images}, None)[0]

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    little, more = (grad(params["ta_tok"], weight)["bottleneck"] for weight in (0.0, 2.0))
    table, more_table = (x["regularizer"]["embedding_proj"]["kernel"] for x in (little, more))
    np.testing.assert_allclose(more_table, table, rtol=1e-4, atol=1e-6)
    assert np.abs(table).max() > 0
    projection, other = (x["in_linear"]["kernel"] for x in (little, more))
    assert not np.allclose(projection, other, rtol=0.01)


def test_the_teacher_gets_no_gradient_and_an_encoder_that_teaches_is_not_trained(tiny):
    model, params, images = tiny
    batch = {"images": images}

    def loss(params):
        return losses.tokenizer_loss(model, LATENTS, params, batch, None)[0]

    grads = jax.jit(jax.grad(loss))({part: params[part] for part in ("ta_tok", "dc_ae")})
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads["dc_ae"]))
    # The decoder's error reaches the encoder through the codes.
    norms = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads["ta_tok"]["encoder"])]
    assert min(norms) > 0
    trains = {
        teacher: TrainConfig(
            stage="tokenizer",
            init={"ta_tok": "a", "dc_ae": "b"} if teacher == "latents" else {"ta_tok": "a"},
            tokenizer=TokenizerConfig(teacher=teacher),
        ).trainable
        for teacher in ("words", "latents", "encoder")
    }
    for path, expected in {
        "ta_tok/encoder/layers/mlp/fc1/kernel": [True, True, False],
        "ta_tok/encode_task_layer/kernel": [True, True, True],
        "ta_tok/bottleneck/regularizer/embedding": [False, False, False],
        "dc_ae/encoder/conv_in/kernel": [False, False, False],
    }.items():
        assert [trains[teacher](path) for teacher in trains] == expected, path


SOURCES = [{"kind": "folder", "path": "pictures"}]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"data": {"sources": SOURCES}}, "no words for their patches; tokenizer.teacher is"),
        ({"tokenizer": {"teacher": "latents"}}, "'latents' is that of .*; name it as init.dc_ae"),
        ({"tokenizer": {"teacher": "encoder"}}, "'encoder' is that of .*; name it as init.ta_tok"),
        ({"tokenizer": {"teacher": "latent"}}, "Unknown tokenizer.teacher 'latent'; did you mean"),
        ({"tokenizer": {"entropy": 0.2}}, "tokenizer.entropy has no effect with words as teacher"),
        ({"init": {"dc_ae": "emoji_64"}}, "'dc_ae', which stage 'tokenizer' does not use"),
    ],
)
def test_a_tokenizer_without_a_teacher_is_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        from_dict(TrainConfig, {"stage": "tokenizer", **values})


def test_one_checkpoint_is_that_of_the_teacher_too():
    cfg = TrainConfig(stage="tokenizer", init="emoji_64", tokenizer=LATENTS)
    assert cfg.init == {"ta_tok": "emoji_64", "dc_ae": "emoji_64"}
    assert (cfg.parts, cfg.trained_parts) == (("ta_tok", "dc_ae"), ("ta_tok",))


def test_my_pictures_is_a_chain_of_all_stages_that_read_pictures():
    text = shipped_configs()["my_pictures"].read_text()
    commands = re.findall(r"train --config my_pictures:?(\w*) +--workdir (\S+)", text)
    workdirs = {stage or "joint": workdir for stage, workdir in commands}
    assert list(workdirs) == [stage for stage, r in STAGES.items() if "sources" in r.data]
    runs = {stage: read_config(f"my_pictures:{stage}", []) for stage in workdirs}
    assert read_config("my_pictures", []) == runs["joint"]
    assert all(run.data == runs["joint"].data for run in runs.values())
    assert runs["tokenizer"].init["dc_ae"] == workdirs["autoencoder"]
    own = {"dc_ae": workdirs["autoencoder"], "ta_tok": workdirs["tokenizer"]}
    assert runs["joint"].init.items() >= own.items()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 pictures of two colours, with captions, and one file that is none."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(24):
        cells = rng.integers(0, 256, (1, 2, 3), np.uint8)
        picture = Image.fromarray(cells).resize((24, 20), Image.Resampling.NEAREST)
        picture.save(folder / "pictures" / f"{i:02d}.png")
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"colours {i}")
    (folder / "pictures" / "13.png").write_bytes(b"no picture")
    return folder


def train(folder, stage, init, num_steps, **values):
    """The lines of metrics of a run of the tiny model over the folder, which is current."""
    values = {
        **{"stage": stage, "model": SMALL, "init": init, "batch_size": 8, "num_steps": num_steps},
        **{"log_every": 1, "eval_every": num_steps, "checkpoint_every": num_steps},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "ema_decay": 0.9},
        "data": {"sources": SOURCES, "heldout": 4, "max_bad_fraction": 0.1},
        **values,
    }
    result = f"return ConfigDict({values!r}, allow_dotted_keys=True)"
    lines = "from ml_collections import ConfigDict", "def get_config():", f"    {result}", ""
    (folder / f"{stage}.py").write_text("\n".join(lines))
    assert main(["train", "--config", f"{stage}.py", "--workdir", stage]) == 0
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").open()]


def test_both_stages_learn_a_folder_of_pictures(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = train(folder, "autoencoder", {}, 30)
    values = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])
    (line,) = (folder / "autoencoder" / "bad_records.0.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "13.png"

    # The latents of the tiny autoencoder, scaled to 1, are the teacher.
    (std,) = [row["heldout/latent_std"] for row in rows if "heldout/latent_std" in row]
    model = {**SMALL, "dc_ae.scaling_factor": 1 / std}
    how = {"model": model, "tokenizer": {"teacher": "latents"}}
    rows = train(folder, "tokenizer", {"dc_ae": "autoencoder"}, 60, **how)
    values = [row["features"] for row in rows if "features" in row]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])
    (heldout,) = [row for row in rows if "heldout/loss" in row]
    assert heldout["heldout/codes_used"] >= 2
    # The autoencoder is as it was, and kept beside what it taught.
    own, taught = (checkpoints.open(name).load(("dc_ae",)) for name in ("autoencoder", "tokenizer"))
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(taught), strict=True):
        np.testing.assert_array_equal(one, other)
