"""Folders of weights as people have them: variants, wrapped names, slow tokenizers; and quantised
ones, holes and strangers, each named for what it is."""

import json

import ml_dtypes
import numpy as np
import pytest
from converting import EMBEDDING, TA_TOK, argv, convert, group, opened, refused, same
from pickles import write_state
from safetensors.numpy import load_file, save_file

from blip3o_jax.checkpoints import text_of
from blip3o_jax.errors import InputError
from blip3o_jax.text import load_tokenizer

STEM = "diffusion_pytorch_model"
HOLE = "transformer_blocks.1.attn2.to_q.bias"


def values(source, part="sana"):
    """{path: one of its tensors} of a part."""
    leaves = {path: x for path, x in source.leaves.items() if path.startswith(f"{part}/")}
    return {path: next(iter(leaf.tensors.values())).raw() for path, leaf in leaves.items()}


def equal(one, two, scale=1):
    assert one.keys() == two.keys()
    return all(np.array_equal(one[path], scale * two[path]) for path in one)


@pytest.fixture
def transformer(parts):
    return parts["--dit"] / "transformer"


def rewrite(folder, change, stem=STEM, **names):
    """Saves {name: tensor} as `change` returns it, under the same file name or another."""
    file = folder / f"{stem}.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, folder / names.get("to", file.name), metadata={"format": "pt"})


def test_the_only_variant_is_taken(parts, transformer):
    plain = values(opened(parts))
    rewrite(transformer, lambda x: {k: 2 * v for k, v in x.items()}, to=f"{STEM}.fp16.safetensors")
    # The plain weights come first, a variant when it is asked for.
    assert equal(values(opened(parts)), plain)
    assert equal(values(opened(parts, variant="fp16")), plain, 2)
    (transformer / f"{STEM}.safetensors").unlink()
    source = opened(parts)
    assert equal(values(source), plain, 2)
    assert transformer / f"{STEM}.fp16.safetensors" in source.files
    assert equal(values(opened(parts, variant="fp16")), plain, 2)
    with pytest.raises(InputError, match="No folder of the source has a variant 'bf16'"):
        opened(parts, variant="bf16")
    # Of two, one has to be chosen.
    text = (transformer / f"{STEM}.fp16.safetensors").read_bytes()
    (transformer / f"{STEM}.bf16.safetensors").write_bytes(text)
    with pytest.raises(InputError, match="the weights as bf16, fp16; choose with --variant"):
        opened(parts)
    assert equal(values(opened(parts, variant="bf16")), plain, 2)


def test_a_variant_may_be_in_shards(parts, transformer):
    plain = values(opened(parts))
    file = transformer / f"{STEM}.safetensors"
    tensors = load_file(file)
    file.unlink()
    # Named by diffusers, and before by transformers.
    for pattern in (STEM + ".bf16-0000{}-of-00002", STEM + "-0000{}-of-00002.bf16"):
        places = {}
        for i in (1, 2):
            shard = dict(list(tensors.items())[i % 2 :: 2])
            places |= dict.fromkeys(shard, f"{pattern.format(i)}.safetensors")
            save_file(shard, transformer / places[next(iter(shard))])
        index = transformer / f"{STEM}.safetensors.index.bf16.json"
        index.write_text(json.dumps({"weight_map": places}))
        source = opened(parts)
        assert equal(values(source), plain)
        assert index in source.files
        for shard in set(places.values()):
            (transformer / shard).unlink()
    with pytest.raises(InputError, match=r"index\.bf16\.json places .* which is missing"):
        opened(parts)
    index.unlink()
    (transformer / f"{STEM}.bin").touch()
    pickle = rf"has neither \({STEM}.bin is a pickle, which is not read\)"
    with pytest.raises(InputError, match=pickle):
        opened(parts)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "transformer.", "module._orig_mod."])
def test_a_prefix_of_all_names_is_recognised(parts, transformer, tensors, prefix):
    def wrap(given):
        return {prefix + name: tensor for name, tensor in given.items()}

    sana, qwen3, ta_tok = (values(opened(parts), x) for x in ("sana", "qwen3", "ta_tok"))
    rewrite(transformer, wrap)
    rewrite(parts["--ar"], wrap, "model")
    state = wrap(group(tensors, TA_TOK))
    write_state(parts["--tokenizer"], state, {"teacher": "so400m", "input_size": 13})
    source = opened(parts)
    assert equal(values(source), sana)
    assert equal(values(source, "qwen3"), qwen3)
    assert equal(values(source, "ta_tok"), ta_tok)
    note = f"all names begin with {prefix!r}, which is left out"
    assert source.notes == dict.fromkeys(("ar", "dit", "tokenizer"), note)
    # One that only some of them have is none.
    rewrite(transformer, lambda x: {k.replace(f"{prefix}proj_out", "proj_out"): x[k] for k in x})
    with pytest.raises(InputError, match=f"tensor '{prefix}.*' is not part of the|is missing"):
        opened(parts)


