"""What config.json leaves out comes from the files beside it, and a default only where it can be
right."""

import json
import shutil

import numpy as np
import pytest
from converting import ARGS, TA_TOK, argv, convert, group, refused, same, tiny_tokenizer
from pickles import write_state
from safetensors.numpy import load_file

from blip3o_jax import checkpoints
from blip3o_jax.config import DcAeConfig, SanaConfig, replace
from blip3o_jax.convert.folders import Options
from blip3o_jax.convert.published import save_published
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.convert.upstream import _ta_tok_config, open_tokenizer
from blip3o_jax.errors import InputError


def edit(folder, *removed, **changes):
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: x for key, x in fields.items() if key not in removed}))


@pytest.fixture
def without_ids(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "without")
    edit(folder, "pad_token_id", eos_token_id=None)
    return folder


def ids(folder):
    vocab = checkpoints.config_of(folder).vocab
    return vocab.pad_token_id, vocab.eos_token_id


def test_a_default_outside_the_vocabulary_is_refused(without_ids, tmp_path, capsys):
    sentence = refused(capsys, "to-jax", without_ids, tmp_path / "jax")
    assert "pad_token_id 151643 is the default, as no file says it, and outside the" in sentence
    assert "vocabulary of 43 rows" in sentence
    edit(without_ids, pad_token_id=3)
    assert "eos_token_id 151645 is the default" in refused(
        capsys, "to-jax", without_ids, tmp_path / "jax"
    )


def test_ids_come_from_generation_first(without_ids, tmp_path, capsys):
    generation = {"pad_token_id": 7, "eos_token_id": [9, 7]}
    (without_ids / "generation_config.json").write_text(json.dumps(generation))
    tiny_tokenizer().save(str(without_ids / "tokenizer.json"))
    assert ids(without_ids) == (7, 9)
    # The config itself wins, and may have several ends too.
    edit(without_ids, eos_token_id=[5, 9])
    assert ids(without_ids) == (7, 5)
    edit(without_ids, eos_token_id=None)
    convert(capsys, "to-jax", without_ids, tmp_path / "jax")
    assert ids(tmp_path / "jax") == (7, 9)
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    same(without_ids, tmp_path / "back")
    assert ids(tmp_path / "back") == (7, 9)


def test_ids_come_from_the_tokenizer_next(without_ids):
    tiny_tokenizer().save(str(without_ids / "tokenizer.json"))
    assert ids(without_ids) == (3, 5)  # the tokens of these names
    config = {"pad_token": "<|image_pad|>", "eos_token": {"content": "<|im_start|>"}}
    (without_ids / "tokenizer_config.json").write_text(json.dumps(config))
    assert ids(without_ids) == (9, 6)
    (without_ids / "generation_config.json").write_text('{"eos_token_id": 8}')
    assert ids(without_ids) == (9, 8)
    # Also without a tokenizer.json.
    (without_ids / "tokenizer.json").unlink()
    config["added_tokens_decoder"] = {"4": {"content": "<|image_pad|>", "special": True}}
    (without_ids / "tokenizer_config.json").write_text(json.dumps(config))
    assert ids(without_ids) == (4, 8)


SMALLER = {"sana.num_layers": 1, "sana.mlp_ratio": 2.0, "dc_ae.scaling_factor": 0.5}


@pytest.mark.parametrize("where", ["", ".."])
def test_sizes_are_those_of_the_diffusion_folder(cfg, tmp_path, capsys, where):
    cfg = replace(cfg, **SMALLER)
    folder, name = tmp_path / "tuned", "Efficient-Large-Model/SANA1.5_tiny"
    save_published(folder, cfg, random_params(cfg))
    fields = json.loads((folder / "config.json").read_text())
    repository = folder / where / "SANA1.5_tiny"
    for key, inner, kind in (
        ("sana", "transformer", "SanaTransformer2DModel"),
        ("sana_vae", "vae", "AutoencoderDC"),
    ):
        (repository / inner).mkdir(parents=True)
        own = json.dumps(fields[key] | {"_class_name": kind})
        (repository / inner / "config.json").write_text(own)
    edit(folder, "sana", "sana_vae", diffusion_name_or_path=name)
    assert checkpoints.config_of(folder) == cfg
    convert(capsys, "to-jax", folder, tmp_path / "elsewhere" / "jax")
    # The result is complete without the folder.
    shutil.rmtree(repository)
    assert replace(checkpoints.config_of(tmp_path / "elsewhere" / "jax"), name=cfg.name) == cfg
    assert refused(capsys, "to-jax", folder, tmp_path / "other")


def test_a_folder_elsewhere_is_not_looked_at(cfg, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "inner" / "tuned")
    names = ("/etc", "..", "../..", "a/..", "", 3, None, str(tmp_path / "far"))
    for name in names:
        edit(folder, diffusion_name_or_path=name)
        assert checkpoints.config_of(folder) == cfg
    # Where these paths would lead are networks of this size; none is taken for the published one.
    fields = json.loads((folder / "config.json").read_text())
    for place in (tmp_path / "inner", tmp_path / "far"):
        for key, inner in (("sana", "transformer"), ("sana_vae", "vae")):
            (place / inner).mkdir(parents=True)
            (place / inner / "config.json").write_text(json.dumps(fields[key]))
    edit(folder, "sana", "sana_vae")
    for name in names:
        edit(folder, diffusion_name_or_path=name)
        config = checkpoints.config_of(folder)
        assert (config.sana, config.dc_ae) == (SanaConfig(), DcAeConfig())


