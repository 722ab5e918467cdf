"""`convert to-jax` and `to-torch` on miniatures: what comes back is what went in, and what cannot
is refused by name."""

import errno
import hashlib
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from reading import load
from safetensors.numpy import load_file, save_file

from blip3o_jax import checkpoints, pipeline, training_checkpoint
from blip3o_jax.checkpoints import load_part
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert import orbax_io, safetensors_io
from blip3o_jax.convert.config_json import config_to_json
from blip3o_jax.convert.published import published_rules
from blip3o_jax.convert.rules import torch_shapes
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.resources import ASSETS
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.tree import flatten, split

TA_TOK = "model.vision_tower.vision_tower."
IGNORED = {
    f"{TA_TOK}encoder.head.probe": np.ones((1, 1, 16), np.float32),
    f"{TA_TOK}scale_layer.shift": np.zeros((1, 3, 1, 1), np.float32),
    "lm_head.weight": None,  # the embedding again
}


def convert(capsys, *argv):
    """The report of a conversion that must succeed."""
    assert main(["convert", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refused(capsys, *argv):
    """The sentence of a conversion that must not."""
    capsys.readouterr()
    assert main(["convert", *map(str, argv)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("blip3o-jax: ")
    return error


@pytest.fixture
def published(checkpoint, tmp_path):
    """A checkpoint of mixed dtypes, with tensors that are not needed, and files beside it."""
    folder = shutil.copytree(checkpoint, tmp_path / "published")
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        name: value.astype(ml_dtypes.bfloat16) if name.startswith("model.layers") else value
        for name, value in tensors.items()
    }
    tensors |= {**IGNORED, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text())) + "  \n"
    )
    (folder / "generation_config.json").write_bytes(b'{"top_k": 20}\r\n')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("as you like")
    (folder / "README.md").write_text("of no use")
    return folder


def same(folder, other, without=()):
    """Asserts that two checkpoints hold the same tensors, bit for bit."""
    one, two = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()}
        for d in (folder, other)
    )
    assert set(one) - set(without) == set(two)
    assert all(
        (one[k].dtype, one[k].shape, one[k].tobytes())
        == (two[k].dtype, two[k].shape, two[k].tobytes())
        for k in two
    )


def test_there_and_back_is_bitwise(published, tmp_path, capsys):
    report = convert(capsys, "to-jax", published, tmp_path / "jax", "--mesh", "fsdp=2")
    names = {"config.json", "generation_config.json", "tokenizer.json", "LICENSE"}
    assert {file.name for file in (tmp_path / "jax").iterdir()} == {
        *names,
        "params",
        "hashes.json",
        "convert.json",
    }
    assert set(report["ignored"]) == set(IGNORED)
    assert all(report["ignored"].values())
    kept = json.loads((tmp_path / "jax" / "convert.json").read_text())
    assert (
        kept["files"][str(published / "model.safetensors")]["sha256"]
        == hashlib.sha256((published / "model.safetensors").read_bytes()).hexdigest()
    )
    assert kept["tensors"]["used"] + len(IGNORED) == len(load_file(published / "model.safetensors"))
    assert kept["parameters"] == sum(part["parameters"] for part in kept["parts"].values())
    back = convert(
        capsys, "to-torch", tmp_path / "jax", tmp_path / "back", "--max-shard-bytes", "30000"
    )
    assert set(back["ignored_on_the_way_in"]) == set(IGNORED)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    same(published, tmp_path / "back", without=IGNORED)
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (published / name).read_bytes()
    assert (
        json.loads((tmp_path / "back" / "convert.json").read_text())["origin"]["files"]
        == kept["files"]
    )


def test_plain_orbax_restores_it_onto_eight_devices(published, tmp_path, capsys):
    convert(capsys, "to-jax", published, tmp_path / "jax", "--mesh", "fsdp=4")
    cfg, params = load(published)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    placed = shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        placed,
    )
    with ocp.StandardCheckpointer() as reader:
        restored = reader.restore(tmp_path / "jax" / "params", abstract)
    ours = load(tmp_path / "jax", "float32", lambda tree: shardings(tree, mesh))
    assert ours[0] == cfg
    for tree in (restored, ours[1]):
        for path, leaf in flatten(tree).items():
            assert leaf.sharding == flatten(placed)[path]
            np.testing.assert_array_equal(np.asarray(leaf), flatten(params)[path])


def test_one_part_starts_a_training_run(published, tmp_path, capsys):
    convert(capsys, "to-jax", published, tmp_path / "jax")
    part, params = (
        load_part(str(tmp_path / "jax"), "qwen3"),
        load(published, parts=("qwen3",))[1]["qwen3"],
    )
    assert all(np.array_equal(leaf, flatten(params)[path]) for path, leaf in flatten(part).items())


