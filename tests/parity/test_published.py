"""The published layout against PyTorch's own classes: they are built from our config.json, and they
write what we read.

Full-size modules live on torch's meta device, so nothing is allocated.
"""

import json

import jax
import numpy as np
import pytest
from converting import TA_TOK, convert
from tiny import PUBLISHED

from blip3o_jax.convert.config_json import config_from_json, config_to_json
from blip3o_jax.convert.published import published_rules, save_published
from blip3o_jax.convert.rules import to_torch, torch_shapes
from blip3o_jax.convert.safetensors_io import open_tensors
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset

pytestmark = pytest.mark.parity
NAMES = ["blip3o_next_3b", "blip3o_next_0_6b", "emoji_64"]


def qwen3(fields):
    transformers = pytest.importorskip("transformers")
    # Built from the file's own keys: a field under a wrong name would fall back to a default of
    # another size.
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config.from_dict({**fields, "model_type": "qwen3"})
    )


def sana(fields):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.SanaTransformer2DModel.from_config(fields["sana"])


def dc_ae(fields):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderDC.from_config(fields["sana_vae"])


def siglip(fields):
    transformers = pytest.importorskip("transformers")
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig.from_dict(fields["vision_tower"]["encoder"])
    )


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(config.json, torch shapes by name) of a preset."""
    cfg = preset(request.param)
    return json.loads(json.dumps(config_to_json(cfg))), torch_shapes(
        published_rules(cfg), Blip3o(cfg).abstract()
    )


@pytest.mark.parametrize(
    ("build", "prefix", "theirs_only"),
    [
        (qwen3, "", ("lm_head.",)),
        (sana, "model.sana.", ("pos_embed",)),
        (dc_ae, "model.sana_vae.", ()),
        (
            siglip,
            "model.vision_tower.vision_tower.encoder.",
            ("head.", "post_layernorm.", "encoder.layers."),
        ),
    ],
)
def test_modules_built_from_our_config_have_our_names_and_shapes(case, build, prefix, theirs_only):
    torch = pytest.importorskip("torch")
    fields, shapes = case
    with torch.device("meta"):
        module = build(fields)
    theirs = {
        name.removeprefix("vision_model."): tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
    }
    others = ("model.sana", "model.vision_tower", "model.diffusion_connector")
    ours = {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and (prefix or not name.startswith(others))
    }
    assert len(ours) > 20
    assert {name: theirs.get(name) for name in ours} == ours
    # TA-Tok needs neither the last layers nor the head of SigLIP; a tied head is the embedding.
    assert all(name.startswith(theirs_only) for name in theirs.keys() - ours.keys())


def test_transformers_own_config_is_read(case):
    """As its trainer writes it, in this version of transformers, with the ids that BLIP3o adds."""
    transformers = pytest.importorskip("transformers")
    fields, shapes = case
    ids = {
        key: value
        for key, value in fields.items()
        if key.startswith(("image_", "scale_", "num_image", "num_scale"))
    }
    nested = {key: fields[key] for key in ("sana", "sana_vae", "vision_tower", "blip3o_jax")}
    written = transformers.Qwen3Config.from_dict({**fields, "model_type": "qwen3"}).to_json_string()
    assert config_from_json({**json.loads(written), **ids, **nested}, shapes) == preset(
        fields["blip3o_jax"]["name"]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_and_we_read_each_other(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    cfg = preset("emoji_64")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), Blip3o(cfg).abstract()
    )
    save_published(tmp_path / "ours", cfg, params, dtype=dtype)
    read = load_file(tmp_path / "ours" / "model.safetensors")
    for name, tensor in to_torch(published_rules(cfg), params).items():
        assert torch.equal(read[name], torch.from_numpy(tensor).to(getattr(torch, dtype))), name
    save_file(read, tmp_path / "model.safetensors", metadata={"format": "pt"})
    back = open_tensors(tmp_path)
    assert set(back) == set(read)
    assert all(
        np.array_equal(back[name].read(np.float32), tensor.float().numpy())
        for name, tensor in read.items()
    )


def test_what_comes_back_loads_strictly(tmp_path, capsys):
    """All that PyTorch's own modules hold, the heads and layers that nothing calls included."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from blip3o_jax.reference import modules

    torch.manual_seed(0)
    ref = modules.build(PUBLISHED)
    parts = {
        "": ref.ar,
        "model.diffusion_connector.": ref.connector,
        "model.sana.": ref.sana,
        "model.sana_vae.": ref.vae,
        TA_TOK: ref.ta_tok,
    }
    state = {p + name: x for p, m in parts.items() for name, x in m.state_dict().items()}
    state = {name: x.clone().contiguous() for name, x in state.items()}
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    fields = json.dumps(config_to_json(PUBLISHED))
    (tmp_path / "source" / "config.json").write_text(fields)
    report = convert(capsys, "to-jax", tmp_path / "source", tmp_path / "jax")
    assert report["tensors"]["kept"] > 20
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    for prefix, module in parts.items():
        names = {name: x for name, x in back.items() if name.startswith(prefix)}
        if not prefix:
            others = tuple(key for key in parts if key)
            names = {name: x for name, x in back.items() if not name.startswith(others)}
        module.load_state_dict({name.removeprefix(prefix): x for name, x in names.items()})
