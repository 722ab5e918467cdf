"""Writing a checkpoint and reading it back; everything that a reader must refuse."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reading import load
from safetensors.numpy import load_file, save_file

from blip3o_jax.config import replace
from blip3o_jax.convert.published import ignored_tensors, open_published, save_published
from blip3o_jax.errors import InputError
from blip3o_jax.tree import flatten

TA_TOK = "model.vision_tower.vision_tower."
EMBEDDING = "model.embed_tokens.weight"


def assert_same(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert set(actual) == set(expected)
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype, path
        assert np.asarray(actual[path]).tobytes() == leaf.tobytes(), path


def as_dtype(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@pytest.fixture
def copied(checkpoint, tmp_path):
    others = shutil.ignore_patterns("hashes.json")  # as from the Hub, so that tests can change it
    return shutil.copytree(checkpoint, tmp_path / "copied", ignore=others)


def edit(folder, change):
    """Rewrites the weights after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip_is_bitwise(checkpoint, cfg, params):
    assert sorted(file.name for file in checkpoint.iterdir()) == [
        "config.json",
        "hashes.json",
        "model.safetensors",
    ]
    loaded, back = load(checkpoint)
    assert loaded == cfg
    assert_same(back, params)


def test_torch_names_and_axes(checkpoint, params):
    """One tensor of each part, against the parameter it must be."""
    tensors = load_file(checkpoint / "model.safetensors")
    q = params["qwen3"]["layers"]["self_attn"]["q_proj"]["kernel"]  # [L,D,N,H]
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.q_proj.weight"], q[1].reshape(24, 32).T
    )
    connector = params["diffusion_connector"]["linear_2"]["kernel"]
    np.testing.assert_array_equal(tensors["model.diffusion_connector.2.weight"], connector.T)
    np.testing.assert_array_equal(
        tensors["model.sana.caption_norm.weight"], params["sana"]["caption_norm"]["scale"]
    )
    conv = params["dc_ae"]["encoder"]["conv_in"]["kernel"]  # [k,k,C,C']
    np.testing.assert_array_equal(
        tensors["model.sana_vae.encoder.conv_in.weight"], conv.transpose(3, 2, 0, 1)
    )
    codes = params["ta_tok"]["bottleneck"]["regularizer"]["embedding"]
    np.testing.assert_array_equal(
        tensors[f"{TA_TOK}bottleneck.regularizer.embedding.weight"], codes
    )
    assert "lm_head.weight" not in tensors


def test_untied_head_is_a_tensor_of_its_own(cfg, params, tmp_path):
    cfg = replace(cfg, **{"qwen3.tie_word_embeddings": False})
    head = np.random.default_rng(1).standard_normal((24, cfg.qwen3.vocab_size)).astype(np.float32)
    params = {**params, "qwen3": {**params["qwen3"], "lm_head": {"kernel": head}}}
    save_published(tmp_path / "untied", cfg, params)
    np.testing.assert_array_equal(
        load_file(tmp_path / "untied" / "model.safetensors")["lm_head.weight"], head.T
    )
    loaded, back = load(tmp_path / "untied")
    assert loaded == cfg
    assert_same(back, params)


