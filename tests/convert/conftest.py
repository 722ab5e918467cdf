"""The tiny published model with random weights, and its checkpoint on disk."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from converting import ARGS, EMBEDDING, IGNORED, TA_TOK, group, tiny_tokenizer
from pickles import write_state
from safetensors.numpy import load_file, save_file
from tiny import PUBLISHED

from blip3o_jax.convert.published import save_published
from blip3o_jax.models.blip3o import Blip3o


@pytest.fixture(scope="session")
def cfg():
    return PUBLISHED


@pytest.fixture(scope="session")
def params():
    """Drawn by numpy: compiling the modules' own initialisers would take longer than all tests
    together."""
    rng = np.random.default_rng(0)
    shapes = Blip3o(PUBLISHED).abstract()
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, params):
    """A float32 checkpoint in one file. Not to be changed: tests that damage one copy it first."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    save_published(folder, PUBLISHED, params)
    return folder


@pytest.fixture
def published(checkpoint, tmp_path):
    """A checkpoint of mixed dtypes, with tensors that are not needed, and files beside it."""
    others = shutil.ignore_patterns("hashes.json")  # as from the Hub, so that tests can change it
    folder = shutil.copytree(checkpoint, tmp_path / "published", ignore=others)
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


@pytest.fixture
def tensors(checkpoint):
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture
def parts(checkpoint, tensors, tmp_path):
    """{flag: path} of a plain Qwen3 of 30 rows in bfloat16, SANA's repository, and TA-Tok."""
    fields, root = json.loads((checkpoint / "config.json").read_text()), tmp_path / "parts"
    for folder in ("qwen3", "repository/transformer", "repository/vae", "repository/scheduler"):
        (root / folder).mkdir(parents=True)
    qwen3 = {
        name: value
        for name, value in tensors.items()
        if name.startswith(("model.embed", "model.layers", "model.norm"))
    }
    qwen3[EMBEDDING] = qwen3[EMBEDDING][:30]
    save_file(
        {name: value.astype(ml_dtypes.bfloat16) for name, value in qwen3.items()},
        root / "qwen3" / "model.safetensors",
    )
    own = ("sana", "sana_vae", "vision_tower", "blip3o_jax")
    plain = {
        key: value
        for key, value in fields.items()
        if key not in own and not key.startswith(("image_", "scale_", "num_image", "num_sc"))
    }
    (root / "qwen3" / "config.json").write_text(
        json.dumps(plain | {"model_type": "qwen3", "vocab_size": 30})
    )
    tiny_tokenizer().save(str(root / "qwen3" / "tokenizer.json"))
    (root / "qwen3" / "added_tokens.json").write_text("{}")
    (root / "qwen3" / "generation_config.json").write_text('{"top_k": 20}')
    (root / "qwen3" / "LICENSE").write_text("qwen's")
    (root / "repository" / "LICENSE.txt").write_text("sana's")
    for folder, key, prefix, name in (
        ("transformer", "sana", "model.sana.", "SanaTransformer2DModel"),
        ("vae", "sana_vae", "model.sana_vae.", "AutoencoderDC"),
    ):
        (root / "repository" / folder / "config.json").write_text(
            json.dumps(fields[key] | {"_class_name": name})
        )
        save_file(
            group(tensors, prefix),
            root / "repository" / folder / "diffusion_pytorch_model.safetensors",
        )
    unused = {
        "teacher.weight": np.zeros(2, np.float32),
        "scale_layer.scale": np.ones((1, 3, 1, 1), np.float32),
    }
    last = {
        f"encoder.encoder.layers.2.{name}": np.ones(1, np.float32)
        for name in ("layer_norm1.weight", "mlp.fc1.bias")
    }
    write_state(root / "ta_tok.pth", group(tensors, TA_TOK) | unused | last, ARGS)
    return {
        "--ar": root / "qwen3",
        "--dit": root / "repository",
        "--tokenizer": root / "ta_tok.pth",
    }