def test_dtypes_are_changed_when_asked(published, tmp_path, capsys):
    convert(capsys, "to-jax", published, tmp_path / "jax", "--dtype", "bfloat16")
    report = convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    assert set(report["dtypes"]) == {"bfloat16"}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    before, after = (
        load_file(published / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert all(
        np.array_equal(value, before[name].astype(ml_dtypes.bfloat16))
        for name, value in after.items()
    )
    report = convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "wide", "--dtype", "float32")
    assert set(report["dtypes"]) == {"float32"}


def test_an_untied_head_stays(published, tmp_path, capsys):
    tensors = load_file(published / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, published / "model.safetensors")
    convert(capsys, "to-jax", published, tmp_path / "jax")
    cfg, params = load(tmp_path / "jax")
    assert not cfg.qwen3.tie_word_embeddings
    np.testing.assert_array_equal(params["qwen3"]["lm_head"]["kernel"], tensors["lm_head.weight"].T)
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    same(published, tmp_path / "back", without=set(IGNORED) - {"lm_head.weight"})


def test_an_editing_checkpoint_keeps_its_connector(published, tmp_path, capsys):
    fields = json.loads((published / "config.json").read_text())
    flags = {
        "use_und_image_vae": True,
        "use_und_image_vae_as_noise": True,
        "only_use_und_image_vae_as_noise": False,
    }
    (published / "config.json").write_text(
        json.dumps(fields | flags | {"use_tar_siglip_features": True})
    )
    assert "model.tar_siglip_features_connector.0.bias' is missing, and 9 others" in refused(
        capsys, "to-jax", published, tmp_path / "jax"
    )
    tensors, rng = load_file(published / "model.safetensors"), np.random.default_rng(0)
    for name, fan_in, width in (
        ("und_image_vae_connector", 4, 28),
        ("tar_siglip_features_connector", 16, 24),
    ):
        shapes = {
            "0.weight": (width, fan_in),
            "0.bias": (width,),
            "2.weight": (width, width),
            "2.bias": (width,),
            "3.weight": (width,),
        }
        tensors |= {
            f"model.{name}.{key}": rng.standard_normal(shape).astype(np.float32)
            for key, shape in shapes.items()
        }
    tensors["model.und_image_vae_as_noise_connector.0.weight"] = np.ones((4, 8, 1, 1), np.float32)
    save_file(tensors, published / "model.safetensors")
    report = convert(capsys, "to-jax", published, tmp_path / "jax")
    unused = {*IGNORED, "model.und_image_vae_as_noise_connector.0.weight"}
    assert set(report["ignored"]) == unused
    cfg, params = load(tmp_path / "jax")
    assert (
        cfg.use_und_image_vae,
        cfg.use_und_image_vae_as_noise,
        cfg.only_use_und_image_vae_as_noise,
    ) == (True, True, False)
    assert params["und_image_vae_connector"]["linear_1"]["kernel"].shape == (4, 28)
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    same(published, tmp_path / "back", without=unused)
    # The same tensors without the flags belong to nothing.
    (published / "config.json").write_text(json.dumps(fields))
    assert "is not part of the model" in refused(capsys, "to-jax", published, tmp_path / "again")


def test_a_training_run_comes_out(tmp_path, capsys):
    """Every weight of the embedded model, saved as a joint run does, against the embedded file
    itself."""
    run, workdir = TrainConfig(stage="joint"), tmp_path / "run"
    trained, frozen = split(load(ASSETS / "emoji_64")[1], run.trainable)
    manager = training_checkpoint.open_manager(workdir)
    counters = {"opt_state": {"count": jnp.int32(3)}, "guard": {"skipped": jnp.int32(0)}}
    training_checkpoint.save(
        manager, run, {"step": jnp.int32(3), "params": trained, **counters}, frozen, {}
    )
    manager.wait_until_finished()
    # the run's own, not a model's
    (workdir / "config.json").write_text(json.dumps({"stage": "joint"}))
    loaded = pipeline.load(workdir)
    assert (
        loaded.model.config
        == checkpoints.config_of(workdir)
        == checkpoints.config_of(ASSETS / "emoji_64")
    )
    jax.tree.map(np.testing.assert_array_equal, loaded.params, load(ASSETS / "emoji_64")[1])
    report = convert(capsys, "to-torch", workdir, tmp_path / "back", "--dtype", "float16")
    assert report["preset"] == "emoji_64"
    assert json.loads((tmp_path / "back" / "convert.json").read_text())["origin"] == {"step": 3}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (ASSETS / "emoji_64" / name).read_bytes()
    assert "is for JAX already" in refused(capsys, "to-jax", workdir, tmp_path / "jax")


def test_one_layer_is_held_at_a_time(tmp_path, capsys, cfg):
    """16 layers with matrices of a megabyte, so that a parameter has 16: numpy's memory at its
    peak, Python's own included."""
    qwen3 = {"num_hidden_layers": 16, "hidden_size": 128, "intermediate_size": 2048}
    cfg = replace(cfg, **{f"qwen3.{key}": value for key, value in qwen3.items()})
    shapes, rng = (
        torch_shapes(published_rules(cfg), Blip3o(cfg).abstract()),
        np.random.default_rng(0),
    )
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    (tmp_path / "wide").mkdir()
    save_file(tensors, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config_to_json(cfg)))
    del tensors
    # the first time Python imports and traces
    convert(capsys, "to-jax", tmp_path / "wide", tmp_path / "jax")
    for argv in (
        ("to-jax", tmp_path / "wide", tmp_path / "jax", "--overwrite"),
        ("to-torch", tmp_path / "jax", tmp_path / "back"),
    ):
        tracemalloc.start()
        convert(capsys, *argv)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6
    same(tmp_path / "wide", tmp_path / "back")


