"""One door to every kind of checkpoint: what it says of each, and which two it tells apart."""

import json
import os
import shutil
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SMALL

from blip3o_jax import checkpoints, training_checkpoint
from blip3o_jax.cli import main
from blip3o_jax.convert import hashes
from blip3o_jax.convert.published import save_published
from blip3o_jax.convert.random_weights import random_params
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import parts_of
from blip3o_jax.resources import ASSETS
from blip3o_jax.text import load_tokenizer
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.workdir import own_workdir
from blip3o_jax.tree import flatten, split, unflatten

RUN = TrainConfig(stage="joint", model=SMALL)


@pytest.fixture(scope="module")
def params():
    return random_params(RUN.blip3o())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where hashes without a record are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blip3o_jax" / "hashes"


def save_run(workdir, params, step, run=RUN):
    """A checkpoint as the training loop writes it."""
    trained, frozen = split(params, run.trainable)
    state = {"step": jnp.int32(step), "params": trained}
    state |= {"opt_state": {"count": jnp.int32(step)}, "guard": {"skipped": jnp.int32(0)}}
    manager = training_checkpoint.open_manager(workdir, 2)
    training_checkpoint.save(manager, run, state, frozen, {})
    training_checkpoint.finish(manager)
    manager.close()
    return workdir


def convert(*argv):
    assert main(["convert", *map(str, argv)]) == 0


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """The same model published, converted and as a run."""
    folder = tmp_path_factory.mktemp("kinds")
    tokenizer = ASSETS / "emoji_64" / "tokenizer.json"
    save_published(folder / "published", RUN.blip3o(), params, tokenizer)
    convert("to-jax", folder / "published", folder / "converted")
    save_run(folder / "run", params, 3)
    return folder


@pytest.fixture
def kinds(saved, tmp_path):
    """Copies of `saved`, which a test may damage."""
    shutil.copytree(saved, tmp_path / "kinds")
    return [tmp_path / "kinds" / kind for kind in ("published", "converted", "run")]


def changed(params, path):
    """The parameters with the last value of one leaf changed."""
    flat = {key: np.array(leaf) for key, leaf in flatten(params).items()}
    flat[path].reshape(-1)[-1] += 1
    return unflatten(flat)


def test_every_kind_says_the_same_model(kinds, params):
    for folder, kind in zip(kinds, ("published", "converted", "run"), strict=True):
        checkpoint = checkpoints.open(folder)
        assert checkpoint.kind == kind
        assert checkpoint.config == checkpoints.config_of(folder) == RUN.blip3o()
        assert checkpoint.step == (3 if kind == "run" else None)
        assert load_tokenizer(checkpoint.tokenizer).token_to_id("<I0>") is not None
        jax.tree.map(np.testing.assert_array_equal, checkpoint.load(), params)
        leaf = checkpoint.leaves["qwen3/layers/mlp/up_proj/kernel"]
        assert (leaf.shape, leaf.dtype) == ((1, 32, 32), np.float32)
        (layer,) = leaf.layers(stacked=True)
        np.testing.assert_array_equal(
            layer, params["qwen3"]["layers"]["mlp"]["up_proj"]["kernel"][0]
        )
        assert checkpoints.load_part(folder, "dc_ae").keys() == params["dc_ae"].keys()
        with pytest.raises(InputError, match=r"has no 'und_image_vae_connector', only qwen3, "):
            checkpoints.load_part(folder, "und_image_vae_connector")


def test_a_mesh_reads_each_shard_and_pads_the_vocabulary(kinds, params):
    mesh = jax.make_mesh((4, 2), ("rows", "copies"))
    rows = jax.NamedSharding(mesh, jax.P("rows"))

    def place(tree):
        return jax.tree.map(lambda leaf: rows if leaf.shape[0] % 4 == 0 else whole, tree)

    whole = jax.NamedSharding(mesh, jax.P())
    embedding = params["qwen3"]["embed_tokens"]["embedding"]
    assert len(embedding) % 4  # 826
    for folder in kinds:
        checkpoint = checkpoints.open(folder).padded(4)
        loaded = checkpoint.load(("qwen3",), "bfloat16", place)["qwen3"]["embed_tokens"]
        assert checkpoint.config.qwen3.vocab_rows == len(loaded["embedding"]) == 828
        assert loaded["embedding"].addressable_shards[0].data.shape == (207, 32)
        values = np.asarray(loaded["embedding"])
        np.testing.assert_array_equal(values[:826], embedding.astype(jnp.bfloat16))
        np.testing.assert_array_equal(values[826:], 0)