def test_shards_dtype_and_tokenizer(cfg, params, tmp_path):
    tokenizer = tmp_path / "some.json"
    tokenizer.write_text('{"version": "1.0"}')
    folder = tmp_path / "deep" / "sharded"
    save_published(folder, cfg, params, tokenizer, dtype="bfloat16", max_shard_bytes=40_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[-1].name == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    assert max(file.stat().st_size for file in shards) < 40_000 + 10_000  # the header comes on top
    assert (folder / "tokenizer.json").read_text() == tokenizer.read_text()
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded, back = load(folder, jnp.bfloat16)
    assert loaded == cfg
    half = as_dtype(params, ml_dtypes.bfloat16)
    assert_same(back, half)
    assert_same(load(folder, "float32")[1], as_dtype(half, np.float32))
    assert not list(folder.parent.glob(".*"))


def test_leaves_are_placed_as_asked(checkpoint, params):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    seen = []

    def shardings(tree):
        seen.append(tree)
        return jax.tree.map(
            lambda leaf: cut if leaf.ndim > 1 and leaf.shape[1] % 8 == 0 else whole, tree
        )

    _, back = load(checkpoint, "float32", shardings)
    assert_same(back, params)
    q = back["qwen3"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q.sharding == cut
    assert q.addressable_shards[0].data.shape == (2, 3, 4, 8)
    assert back["qwen3"]["norm"]["scale"].sharding == whole
    _, again = load(checkpoint, "float32", shardings(seen[0]))
    assert again["qwen3"]["layers"]["self_attn"]["q_proj"]["kernel"].sharding == cut


def test_one_part_needs_no_other(copied, params):
    edit(
        copied,
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if name.startswith("model.sana.")
        ],
    )
    _, back = load(copied, parts=("dc_ae", "ta_tok"))
    assert_same(back, {part: params[part] for part in ("dc_ae", "ta_tok")})
    with pytest.raises(
        InputError, match=r"tensor 'model\.sana\.caption_norm\.weight' is missing, and \d+ more"
    ):
        load(copied)


def test_published_tensors_that_are_not_needed(copied, cfg, params):
    unused = {
        f"{TA_TOK}encoder.encoder.layers.2.layer_norm1.weight": np.ones(16, np.float32),
        f"{TA_TOK}encoder.head.probe": np.ones((1, 1, 16), np.float32),
        f"{TA_TOK}encoder.post_layernorm.bias": np.full(16, np.nan, np.float32),
        f"{TA_TOK}scale_layer.shift": np.zeros((1, 3, 1, 1), np.float32),
        "model.und_image_vae_as_noise_connector.0.weight": np.ones((32, 64, 1, 1), np.float32),
    }
    edit(copied, lambda tensors: tensors.update(unused))
    names = load_file(copied / "model.safetensors")
    assert set(ignored_tensors(cfg, names)) == set(unused)
    loaded, back = load(copied)
    assert loaded == cfg
    assert_same(back, params)


def test_names_of_transformers_5_are_accepted(copied, params):
    old, new = (
        f"{TA_TOK}decoder.vision_model.post_layernorm.weight",
        f"{TA_TOK}decoder.post_layernorm.weight",
    )
    edit(copied, lambda tensors: tensors.update({new: tensors.pop(old)}))
    assert_same(load(copied)[1], params)
    edit(copied, lambda tensors: tensors.update({old: tensors[new]}))
    with pytest.raises(InputError, match="is there twice, also as"):
        load(copied)


def test_repeated_head_is_dropped(copied, cfg, params):
    edit(copied, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING]}))
    loaded, back = load(copied)
    assert loaded == cfg
    assert_same(back, params)


def test_different_head_unties(copied, cfg, params):
    head = params["qwen3"]["embed_tokens"]["embedding"].copy()
    head[-1, -1] += 1
    edit(copied, lambda tensors: tensors.update({"lm_head.weight": head}))
    loaded, back = load(copied)
    assert loaded == replace(cfg, **{"qwen3.tie_word_embeddings": False})
    np.testing.assert_array_equal(back["qwen3"]["lm_head"]["kernel"], head.T)


def set_value(name, index, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return lambda folder: edit(folder, change)


def set_config(**changes):
    def change(folder):
        fields = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(fields))

    return change


