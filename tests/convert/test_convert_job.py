"""`convert to-jax` and `to-torch` on miniatures: what comes back is what went in."""

import hashlib
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from converting import IGNORED, TA_TOK, convert, refused, same
from reading import load
from safetensors.numpy import load_file, save_file

from blip3o_jax import checkpoints, pipeline, training_checkpoint
from blip3o_jax.checkpoints import load_part
from blip3o_jax.config import replace
from blip3o_jax.convert import hashes
from blip3o_jax.convert.config_json import config_to_json
from blip3o_jax.convert.published import published_rules
from blip3o_jax.convert.rules import torch_shapes
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.resources import ASSETS
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.tree import flatten, split


def test_there_and_back_is_bitwise(published, tmp_path, capsys):
    report = convert(capsys, "to-jax", published, tmp_path / "jax", "--mesh", "fsdp=2")
    names = {"config.json", "generation_config.json", "tokenizer.json", "LICENSE"}
    assert {file.name for file in (tmp_path / "jax").iterdir()} == {
        *names,
        "params",
        "unused",
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
    same(published, tmp_path / "back")
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
    assert (set(report["dtypes"]), report["restored"]) == ({"bfloat16"}, len(IGNORED))
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
    same(published, tmp_path / "back")
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "less", "--drop-unused")
    same(published, tmp_path / "less", without=set(IGNORED) - {"lm_head.weight"})


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
    assert "model.tar_siglip_features_connector.0.bias' is missing, and 9 more" in refused(
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
    same(published, tmp_path / "back")
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "less", "--drop-unused")
    same(published, tmp_path / "less", without=unused)
    # The same tensors without the flags belong to nothing.
    (published / "config.json").write_text(json.dumps(fields))
    assert "is not part of the model" in refused(capsys, "to-jax", published, tmp_path / "again")


def test_a_training_run_comes_out(tmp_path, capsys, caplog):
    """Every weight of the embedded model, saved as its last stage does, against the embedded file
    itself."""
    run, workdir = TrainConfig("distill", model={"sana.few_steps": 4}), tmp_path / "run"
    trained, frozen = split(load(ASSETS / "emoji_64")[1], run.trainable)
    manager = training_checkpoint.open_manager(workdir)
    counters = {"opt_state": {"count": jnp.int32(3)}, "guard": {"skipped": jnp.int32(0)}}
    training_checkpoint.save(
        manager, run, {"step": jnp.int32(3), "params": trained, **counters}, frozen, {}
    )
    manager.wait_until_finished()
    # the run's own, not a model's
    (workdir / "config.json").write_text(json.dumps({"stage": "distill"}))
    loaded = pipeline.load(workdir)
    assert (
        loaded.model.config
        == checkpoints.config_of(workdir)
        == checkpoints.config_of(ASSETS / "emoji_64")
    )
    jax.tree.map(np.testing.assert_array_equal, loaded.params, load(ASSETS / "emoji_64")[1])
    report = convert(capsys, "to-torch", workdir, tmp_path / "back", "--dtype", "float16")
    assert (report["preset"], report["restored"]) == ("emoji_64", 0)
    assert json.loads((tmp_path / "back" / "convert.json").read_text())["origin"] == {"step": 3}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (ASSETS / "emoji_64" / name).read_bytes()
    assert "--unused takes them from a converted checkpoint" in caplog.text
    assert "is for JAX already" in refused(capsys, "to-jax", workdir, tmp_path / "jax")
    # With what a converted checkpoint keeps for it; the head is that of the trained embedding.
    keeper, stray = tmp_path / "keeper", {f"{TA_TOK}encoder.head.probe": np.arange(3)}
    (keeper / "params").mkdir(parents=True)
    (keeper / "unused").mkdir()
    (keeper / "params" / "_METADATA").write_text("{}")
    fields = json.loads((ASSETS / "emoji_64" / "config.json").read_text())
    more = {"mm_vision_tower": "ta_tok", "diffusion_name_or_path": "x/sana", "rope_parameters": {}}
    of_edits = {"use_und_image_vae": True, "dtype": "float32", "vocab_size": 1000}
    (keeper / "config.json").write_text(json.dumps(fields | more | of_edits))
    small = {"LICENSE": "theirs", "chat_template.jinja": "{{ x }}", "tokenizer.json": "{}"}
    for name, text in small.items():
        (keeper / name).write_text(text)
    save_file(stray, keeper / "unused" / "model.safetensors")
    origin = {"tensors": {"kept": 1}, "repeated": {"lm_head.weight": "bfloat16"}}
    (keeper / "convert.json").write_text(json.dumps(origin))
    convert(capsys, "to-torch", workdir, tmp_path / "whole", "--unused", keeper)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    embedding = load_file(tmp_path / "back" / "model.safetensors")["model.embed_tokens.weight"]
    # No coarser than the embedding that it repeats, whatever the source's was.
    head = whole.pop("lm_head.weight")
    np.testing.assert_array_equal(head.astype("f4"), embedding.astype("f4"))
    np.testing.assert_array_equal(whole.pop(next(iter(stray))), [0, 1, 2])
    assert set(whole) == set(load_file(tmp_path / "back" / "model.safetensors"))
    # Its small files and what else its config.json says, around the run's own tokenizer and model.
    texts = {name: (tmp_path / "whole" / name).read_text() for name in (*small, "config.json")}
    own = (ASSETS / "emoji_64" / "tokenizer.json").read_text()
    assert {name: texts[name] for name in small} == {**small, "tokenizer.json": own}
    del more["rope_parameters"]
    assert json.loads(texts["config.json"]) == fields | more | {"torch_dtype": "float32"}
    assert checkpoints.config_of(tmp_path / "whole") == loaded.model.config
    # Damage to it is found also where no sample looks.
    file = keeper / "unused" / "model.safetensors"
    save_file({next(iter(stray)): np.arange(1 << 15)}, file)
    hashes.record(file.parent, [file])
    data = bytearray(file.read_bytes())
    data[len(data) // 14] ^= 1
    file.write_bytes(data)
    assert f"{file} is not what hashes.json" in refused(
        capsys, "to-torch", workdir, tmp_path / "damaged", "--unused", keeper
    )


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


def test_a_source_without_a_tokenizer_is_told(published, tmp_path, capsys, caplog):
    convert(capsys, "to-jax", published, tmp_path / "whole")
    assert "tokenizer.json" not in caplog.text
    (published / "tokenizer.json").unlink()
    convert(capsys, "to-jax", published, tmp_path / "jax")
    assert f"no prompt is read; copy one into {tmp_path / 'jax'}." in caplog.text
    assert not (tmp_path / "jax" / "tokenizer.json").exists()