@pytest.mark.parametrize("path", ["dc_ae/decoder/norm_out/bias", "qwen3/norm/scale"])
def test_different_weights_have_different_identities(path, kinds, params, tmp_path):
    """The last value of a leaf, beyond the first megabyte of the file and in Orbax's arrays."""
    other = changed(params, path)
    before = [checkpoints.open(folder).identity for folder in kinds]
    save_published(tmp_path / "other" / "published", RUN.blip3o(), other)
    shutil.copy(kinds[0] / "tokenizer.json", tmp_path / "other" / "published")
    convert("to-jax", tmp_path / "other" / "published", tmp_path / "other" / "converted")
    save_run(tmp_path / "other" / "run", other, 3)
    after = [checkpoints.open(tmp_path / "other" / folder.name).identity for folder in kinds]
    assert len({*before, *after}) == 6
    assert [name.partition("@")[0] for name in after] == ["published", "converted", "run/3"]


def test_an_identity_is_that_of_a_copy_and_not_of_another_config_or_tokenizer(kinds, tmp_path):
    for folder in kinds:
        copy = shutil.copytree(folder, tmp_path / "copy" / folder.name)
        assert checkpoints.open(copy).identity == checkpoints.open(folder).identity
    published = tmp_path / "copy" / "published"
    fields = json.loads((published / "config.json").read_text())
    fields["sana_vae"]["scaling_factor"] = 0.5
    (published / "config.json").write_text(json.dumps(fields))
    assert checkpoints.open(published).identity != checkpoints.open(kinds[0]).identity
    (tmp_path / "copy" / "converted" / "tokenizer.json").write_text("{}")
    assert (
        checkpoints.open(tmp_path / "copy" / "converted").identity
        != checkpoints.open(kinds[1]).identity
    )


def test_steps_of_a_run_are_told_apart(params, tmp_path):
    """Also when the weights are the same."""
    workdir = save_run(tmp_path / "run", params, 3)
    first = checkpoints.open(workdir).identity
    save_run(workdir, params, 5)
    second = checkpoints.open(workdir).identity
    assert first.startswith("run/3@")
    assert second.startswith("run/5@")
    assert first[5:] != second[5:]