def test_names_of_qwen3_without_its_head(parts):
    plain = values(opened(parts), "qwen3")

    def bare(tensors):
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    rewrite(parts["--ar"], bare, "model")
    source = opened(parts)
    assert equal(values(source, "qwen3"), plain)
    assert source.notes == {"ar": "all names lack 'model.', which is added"}
    rewrite(parts["--ar"], lambda x: {f"module.{name}": x[name] for name in x}, "model")
    source = opened(parts)
    assert equal(values(source, "qwen3"), plain)
    assert source.notes["ar"].endswith(
        "'module.', which is left out and lack 'model.', which is added"
    )
    rewrite(parts["--ar"], lambda x: {n: x[n] for n in x if "layers.1.mlp.up" not in n}, "model")
    with pytest.raises(InputError) as error:
        opened(parts)
    name = "module.layers.1.mlp.up_proj.weight"
    assert str(error.value) == f"{parts['--ar']}: tensor {name!r} is missing."


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_hole_is_blamed_on_its_own_folder(parts, prefix, tensors):
    for flag, inner, own in (
        ("--dit", "transformer", HOLE),
        ("--dit", "vae", "decoder.conv_out.weight"),
    ):
        folder, file = parts[flag] / inner, parts[flag] / inner / f"{STEM}.safetensors"
        whole = load_file(file)
        save_file({prefix + name: x for name, x in whole.items() if name != own}, file)
        with pytest.raises(InputError) as error:
            opened(parts)
        assert str(error.value) == f"{folder}: tensor {prefix + own!r} is missing."
        save_file(whole, file)


def test_a_hole_in_the_tokenizer_has_its_own_name(parts, tensors):
    state = group(tensors, TA_TOK).items()
    state = {name.replace("decoder.vision_model.", "decoder."): x for name, x in state}
    gone = "decoder.encoder.layers.0.layer_norm1.bias"
    del state[gone]
    write_state(parts["--tokenizer"], state, {"teacher": "so400m", "input_size": 13})
    with pytest.raises(InputError) as error:
        opened(parts)
    where = parts["--tokenizer"].parent
    assert str(error.value) == f"{where}: tensor {gone!r} is missing."


def test_a_checkpoint_is_read_as_wrapped(published, tmp_path, capsys):
    tensors = load_file(published / "model.safetensors")
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    save_file(wrapped, published / "model.safetensors")
    report = convert(capsys, "to-jax", published, tmp_path / "jax")
    assert report["names"] == {"checkpoint": "all names begin with 'module.', which is left out"}
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    save_file(tensors, published / "model.safetensors")
    same(published, tmp_path / "back")


def test_tensors_are_ignored_when_asked(published, tmp_path, capsys):
    tensors = load_file(published / "model.safetensors")
    more = {"mtp.fc.weight": np.arange(3), "mtp.norm.weight": np.ones(2, np.float32)}
    save_file(tensors | more, published / "model.safetensors", metadata={"format": "pt"})
    arguments = ("to-jax", published, tmp_path / "jax")
    sentence = refused(capsys, *arguments)
    assert "tensor 'mtp.fc.weight' is not part of the model" in sentence
    assert "--ignore" in sentence
    assert "'mtp.norm.weight' is not" in refused(capsys, *arguments, "--ignore", "mtp.fc.*")
    assert "--ignore 'mtb.*' matches no tensor" in refused(capsys, *arguments, "--ignore", "mtb.*")
    needed = refused(capsys, *arguments, "--ignore", "mtp.*", "--ignore", "model.norm*")
    assert "matches" in needed
    assert "tensor 'model.norm.weight', which the model needs" in needed
    report = convert(capsys, *arguments, "--ignore", "mtp.fc*", "--ignore", "mtp.n*")
    assert {name: report["ignored"][name] for name in more} == {
        "mtp.fc.weight": "--ignore mtp.fc*",
        "mtp.norm.weight": "--ignore mtp.n*",
    }
    convert(capsys, "to-torch", tmp_path / "jax", tmp_path / "back")
    same(published, tmp_path / "back")  # they come back too


