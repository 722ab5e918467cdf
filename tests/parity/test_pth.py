"""Files of the real torch.save, read without torch; and the files that the parts' own classes
write, converted and back."""

import json

import numpy as np
import pytest

from blip3o_jax.cli import main
from blip3o_jax.convert.pth import open_ta_tok
from blip3o_jax.errors import InputError

pytestmark = pytest.mark.parity


def test_what_torch_saves_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)
    )
    tensors = module.state_dict()
    whole = torch.randn(6, 7)
    tensors |= {
        "half": torch.randn(3).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }
    tensors |= {
        "a part": whole[2:4],
        "the whole": whole,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    args = {
        "input_size": 384,
        "bottleneck": {
            "args": {
                "bottleneck_dim": 16,
                "regularizer": {"args": {"stochastic_temperature": 0.03}},
            }
        },
    }
    torch.save({"model": {"args": args, "sd": tensors}, "epoch": 3}, tmp_path / "x.pth")
    read, found = open_ta_tok(tmp_path / "x.pth")
    assert read == {"input_size": 384, "bottleneck_dim": 16, "stochastic_temperature": 0.03}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            assert found[name].code == "I64"
            continue
        assert found[name].shape == tuple(tensor.shape)
        expected = tensor.detach()
        assert found[name].raw().dtype.name == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].read(np.float32), expected.float().numpy())


def test_what_is_no_plain_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch")

    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    for content in (
        {"a": torch.randn(3, 4).T},
        {"sd": {}, "x": Opens()},
        {"sd": {}, "x": torch.nn.Linear(1, 1)},
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(InputError, match="is refused"):
            open_ta_tok(tmp_path / "x.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"since PyTorch 1\.6"):
        open_ta_tok(tmp_path / "x.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def save_upstream(folder):
    """The authors' own classes write their own files: {flag: path} and {published name: tensor}."""
    torch, transformers, diffusers = map(
        pytest.importorskip, ("torch", "transformers", "diffusers")
    )
    from parity import make_dc_ae, make_qwen3, make_sana, make_ta_tok
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    words = [
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        *map(str, range(24)),
    ]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="0")
    )
    tokenizer.add_special_tokens(words[:6])
    qwen3 = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**make_qwen3.FIELDS, tie_word_embeddings=True)
    ).bfloat16()
    qwen3.save_pretrained(folder / "qwen3")
    tokenizer.save(str(folder / "qwen3" / "tokenizer.json"))
    sizes = make_sana.SIZES | {"out_channels": 4, "qk_norm": "rms_norm_across_heads"}
    sana = diffusers.SanaTransformer2DModel(**sizes)
    sana.save_pretrained(folder / "sana" / "transformer", max_shard_size="40KB")
    fields = dict(make_dc_ae.VARIANTS["published"])
    shared = {
        f"{half}_{key}": value
        for key, value in fields.pop("shared").items()
        for half in ("encoder", "decoder")
    }
    types = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    dc_ae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.5, **shared, **fields, **types
    )
    dc_ae.save_pretrained(folder / "sana" / "vae")
    ta_tok = {
        make_ta_tok.published(name): value
        for name, value in make_ta_tok.TaTok().state_dict().items()
    }
    args = {
        "input_size": make_ta_tok.ENCODER["image_size"],
        "teacher": "google/siglip2-so400m-patch14-384",
        "pool_scale": 1,
    }
    torch.save({"model": {"args": args, "sd": ta_tok}}, folder / "ta_tok.pth")
    named = {name: value for name, value in qwen3.state_dict().items() if name != "lm_head.weight"}
    for prefix, tensors in (
        ("sana", sana.state_dict()),
        ("sana_vae", dc_ae.state_dict()),
        ("vision_tower.vision_tower", ta_tok),
    ):
        named |= {f"model.{prefix}.{name}": value for name, value in tensors.items()}
    return {
        "--ar": folder / "qwen3",
        "--dit": folder / "sana",
        "--tokenizer": folder / "ta_tok.pth",
    }, named


def test_the_authors_own_files_come_back_to_torch(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    parts, named = save_upstream(tmp_path)
    argv = [str(item) for pair in parts.items() for item in pair]
    assert (
        main(["convert", "to-jax", *argv, "--new-vocabulary", "mean", str(tmp_path / "jax")]) == 0
    )
    assert main(["convert", "to-torch", str(tmp_path / "jax"), str(tmp_path / "back")]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    back = load_file(tmp_path / "back" / "model.safetensors")
    ours = {name for name in back if name.startswith("model.diffusion_connector.")}
    assert set(back) - ours == set(named)
    assert len(report["ignored_on_the_way_in"]) == report["restored"] > 20
    for name in set(back) - ours - {"model.embed_tokens.weight"}:
        assert back[name].dtype == named[name].dtype, name
        assert torch.equal(back[name], named[name]), name
    rows = back["model.embed_tokens.weight"]
    assert rows.shape == (35 + 64, 24)
    assert torch.equal(rows[:32], named["model.embed_tokens.weight"][:32])
