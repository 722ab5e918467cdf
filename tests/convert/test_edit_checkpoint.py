"""An editing checkpoint on the way to JAX and back: every flag, connector and channel is there, and
`convert verify` sees what is not."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.verify.compare import compare_checkpoints

CONNECTORS = ("model.und_image_vae_connector.", "model.tar_siglip_features_connector.")
FLAGS = {"use_und_image_vae": True, "use_tar_siglip_features": True}
NOISE = {"use_und_image_vae_as_noise": True, "only_use_und_image_vae_as_noise": True}
VARIANTS = {
    "noise": FLAGS | NOISE | {"max_sources": 1},
    "tokens": FLAGS | {"max_sources": 3},
    "channels": FLAGS
    | {"use_und_image_vae_as_channels": True, "max_sources": 1, "sana.in_channels": 8},
}


def convert(capsys, *argv):
    """(exit code, report) of a conversion."""
    code = main(["convert", *map(str, argv)])
    return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_editing_checkpoint_goes_to_jax_and_back(cfg, variant, tmp_path, capsys):
    cfg = replace(cfg, **VARIANTS[variant])
    random_checkpoint(tmp_path / "published", cfg)
    assert convert(capsys, "to-jax", tmp_path / "published", tmp_path / "jax")[0] == 0
    assert convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")[0] == 0
    # The config, but for the name, and every tensor.
    for folder in ("published", "jax", "back"):
        assert replace(checkpoints.config_of(tmp_path / folder), name=cfg.name) == cfg
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("published", "back")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    for prefix in CONNECTORS:
        assert sum(name.startswith(prefix) for name in before) == 5
    width = cfg.sana.in_channels
    assert before["model.sana.patch_embed.proj.weight"].shape == (32, width, 1, 1)
    # The files say the flags as the PyTorch code does, and our own apart.
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    flags = {name: fields[name] for name in FLAGS | NOISE if name in fields}
    assert flags == {name: True for name in FLAGS | NOISE if getattr(cfg, name)}
    explicit = {"tokens": 3}.get(variant)  # of the others it follows from the flags
    assert fields["blip3o_jax"].get("max_sources") == explicit


def test_verify_sees_one_changed_value_of_a_connector(cfg, tmp_path, capsys):
    cfg = replace(cfg, **VARIANTS["channels"])
    random_checkpoint(tmp_path / "published", cfg)
    convert(capsys, "to-jax", tmp_path / "published", tmp_path / "jax")
    code, report = convert(capsys, "verify", tmp_path / "published", tmp_path / "jax")
    assert (code, report["config_differs_in"], report["unequal"]) == (0, [], [])
    assert (
        report["bit_identical"]
        == report["tensors"]
        == len(load_file(tmp_path / "published" / "model.safetensors"))
    )
    assert all(stage["agree"] for stage in report["stages"].values())
    converted = checkpoints.open(tmp_path / "jax")
    for name in (f"{CONNECTORS[0]}0.weight", "model.sana.patch_embed.proj.weight"):
        tensors = load_file(tmp_path / "published" / "model.safetensors")
        tensors[name][-1, -1] += 1e-3
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_bytes(
            (tmp_path / "published" / "config.json").read_bytes()
        )
        rows = compare_checkpoints(checkpoints.open(tmp_path / name), converted)
        assert [tensor for tensor, row in rows.items() if not row["agree"]] == [name]