def test_a_step_of_a_run_is_chosen_by_its_number(params, tmp_path, monkeypatch, capsys):
    other = changed(params, "dc_ae/decoder/norm_out/bias")
    workdir = save_run(save_run(tmp_path / "run", params, 3), other, 5)
    for name, step, weights in (("run", 5, other), ("run@5", 5, other), ("run@3", 3, params)):
        checkpoint = checkpoints.open(tmp_path / name)
        assert (checkpoint.folder, checkpoint.step) == (workdir, step)
        assert checkpoint.identity.startswith(f"run/{step}@")
        jax.tree.map(np.testing.assert_array_equal, checkpoint.load(), weights)
        part = checkpoints.load_part(tmp_path / name, "dc_ae")
        jax.tree.map(np.testing.assert_array_equal, part, weights["dc_ae"])
        assert checkpoints.config_of(tmp_path / name) == RUN.blip3o()
        assert checkpoint.tokenizer == checkpoints.tokenizer_of(tmp_path / name)
    convert("to-torch", tmp_path / "run@3", tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, checkpoints.open(tmp_path / "back").load(), params)
    report = json.loads((tmp_path / "back" / "convert.json").read_text())
    assert (report["source"], report["origin"]) == (str(tmp_path / "run@3"), {"step": 3})
    # Every byte of the step that is named, whatever became of the newest.
    shutil.rmtree(workdir / "checkpoints" / "5" / "model" / "d")
    capsys.readouterr()
    convert("verify", tmp_path / "run@3")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["identity"].startswith("run/3@")
    # What is not there.
    monkeypatch.chdir(tmp_path)
    options = ["--workdir", "next", "--config", "emoji_joint", "--config.init.dc_ae=run@4"]
    assert main(["train", *options]) == 2
    missing = "blip3o-jax: init of dc_ae: run has no checkpoint of step '4'; it has 3, 5.\n"
    assert capsys.readouterr().err == missing
    with pytest.raises(InputError, match=r"^run has no checkpoint of step 'x'; it has 3, 5\.$"):
        checkpoints.open("run@x")
    none = r"^emoji_64@3: emoji_64 is not a training run, so it has no steps\.$"
    with pytest.raises(InputError, match=none):
        checkpoints.open("emoji_64@3")
    with pytest.raises(InputError, match=r"^No checkpoint 'nowhere@3', neither a folder nor"):
        checkpoints.open("nowhere@3")
    # A folder of that very name, which is none of the run's.
    earlier = checkpoints.open("run@3")
    tokenizer = earlier.tokenizer
    shutil.copytree(tmp_path / "back", "run@3")
    assert checkpoints.open("run@3").kind == "published"
    assert earlier.tokenizer == tokenizer


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_files_that_are_not_what_was_recorded_are_named(kinds, capsys):
    for folder in kinds:
        checkpoint = checkpoints.open(folder)
        largest = max(checkpoint.files, key=lambda file: file.stat().st_size)
        assert (checkpoint.root / "hashes.json").is_file()
        # a sample sees the first and last bytes, every byte is seen on request
        size = largest.stat().st_size
        flip(largest, size - 1)
        # A part's own damage is seen by what loads that part, or all.
        part = largest.parent.name.partition(".")[0] if checkpoint.kind == "converted" else "sana"
        readers = lambda x: x.identity, lambda x: x.load(), lambda x, y=part: x.load((y,))
        for read in readers:
            with pytest.raises(InputError, match=f"{largest} is not what hashes.json beside it"):
                read(checkpoints.open(folder))
        flip(largest, size - 1)
        assert checkpoint.verify() == (checkpoint.identity, True)
        flip(largest, size // 14)
        unsampled = checkpoints.open(folder)
        assert unsampled.identity == checkpoint.identity
        with pytest.raises(InputError, match=f"{largest} is not what"):
            unsampled.verify()
        capsys.readouterr()
        assert main(["convert", "verify", str(folder)]) == 2
        assert f"blip3o-jax: {largest} is not what" in capsys.readouterr().err
        flip(largest, size // 14)
        assert main(["convert", "verify", str(folder)]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report == {
            "a": str(folder),
            "identity": checkpoint.identity,
            "recorded": True,
            "passed": True,
        }


def test_a_recorded_file_that_is_gone_is_named(kinds):
    file = kinds[1] / "params" / "qwen3.norm.scale" / "0"
    file.unlink()
    with pytest.raises(InputError, match=f"{file} is missing, which .*hashes.json recorded"):
        checkpoints.open(kinds[1]).verify()


def test_without_a_record_every_byte_is_hashed_once(kinds, cache, monkeypatch):
    before = checkpoints.open(kinds[0]).identity
    assert not cache.exists()
    (kinds[0] / "hashes.json").unlink()
    assert checkpoints.open(kinds[0]).identity == before
    hashed = []
    monkeypatch.setattr(
        hashes,
        "hash_file",
        lambda file, hash_file=hashes.hash_file: hashed.append(file) or hash_file(file),
    )
    assert checkpoints.open(kinds[0]).identity == before
    assert {file.name for file in hashed} == {"tokenizer.json"}
    file = kinds[0] / "model.safetensors"
    flip(file, file.stat().st_size // 14)
    os.utime(file, ns=(1, 1))
    assert checkpoints.open(kinds[0]).identity != before
    assert file in hashed


def test_the_embedded_checkpoint_is_what_is_committed():
    checkpoint = checkpoints.open("emoji_64")
    assert checkpoint.verify() == (checkpoint.identity, True)
    assert checkpoint.identity.startswith("emoji_64@")


def test_a_run_of_an_earlier_version_opens(params, tmp_path):
    """It has neither the model's config nor hashes nor a tokenizer of its own."""
    workdir = save_run(tmp_path / "run", params, 3)
    folder = workdir / "checkpoints" / "3"
    shutil.rmtree(folder / "model_config")
    (folder / "hashes.json").unlink()
    checkpoint = checkpoints.open(workdir)
    assert checkpoint.config == RUN.blip3o()
    assert checkpoint.tokenizer == ASSETS / "emoji_64" / "tokenizer.json"
    assert checkpoint.verify()[1] is False
    assert main(["convert", "to-torch", str(workdir), str(tmp_path / "back")]) == 0
    back = checkpoints.open(tmp_path / "back").load()
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # Damaged, it is refused in one sentence.
    config = json.loads((folder / "config" / "metadata").read_text())
    for change, sentence in {
        "preset": r"metadata: it has no preset with changes to it\.",
        "model": r"metadata: it has no preset with changes to it\.",
        "data": r"The config of the run .*run has no data\.tokenizer\.",
    }.items():
        (folder / "config" / "metadata").write_text(json.dumps(config | {change: []}))
        with pytest.raises(InputError, match=sentence):
            checkpoints.tokenizer_of(workdir)


def test_a_run_with_a_tokenizer_of_its_own_leaves_with_it(params, tmp_path):
    own = tmp_path / "own.json"
    tokenizer = json.loads((ASSETS / "emoji_64" / "tokenizer.json").read_text())
    own.write_text(json.dumps(tokenizer))
    data = {**asdict(RUN)["data"], "tokenizer": str(own)}
    run = TrainConfig(stage="joint", model=SMALL, data=type(RUN.data)(**data))
    with own_workdir(run, str(tmp_path / "run")) as workdir:
        save_run(workdir, params, 3, run)
    content = own.read_bytes()
    own.unlink()  # the run is opened elsewhere
    assert checkpoints.open(workdir).tokenizer.read_bytes() == content
    assert main(["convert", "to-torch", str(workdir), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == content
    own.write_text(json.dumps({**tokenizer, "truncation": None, "version": "1.0"}, indent=1))
    with (
        pytest.raises(InputError, match=r"run/tokenizer\.json, with which the run began, is not"),
        own_workdir(run, str(workdir)),
    ):
        pass


def test_reinforcement_uses_the_tokenizer_that_its_run_names(tmp_path, monkeypatch):
    own, seen = tmp_path / "own.json", []
    tokenizer = load_tokenizer(ASSETS / "emoji_64" / "tokenizer.json")
    tokenizer.add_tokens(["<a token of its own>"])
    tokenizer.save(str(own))

    def reinforced(cfg, prompts, heldout, text, *_):
        seen.append(text.tokenizer.token_to_id("<a token of its own>"))

    def run(cfg, workdir, _):
        seen.append(workdir)
        return {}

    monkeypatch.setattr("blip3o_jax.rl.run.reinforced", reinforced)
    monkeypatch.setattr("blip3o_jax.train.loop.run", run)
    options = ["--config.init={}", f"--config.data.tokenizer={own}", "--config.mesh={}"]
    workdir = tmp_path / "run"
    assert main(["grpo", "--config", "emoji_grpo", "--workdir", str(workdir), *options]) == 0
    assert seen == [tokenizer.token_to_id("<a token of its own>"), workdir]
    assert (workdir / "tokenizer.json").read_bytes() == own.read_bytes()


def test_a_run_of_one_part_gives_that_part_alone(params, tmp_path):
    run = TrainConfig(stage="autoencoder", model=SMALL)
    workdir = save_run(tmp_path / "run", {"dc_ae": params["dc_ae"]}, 1, run)
    part = checkpoints.load_part(workdir, "dc_ae")
    jax.tree.map(np.testing.assert_array_equal, part, params["dc_ae"])
    assert "qwen3" in parts_of(run.blip3o())
    message = "run holds no 'qwen3', only dc_ae: it is a run of stage 'autoencoder'"
    with pytest.raises(InputError, match=message):
        checkpoints.load_part(workdir, "qwen3")
    assert main(["convert", "to-torch", str(workdir), str(tmp_path / "back")]) == 2


def test_a_run_without_a_checkpoint_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"stage": "joint"}')
    with pytest.raises(InputError, match="run is a training run without a complete checkpoint"):
        checkpoints.open(tmp_path / "run")


def cut(content):
    return content[:-10]


def empty(content):
    return b""


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit], ids=lambda function: function.__name__)
def test_a_damaged_run_is_one_sentence_to_all_that_read_it(damage, kinds, capsys, tmp_path):
    run = kinds[2]
    files = (run / "checkpoints" / "3" / "model").rglob("d/*")
    file = max(files, key=lambda file: file.stat().st_size)
    file.write_bytes(damage(file.read_bytes()))
    commands = [["convert", "to-torch", str(run), str(tmp_path / "back")]]
    commands += [["convert", "verify", str(run)]]
    # A picture's samples of each file show what is cut; every byte is compared by the others.
    picture = ["generate", "a red heart", "--checkpoint", str(run), "--out", str(tmp_path / "out")]
    commands += [picture] if damage is not flip_a_bit else []
    for command in commands:
        assert main(command) == 2
        (sentence,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("blip3o")]
        assert f"{file} is not what hashes.json beside it recorded" in sentence
    assert not (tmp_path / "back").exists()
    assert file.exists()  # readers leave things as they are
