"""LoRA adapters beside a model: never passed over, merged with their alpha when asked."""

import json

import ml_dtypes
import numpy as np
import pytest
from converting import convert, opened, refused
from safetensors.numpy import load_file, save_file

from blip3o_jax import checkpoints
from blip3o_jax.errors import InputError

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
RANK = 3


def matrices(rng, weight, rank=RANK):
    """(A, B) for a weight [out, in, ...]."""
    down = rng.standard_normal((rank, *weight.shape[1:])).astype(np.float32)
    up = rng.standard_normal((len(weight), rank, *(1 for _ in weight.shape[2:])))
    return down, up.astype(np.float32)


def product(down, up):
    """B A, one entry at a time."""
    result = np.zeros((len(up), *down.shape[1:]))
    for i in range(len(up)):
        for r in range(len(down)):
            result[i] += float(up[i, r].reshape(())) * down[r].astype(np.float64)
    return result


def with_adapter(parts):
    return opened(parts, merge_lora=True)


def tensor(source, name):
    leaves = source.leaves.values()
    return next(leaf.tensors[name] for leaf in leaves if name in leaf.tensors)


@pytest.fixture
def peft(parts):
    """(folder, its tensors, adapter's matrices by module): PEFT's files beside a Qwen3."""
    folder, rng = parts["--ar"], np.random.default_rng(1)
    weights = load_file(folder / "model.safetensors")
    pairs = {name: matrices(rng, weights[f"{name}.weight"]) for name in (Q, UP)}
    write(folder, pairs)
    return folder, weights, pairs


def write(folder, pairs, **fields):
    prefix, adapter = "base_model.model.", {}
    for name, (down, up) in pairs.items():
        adapter |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    save_file(adapter, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none"} | fields
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def expect(source, weights, pairs, scales):
    for name, (down, up) in pairs.items():
        weight = weights[f"{name}.weight"]
        merged = weight.astype(np.float64) + scales[name] * product(down, up)
        stored = tensor(source, f"{name}.weight")
        assert stored.dtype == weight.dtype
        ours = stored.raw().astype(np.float64)
        # Of bfloat16 half a unit in the last place, and float32's own rounding before it.
        limit = np.abs(merged) * (2**-8 if weight.dtype == ml_dtypes.bfloat16 else 1e-5) + 1e-5
        assert (np.abs(ours - merged) <= limit).all()
        assert np.abs(ours - weight.astype(np.float64)).max() > 0.1
        # A few rows of it, as large matrices are read.
        np.testing.assert_array_equal(stored.raw(slice(2, 5)), stored.raw()[2:5])


def test_an_adapter_is_not_passed_over(peft, parts):
    with pytest.raises(InputError) as error:
        opened(parts)
    assert str(peft[0] / "adapter_model.safetensors") in str(error.value)
    assert "merge it with `convert to-jax --merge-lora`" in str(error.value)
    # Under any name.
    (peft[0] / "adapter_model.safetensors").rename(peft[0] / "step-300.safetensors")
    with pytest.raises(InputError, match=r"step-300\.safetensors is a LoRA adapter"):
        opened(parts)
    expect(with_adapter(parts), *peft[1:], {Q: 2, UP: 2})
    (peft[0] / "step-300.safetensors").unlink()
    (peft[0] / "adapter_model.bin").touch()
    with pytest.raises(InputError, match=r"adapter_model\.bin is an adapter in a pickle"):
        with_adapter(parts)
    (peft[0] / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match="--merge-lora has nothing to merge"):
        with_adapter(parts)


@pytest.mark.parametrize(
    ("fields", "q", "up"),
    [
        ({}, 2, 2),
        ({"use_rslora": True}, 6 / 3**0.5, 6 / 3**0.5),
        ({"alpha_pattern": {"mlp.up_proj": 12}}, 2, 4),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1.5, "up": 9}}, 0.5, 2),
    ],
)
def test_it_is_merged_with_its_alpha(peft, parts, fields, q, up):
    folder, weights, pairs = peft
    write(folder, pairs, **fields)
    source = with_adapter(parts)
    expect(source, weights, pairs, {Q: q, UP: up})
    assert len(source.merged) == 2
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {x.name for x in source.files}
    other = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(tensor(source, other).raw(), weights[other])


def test_names_without_the_head_are_found(peft, parts):
    folder, weights, pairs = peft
    bare = {name.removeprefix("model."): x for name, x in weights.items()}
    save_file(bare, folder / "model.safetensors")
    write(folder, {name.removeprefix("model."): x for name, x in pairs.items()})
    expect(with_adapter(parts), weights, pairs, {Q: 2, UP: 2})