NORM = "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (
            lambda folder: (folder / "config.json").write_text("{'a': 1}"),
            "config.json",
            "is not JSON",
        ),
        (
            lambda folder: (folder / "config.json").write_text(" " * 2**20 + "{}"),
            "config.json",
            "is larger than 1048576 bytes",
        ),
        (set_config(model_type="qwen2_5_vl"), "config.json", "4B or 8B on Qwen2.5-VL"),
        (set_config(num_key_value_heads=3), "config.json", "4 query heads do not divide by 3"),
        (set_config(hidden_size=32), "model.safetensors", "and config.json implies"),
        (set_config(num_hidden_layers=1), "model.safetensors", "tensor 'model.layers.1."),
        (
            set_config(num_hidden_layers=3),
            "",
            "tensor 'model.layers.2.input_layernorm.weight' is missing, and 10 more",
        ),
        (set_config(tie_word_embeddings=False), "", "tensor 'lm_head.weight' is missing."),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "",
            "needs either model.safetensors or",
        ),
        (
            lambda folder: edit(folder, lambda tensors: tensors.pop(NORM)),
            "",
            f"tensor '{NORM}' is missing",
        ),
        (
            lambda folder: edit(folder, lambda tensors: tensors.pop(EMBEDDING)),
            "config.json",
            f"no matrix {EMBEDDING}",
        ),
        (
            lambda folder: edit(
                folder, lambda tensors: tensors.update({NORM: np.ones((8, 1), np.float32)})
            ),
            "model.safetensors",
            f"tensor '{NORM}' has shape (8, 1), and config.json implies (8,)",
        ),
        (
            lambda folder: edit(
                folder, lambda tensors: tensors.update({"model.stray": np.ones(1, np.float32)})
            ),
            "model.safetensors",
            "tensor 'model.stray' is not part of the model",
        ),
        (
            lambda folder: edit(
                folder, lambda tensors: tensors.update({NORM: np.ones(8, np.int32)})
            ),
            "model.safetensors",
            f"tensor '{NORM}' has dtype I32",
        ),
        (set_value(NORM, 3, np.nan), "model.safetensors", f"tensor '{NORM}' holds NaN"),
        (
            set_value("model.sana.proj_out.weight", (1, 2), -np.inf),
            "model.safetensors",
            "tensor 'model.sana.proj_out.weight' holds NaN",
        ),
        (
            lambda folder: edit(
                folder,
                lambda tensors: tensors.update({"lm_head.weight": np.ones((2, 24), np.float32)}),
            ),
            "model.safetensors",
            "tensor 'lm_head.weight' has shape (2, 24)",
        ),
    ],
)
def test_bad_checkpoints_are_refused(copied, damage, file, message):
    damage(copied)
    with pytest.raises(InputError) as refusal:
        load(copied)
    assert str(refusal.value).startswith(str(copied / file))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_not_there_is_named(copied):
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match=r"copied holds neither config\.json"):
        load(copied)
    with pytest.raises(InputError, match=r"copied/config\.json cannot be read: No such file"):
        open_published(copied)
    shutil.rmtree(copied)
    with pytest.raises(InputError, match=r"No checkpoint '.*copied', neither a folder"):
        load(copied)
    with pytest.raises(InputError, match="copied is not a directory"):
        open_published(copied)


def test_existing_directory_is_kept(cfg, params, tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already; choose another name, or overwrite it"):
        save_published(folder, cfg, params)
    with pytest.raises(InputError, match="is not a checkpoint that could be overwritten"):
        save_published(folder, cfg, params, overwrite=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["kept", "notes.txt"]


def test_overwriting_leaves_nothing_of_the_old(copied, cfg, params):
    (copied / "tokenizer.json").write_text("{}")
    doubled = jax.tree.map(lambda leaf: leaf * 2, params)
    save_published(copied, cfg, doubled, overwrite=True)
    names = ["config.json", "hashes.json", "model.safetensors"]
    assert sorted(file.name for file in copied.iterdir()) == names
    assert_same(load(copied)[1], doubled)
    assert [file.name for file in copied.parent.iterdir()] == ["copied"]


def test_failed_write_leaves_the_old(copied, cfg, params):
    before = (copied / "model.safetensors").read_bytes()
    bad = {**params, "diffusion_connector": as_dtype(params["diffusion_connector"], np.float32)}
    bad["diffusion_connector"]["linear_2"]["bias"] = np.full(28, 1e5, np.float32)
    with pytest.raises(
        InputError, match=r"'model\.diffusion_connector\.2\.bias' holds NaN or infinity as float16"
    ):
        save_published(copied, cfg, bad, dtype="float16", overwrite=True)
    assert (copied / "model.safetensors").read_bytes() == before
    assert [file.name for file in copied.parent.iterdir()] == ["copied"]


def test_what_cannot_be_written_is_refused(cfg, params, checkpoint, tmp_path):
    with pytest.raises(InputError, match="float16, bfloat16, float32, not int8"):
        save_published(tmp_path / "x", cfg, params, dtype="int8")
    with pytest.raises(InputError, match=r"tokenizer file .*none\.json is missing"):
        save_published(tmp_path / "x", cfg, params, tmp_path / "none.json")
    sana = {name: leaf for name, leaf in params["sana"].items() if name != "caption_norm"}
    with pytest.raises(
        InputError,
        match=r"parameter sana/caption_norm/scale is missing, and .* of tiny implies \(32,\)",
    ):
        save_published(tmp_path / "x", cfg, {**params, "sana": sana})
    with pytest.raises(InputError, match="float16, bfloat16, float32, not int8"):
        load(checkpoint, np.int8)
    assert not list(tmp_path.iterdir())