def set_tensors(**changes):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors") | changes
        save_file(
            {name: value for name, value in tensors.items() if value is not None},
            folder / "model.safetensors",
        )

    return damage


def set_config(**changes):
    def damage(folder):
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | changes)
        )

    return damage


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def no_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}})
    )


def twice(folder):
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "hidden_size": 24}')


NORM = "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors is damaged or cut short"),
        (
            no_shard,
            "model.safetensors.index.json places 'model.norm.weight' in "
            "model-1.safetensors, which is missing",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "needs either model.safetensors or model.safetensors.index.json",
        ),
        (twice, "the key 'hidden_size' is there twice"),
        (set_tensors(**{NORM: None}), f"tensor '{NORM}' is missing"),
        (
            set_tensors(**{NORM: np.ones(9, np.float32)}),
            f"tensor '{NORM}' has shape (9,), and config.json implies (8,)",
        ),
        (
            set_tensors(**{NORM: np.full(8, np.nan, ml_dtypes.bfloat16)}),
            f"tensor '{NORM}' holds NaN",
        ),
        (set_tensors(**{NORM: np.ones(8, np.float32)}), f"tensor '{NORM}' is float32 and"),
        (set_tensors(**{NORM: np.ones(8, np.int32)}), f"tensor '{NORM}' has dtype I32"),
        (
            set_tensors(**{"model.stray": np.ones(8, np.float32)}),
            "tensor 'model.stray' is not part of the model",
        ),
        (set_config(hidden_size=32), "and config.json implies"),
        (set_config(model_type="qwen2_5_vl"), "BLIP3o of 4B or 8B on Qwen2.5-VL"),
        (set_config(model_type="llava_qwen", n_query=64), "BLIP3o of 4B or 8B on Qwen2.5-VL"),
    ],
)
def test_bad_checkpoints_leave_nothing(published, tmp_path, capsys, damage, message):
    damage(published)
    before = sorted(tmp_path.iterdir())
    sentence = refused(capsys, "to-jax", published, tmp_path / "jax")
    assert message in sentence
    assert str(published) in sentence
    assert sorted(tmp_path.iterdir()) == before


def test_a_result_is_replaced_only_when_known(published, tmp_path, capsys):
    target = tmp_path / "jax"
    target.mkdir()
    (target / "mine").write_text("x")
    assert "exists" in refused(capsys, "to-jax", published, target)
    assert "holds other files (no convert.json)" in refused(
        capsys, "to-jax", published, target, "--overwrite"
    )
    assert (target / "mine").read_text() == "x"
    (target / "mine").unlink()
    convert(capsys, "to-jax", published, target)
    convert(capsys, "to-jax", published, target, "--overwrite")
    assert "is for JAX already" in refused(capsys, "to-jax", target, tmp_path / "other")
    assert "lie in each other" in refused(capsys, "to-jax", published, published / "inside")
    assert "lie in each other" in refused(capsys, "to-torch", target, target, "--overwrite")
    assert "lie in each other" in refused(capsys, "to-torch", target, tmp_path, "--overwrite")


def test_a_full_disk_leaves_nothing(published, tmp_path, capsys, monkeypatch):
    convert(capsys, "to-jax", published, tmp_path / "jax")
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(orbax_io, "write", full)
    assert "other cannot be written: No space left on device" in refused(
        capsys, "to-jax", published, tmp_path / "other"
    )
    monkeypatch.setattr(safetensors_io, "_write", full)
    assert "other cannot be written: No space left on device" in refused(
        capsys, "to-torch", tmp_path / "jax", tmp_path / "other"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    for source in (("to-torch", tmp_path / "jax"), ("to-jax", published)):
        assert "its disk has 1e-08 GB free" in refused(capsys, *source, tmp_path / "other")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: shutil.rmtree(folder / "params" / "qwen3.norm.scale"),
            "parameter qwen3/norm/scale is missing",
        ),
        (
            lambda folder: (folder / "params" / "qwen3.norm.scale" / "0").unlink(),
            "qwen3.norm.scale lacks values",
        ),
        (set_config(hidden_size=32), "has shape"),
        (lambda folder: (folder / "config.json").unlink(), "holds neither config.json"),
    ],
)
def test_damaged_conversions_are_named(published, tmp_path, capsys, damage, message):
    convert(capsys, "to-jax", published, tmp_path / "jax")
    damage(tmp_path / "jax")
    assert message in refused(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    assert not (tmp_path / "back").exists()