# SigLIP2 base: its published config says little more than its image size.
BASE = {"vision_config": {"model_type": "siglip_vision_model", "image_size": 13, "patch_size": 4}}


@pytest.fixture
def teacher(parts, tensors):
    """(ta_tok.pth of another teacher, where its config.json belongs)."""
    args = {**ARGS, "teacher": "google/siglip2-base-patch4-13"}
    last = {"encoder.encoder.layers.2.mlp.fc1.bias": np.ones(20, np.float32)}
    write_state(parts["--tokenizer"], group(tensors, TA_TOK) | last, args)
    folder = parts["--tokenizer"].parent / "siglip2-base-patch4-13"
    folder.mkdir()
    return parts["--tokenizer"], folder / "config.json"


def test_another_teacher_has_sizes_of_its_own(teacher):
    file, config = teacher
    with pytest.raises(InputError) as error:
        open_tokenizer(str(file), Options())
    assert "its encoder is 'google/siglip2-base-patch4-13', and its sizes are not" in str(
        error.value
    )
    assert str(file.parent) in str(error.value)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3}
    inner = BASE["vision_config"] | sizes
    more = {"num_attention_heads": 4, "layer_norm_eps": 1e-5}
    config.write_text(json.dumps({"vision_config": inner | more, "text_config": {}}))
    encoder = open_tokenizer(str(file), Options()).config.encoder
    assert (encoder.num_attention_heads, encoder.layer_norm_eps, encoder.image_size) == (
        4,
        1e-5,
        13,
    )
    # At the top level, and without the heads, which are its class's twelve then.
    config.write_text(json.dumps(inner | {"num_attention_heads": 8}))
    assert open_tokenizer(str(file), Options()).config.encoder.num_attention_heads == 8
    config.write_text(json.dumps(inner))
    with pytest.raises(InputError, match="width 16 does not divide by 12 heads"):
        open_tokenizer(str(file), Options())
    for change, message in (
        (
            {"hidden_size": 24},
            "its tensors have hidden_size 16, and its encoder's config.json says 24",
        ),
        (
            {"num_hidden_layers": 2},
            "have num_hidden_layers 3, and its encoder's config.json says 2",
        ),
        ({"hidden_act": "gelu"}, "it has hidden_act = 'gelu'; supported is 'gelu_pytorch_tanh'"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4', which makes no sense as int"),
    ):
        config.write_text(json.dumps(inner | more | change))
        with pytest.raises(InputError) as error:
            open_tokenizer(str(file), Options())
        assert message in str(error.value)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1152, 12), (1536, 12), (16, 1)])
def test_the_decoder_has_the_heads_of_its_class(tmp_path, width, heads):
    shapes = {
        "encoder.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "encoder.encoder.layers.26.mlp.fc1.weight": (20, width),
        "encoder.encoder.layers.0.mlp.fc1.weight": (20, width),
        "bottleneck.regularizer.embedding.weight": (16, 12),
        "decoder.encoder.layers.2.mlp.fc1.weight": (3072, width),
        "decoder.encoder.layers.0.mlp.fc1.weight": (3072, width),
        "decoder.embeddings.position_embedding.weight": (256, width),
    }
    sizes = {"hidden_size": width, "intermediate_size": 20, "num_hidden_layers": 27}
    (tmp_path / "other").mkdir()
    own = sizes | {"num_attention_heads": 16, "patch_size": 14}
    (tmp_path / "other" / "config.json").write_text(json.dumps(own))
    cfg = _ta_tok_config({"ckpt_path": "x/other"}, shapes, tmp_path)
    assert (cfg.decoder_num_attention_heads, cfg.encoder.num_attention_heads) == (heads, 16)
    if width == 1152:
        assert _ta_tok_config({}, shapes, tmp_path).encoder.num_attention_heads == 16


def test_a_model_with_another_teacher(teacher, parts, tmp_path, capsys):
    _, config = teacher
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3}
    config.write_text(json.dumps(BASE["vision_config"] | sizes | {"num_attention_heads": 4}))
    convert(capsys, "to-jax", *argv(parts), "--new-vocabulary", "mean", tmp_path / "jax")
    encoder = checkpoints.config_of(tmp_path / "jax").ta_tok.encoder
    assert (encoder.num_attention_heads, encoder.image_size) == (4, 13)
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    name = "encoder.encoder.layers.0.self_attn.q_proj.weight"
    given = load_file(parts["--dit"] / "vae" / "diffusion_pytorch_model.safetensors")
    assert back[TA_TOK + name].shape == (16, 16)
    assert (
        back["model.sana_vae.decoder.norm_out.bias"].tobytes()
        == given["decoder.norm_out.bias"].tobytes()
    )