def fp8(name, dtype=np.float32):
    return {f"{name}_scale_inv": np.ones(1, dtype)}


@pytest.mark.parametrize(
    ("more", "fields", "message"),
    [
        (fp8("proj_out.weight"), {}, "is quantised to FP8, as 'proj_out.weight_scale_inv' says"),
        (
            {"proj_out.weight": np.ones((4, 32), ml_dtypes.float8_e4m3fn)},
            {},
            "is quantised to FP8, as 'proj_out.weight' says",
        ),
        ({"proj_out.qweight": np.ones(3, np.int32)}, {}, "is quantised to GPTQ or AWQ"),
        (
            {"proj_out.weight.quant_state.bitsandbytes__nf4": np.ones(3, np.uint8)},
            {},
            "is quantised to 4 bits by bitsandbytes",
        ),
        ({"proj_out.SCB": np.ones(3, np.float32)}, {}, "is quantised to 8 bits by bitsandbytes"),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, "is quantised (fp8, says its"),
        (
            {"proj_out.lora_A.default.weight": np.ones((2, 3), np.float32)},
            {},
            "holds the matrices of an adapter among its weights, 'proj_out.lora_A.default.weight'",
        ),
    ],
)
def test_quantised_weights_are_named(parts, transformer, more, fields, message):
    rewrite(transformer, lambda tensors: tensors | more)
    config = transformer / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(InputError) as error:
        opened(parts)
    assert str(error.value).startswith(str(transformer))
    assert message in str(error.value)


def test_a_quantised_checkpoint_is_named(published, tmp_path, capsys):
    rewrite(published, lambda tensors: tensors | fp8("model.norm.weight"), "model")
    assert "is quantised to FP8" in refused(capsys, "to-jax", published, tmp_path / "jax")


def slow(folder):
    """The folder's tokenizer as vocab.json and merges.txt."""
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").unlink(missing_ok=True)
    (folder / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4}')
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n", encoding="utf-8")


def test_a_slow_tokenizer_is_read(parts, tmp_path, capsys):
    folder = parts["--ar"]
    slow(folder)
    words = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"]
    words = [*words, "<|image_pad|>", *(f"<more{i}>" for i in range(9))]
    (folder / "added_tokens.json").write_text(json.dumps({w: 5 + i for i, w in enumerate(words)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    convert(capsys, "to-jax", *argv(parts), "--new-vocabulary", "mean", tmp_path / "jax")
    fields = json.loads((tmp_path / "jax" / "config.json").read_text())
    assert (fields["pad_token_id"], fields["image_start_tag_id"]) == (5, 20)
    tokenizer = load_tokenizer(tmp_path / "jax" / "tokenizer.json")
    text = "ab ab<|im_end|>ba<I3>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [2, 4, 6, 1, 0, 28]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    added = tokenizer.get_added_tokens_decoder()
    assert [added[i].special for i in (5, 6)] == [True, False]


def test_a_slow_tokenizer_of_a_checkpoint_is_read(published, tmp_path, capsys):
    slow(published)
    named = r"published has vocab\.json .* `blip3o-jax convert to-jax`"
    with pytest.raises(InputError, match=named):
        text_of(published)
    convert(capsys, "to-jax", published, tmp_path / "jax")
    tokenizer = load_tokenizer(tmp_path / "jax" / "tokenizer.json")
    assert tokenizer.encode("ab ab", add_special_tokens=False).ids == [2, 4]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "vocab.json: the tokenizer has no token <|endoftext|>"),
        ({"merges.txt": "a b c\n"}, "'a b c' is not a pair of tokens"),
        ({"merges.txt": "a x\n"}, "vocab.json and merges.txt do not agree"),
        ({"vocab.json": '{"a": "b"}'}, "vocab.json and merges.txt do not agree"),
        ({"vocab.json": '{"a": -1}'}, "vocab.json and merges.txt do not agree"),
        ({"added_tokens.json": '{"<x>": 7}'}, "'<x>' has the id 7, which leaves a gap"),
        ({"added_tokens.json": '{"<x>": "7"}'}, "the id of '<x>' is '7'"),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"5": 3}}'}, "its added token '5'"),
    ],
)
def test_a_slow_tokenizer_that_cannot_work(parts, files, message):
    slow(parts["--ar"])
    for name, text in files.items():
        (parts["--ar"] / name).write_text(text)
    with pytest.raises(InputError) as error:
        opened(parts)
    assert message in str(error.value)
    assert EMBEDDING not in str(error.value)