@pytest.mark.parametrize("where", ["", "transformer"])
@pytest.mark.parametrize(
    ("metadata", "alphas", "scale"),
    [
        (None, False, 1),  # as diffusers reads a file that says nothing
        ({"transformer.r": RANK, "transformer.lora_alpha": 12}, False, 4),
        (None, True, 7 / 3),
    ],
)
def test_adapters_of_diffusers(parts, where, metadata, alphas, scale):
    folder, rng = parts["--dit"] / "transformer", np.random.default_rng(2)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    names = ("transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.conv_inverted")
    pairs = {name: matrices(rng, weights[f"{name}.weight"]) for name in names}
    adapter = {}
    for name, (down, up) in pairs.items():
        name = f"transformer.{name}"
        adapter |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        adapter |= {f"{name}.alpha": np.array(7, np.float32)} if alphas else {}
    metadata = {"format": "pt"} | (
        {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    )
    file = parts["--dit"] / where / "pytorch_lora_weights.safetensors"
    save_file(adapter, file, metadata=metadata)
    source = with_adapter(parts)
    assert file in source.files
    for name, pair in pairs.items():
        merged = weights[f"{name}.weight"] + scale * product(*pair)
        ours = tensor(source, f"model.sana.{name}.weight").raw()
        np.testing.assert_allclose(ours, merged, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_with_an_adapter(published, tmp_path, capsys):
    before = load_file(published / "model.safetensors")
    rng, sana = np.random.default_rng(3), "model.sana.transformer_blocks.0.attn2.to_k"
    pairs = {name: matrices(rng, before[f"{name}.weight"]) for name in (UP, sana)}
    write(published, pairs)
    with pytest.raises(InputError, match="is a LoRA adapter beside the model"):
        checkpoints.open(published)
    assert "which would be left out" in refused(capsys, "to-jax", published, tmp_path / "jax")
    report = convert(capsys, "to-jax", published, tmp_path / "jax", "--merge-lora")
    assert len(report["merged"]) == 2
    assert all(
        "is merged with 2 times its matrices of rank 3" in x for x in report["merged"].values()
    )
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {f"{name}.weight" for name in pairs}
    exact = before[f"{sana}.weight"] + 2 * product(*pairs[sana])
    np.testing.assert_allclose(after[f"{sana}.weight"], exact, rtol=1e-5, atol=1e-5)


def test_a_folder_of_an_adapter_alone_is_named(peft, parts, tmp_path, capsys):
    lone = tmp_path / "lone"
    lone.mkdir()
    for file in peft[0].glob("adapter_*"):
        file.rename(lone / file.name)
    (lone / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-1.7B"}')
    says = f"{lone} is a LoRA adapter of 'Qwen/Qwen3-1.7B' and no model"
    for flag in ("--ar", "--dit"):
        with pytest.raises(InputError) as error:
            with_adapter(parts | {"--vae": parts["--dit"], flag: lone})
        assert str(error.value).startswith(says)
    assert says in refused(capsys, "to-jax", lone, tmp_path / "jax")


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda x: x.pop(f"base_model.model.{Q}.lora_A.weight"), {}, "lacks its other half"),
        (
            lambda x: x.update({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(3)}),
            {},
            "is not a matrix of a plain LoRA adapter",
        ),
        (
            lambda x: x.update({k.replace("q_proj", "z_proj"): v for k, v in x.items()}),
            {},
            "is for 'base_model.model.model.layers.0.self_attn.z_proj', which the model does not",
        ),
        (
            lambda x: x.update({f"base_model.model.{Q}.lora_A.weight": np.ones((3, 5), "f4")}),
            {},
            "which do not fit",
        ),
        (
            lambda x: x.update({f"base_model.model.{Q}.lora_A.weight": np.ones((), "f4")}),
            {},
            "are not matrices",
        ),
        (
            lambda x: x.update({f"base_model.model.{Q}.alpha": np.ones(2, np.float32)}),
            {},
            "is not one number",
        ),
        (lambda x: None, {"use_dora": True}, "its use_dora is True, more than a plain LoRA has"),
        (lambda x: None, {"modules_to_save": ["lm_head"]}, "its modules_to_save is ['lm_head']"),
        (lambda x: None, {"peft_type": "LOHA"}, "it is an adapter of kind 'LOHA', not LoRA"),
        (lambda x: None, {"lora_alpha": None}, "needs its lora_alpha"),
        (lambda x: None, {"lora_alpha": "6"}, "needs its lora_alpha"),
        (lambda x: None, {"alpha_pattern": {"(a+)+": 1}}, "its alpha_pattern '(a+)+' is not"),
    ],
)
def test_an_adapter_that_cannot_be_merged(peft, parts, change, fields, message):
    folder, _, pairs = peft
    write(folder, pairs, **fields)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError) as error:
        with_adapter(parts)
    assert message in str(error.value)
    assert str(folder / "adapter_model.safetensors") in str(error.value)
