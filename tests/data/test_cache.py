import functools
import json

import jax
import numpy as np
import pytest
from tiny import SMALL

from blip3o_jax.checkpoints import load_part
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_checkpoint, random_params
from blip3o_jax.data import cache, feed, origin
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import open_feed
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.presets import preset
from blip3o_jax.sample import generate
from blip3o_jax.train import losses
from blip3o_jax.train.read_config import read_config
from blip3o_jax.train.stages import WHOLE
from blip3o_jax.train.start import build_model, encoder_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    """A config over 13 records of a tar, of which record 4 is damaged, and 6 of parquet; and its
    cache in `cache`."""
    folder = tmp_path_factory.mktemp("cached")
    random_checkpoint(folder / "weights", replace(preset("emoji_64"), **SMALL))
    made.tar(folder / "a.tar", range(0, 130, 10), {40: {"png": b"damaged"}})
    made.parquet(folder / "b.parquet", range(200, 206))
    sources = [
        {"kind": "webdataset", "path": str(folder / "a.tar")},
        {"kind": "parquet", "path": str(folder / "b.parquet")},
    ]
    data = {"sources": sources, "heldout": 2}
    config = {
        "stage": "joint",
        "model": SMALL,
        "init": str(folder / "weights"),  # compiling initialisers would take a minute
        "batch_size": 8,
        "num_steps": 2,
        "joint": {"trainable_sana": "all"},
        "mesh": {"data": 8},
        "data": data,
    }
    # ml_collections knows no key with a dot, as the changes to a model have.
    code = (
        "from types import SimpleNamespace\n"
        f"def get_config():\n    return SimpleNamespace(to_dict=lambda: {config!r})\n"
    )
    (folder / "config.py").write_text(code)
    assert run(folder, "cache") == 0
    return folder


def run(folder, out, *more):
    sizes = ("--shard-records", "4", "--batch-size", "8")
    return main(
        [
            "data",
            "cache",
            "--config",
            str(folder / "config.py"),
            "--out",
            str(folder / out),
            *sizes,
            *more,
        ]
    )


def config(folder, *overrides):
    return read_config(str(folder / "config.py"), [f"--config.{item}" for item in overrides])


def shards(folder, out="cache"):
    return {file.name: file.read_bytes() for file in (folder / out).glob("*.array_record")}


def batches(cfg, tokenizer, count):
    iterator = open_feed(cfg, tokenizer).train()
    return [next(iterator) for _ in range(count)]


def test_the_folder_holds_every_record_in_its_place(folder):
    assert sorted(shards(folder)) == [f"000-0000{k}-of-00004.array_record" for k in range(4)] + [
        f"001-0000{k}-of-00002.array_record" for k in range(2)
    ]
    cfg = config(folder, f"data.cache={folder / 'cache'}")
    first, second = feed.open_sources(cfg.data, cfg.blip3o())
    assert (len(first), len(second)) == (13, 6)
    assert first.key(4) == "a.tar:00040"
    record = second[5]
    assert (record["key"], record["caption"]) == ("b.parquet:5", "a red heart 205")
    assert (record["codes"].shape, record["codes"].dtype) == ((4,), np.int32)
    assert (record["latents"].shape, record["latents"].dtype) == (
        (2, 2, cfg.blip3o().dc_ae.latent_channels),
        np.float32,
    )
    assert [
        json.loads(line)["key"]
        for line in (folder / "cache" / "bad_records.0.jsonl").read_text().splitlines()
    ] == ["a.tar:00040"]


def test_a_step_from_the_cache_is_the_step_from_the_images(folder, tokenizer):
    plain, cached = config(folder), config(folder, f"data.cache={folder / 'cache'}")
    model = build_model(plain)
    params = random_params(model.config)  # those of the checkpoint
    loss = jax.jit(functools.partial(losses.joint_loss, model, plain.joint))
    sheets = []
    for step, (a, b) in enumerate(
        zip(batches(plain, tokenizer, 5), batches(cached, tokenizer, 5), strict=True)
    ):
        assert b.keys() == {"tokens", "start", "codes", "latents"}
        # so the order is the same, in spite of the damaged record
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        one, other = (loss(params, batch, jax.random.key(step))[1] for batch in (a, b))
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6, err_msg=name)
        sheets.append(b["latents"])
    # pictures differ, so the comparison means something
    assert np.std(np.concatenate(sheets), axis=0).max() > 0.01


def test_a_step_from_the_cache_has_no_image_encoder(folder, tokenizer):
    cfg = config(folder, f"data.cache={folder / 'cache'}")
    model = build_model(cfg)
    abstract = model.abstract(WHOLE)
    batch = batches(cfg, tokenizer, 1)[0]
    lowered = jax.jit(functools.partial(losses.joint_loss, model, cfg.joint)).lower(
        abstract, batch, jax.random.key(0)
    )
    kept = lowered._lowering.compile_args["kept_var_idx"]
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path((abstract, batch, jax.random.key(0)))
    ]
    used = {paths[i].split("'")[1] for i in kept if "'" in paths[i] and paths[i].startswith("[0]")}
    assert used == {"qwen3", "diffusion_connector", "sana"}


def test_training_runs_from_the_cache_alone(folder, tmp_path, capsys):
    hidden = [folder / "a.tar", folder / "b.parquet"]
    for file in hidden:
        file.rename(f"{file}.away")
    try:
        code = main(
            [
                "train",
                "--config",
                str(folder / "config.py"),
                "--workdir",
                str(tmp_path / "run"),
                f"--config.data.cache={folder / 'cache'}",
            ]
        )
    finally:
        for file in hidden:
            (file.parent / f"{file.name}.away").rename(file)
    assert code == 0
    assert np.isfinite(json.loads(capsys.readouterr().out.splitlines()[-1])["heldout/flow"])


def test_a_cache_follows_its_sources_and_refuses_them_when_they_changed(
    folder, made, tmp_path, monkeypatch
):
    """Copied elsewhere, with other times, they are the same; with another caption they are not."""
    for name in ("a.tar", "b.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    sources = [
        {"kind": "webdataset", "path": str(tmp_path / "a.tar")},
        {"kind": "parquet", "path": str(tmp_path / "b.parquet")},
    ]
    elsewhere = f"data.cache={folder / 'cache'}", f"data.sources={json.dumps(sources)}"
    cfg = config(folder, *elsewhere)
    digested, digest = [], origin.digest
    with monkeypatch.context() as patch:
        patch.setattr(origin, "digest", lambda *of: digested.append(of[0]) or digest(*of))
        assert list(map(len, feed.open_sources(cfg.data, cfg.blip3o()))) == [13, 6]
    assert sorted(digested) == [source["path"] for source in sources]  # once each
    entries = json.loads((folder / "cache" / "cache.json").read_text())["sources"]
    assert [[file["name"] for file in entry["files"]] for entry in entries] == [
        ["a.tar"],
        ["b.parquet"],
    ]
    # In their own place, a record less: both training and another start of the job say so.
    own, before = config(folder, elsewhere[0]), (folder / "a.tar").read_bytes()
    made.tar(folder / "a.tar", range(0, 120, 10), {40: {"png": b"damaged"}})
    size = (folder / "a.tar").stat().st_size
    changed = f"changed: a.tar, {len(before)} bytes then, {size} now"
    try:
        with pytest.raises(InputError, match="has changed since") as error:
            feed.open_sources(own.data, own.blip3o())
        assert str(error.value).startswith(
            f"data.cache: '{folder}/a.tar' has changed since {folder}/cache was made ({changed}); "
        )
        with pytest.raises(InputError, match="a cache of other sources") as error:
            description = cache.read_description(str(folder / "cache"))
            opened = open_source(own.data.sources[0])
            entry = cache.source_entry(own.data.sources[0], opened)
            new = description | {"sources": [entry, description["sources"][1]]}
            cache.begin(folder / "cache", new)
        assert changed in str(error.value)
    finally:
        (folder / "a.tar").write_bytes(before)
    assert list(map(len, feed.open_sources(own.data, own.blip3o()))) == [13, 6]


def test_a_restart_makes_the_missing_shards_only(folder, monkeypatch, capsys):
    before = shards(folder)
    lost = "000-00002-of-00004.array_record"
    (folder / "cache" / lost).unlink()
    with pytest.raises(Exception, match="1 of 4 shards"):
        cfg = config(folder, f"data.cache={folder / 'cache'}")
        feed.open_sources(cfg.data, cfg.blip3o())
    written = []
    write = cache.write_shard
    monkeypatch.setattr(
        cache,
        "write_shard",
        lambda file, records: (written.append(file.name), write(file, records)),
    )
    assert run(folder, "cache") == 0
    assert written == [lost]
    assert shards(folder) == before
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 1


def test_a_job_that_dies_leaves_no_half_shard(folder, monkeypatch):
    from blip3o_jax.data.transform import decode_image

    decoded = []

    def dies(*given):
        decoded.append(1)
        if len(decoded) > 6:
            raise KeyboardInterrupt
        return decode_image(*given)

    monkeypatch.setattr("blip3o_jax.data.transform.decode_image", dies)
    assert run(folder, "died") == 130
    assert list(shards(folder, "died")) == ["000-00000-of-00004.array_record"]
    monkeypatch.undo()
    assert run(folder, "died") == 0
    assert shards(folder, "died") == shards(folder)


def test_large_images_are_encoded_where_their_rows_are(folder, monkeypatch):
    """One after the other of each device's own: without a mesh every device would encode all."""
    loops = []

    def loop(function, x):
        loops.append((len(x), dict(jax.sharding.get_abstract_mesh().shape)))
        return jax.vmap(function)(x)

    monkeypatch.setattr(generate, "LARGE", 1)
    monkeypatch.setattr("jax.lax.map", loop)
    assert run(folder, "large", "--batch-size", "16") == 0
    assert loops == [(2, {"data": 8, "fsdp": 1, "tensor": 1})]


def test_hosts_share_the_shards(folder, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    for host in range(2):
        monkeypatch.setattr("jax.process_index", lambda host=host: host)
        assert run(folder, "shared") == 0
        assert len(shards(folder, "shared")) == 3 * (host + 1)
    assert shards(folder, "shared") == shards(folder)


def test_bfloat16_latents_are_half_the_size(folder):
    assert run(folder, "half", "--latents", "bfloat16") == 0
    (cfg, half) = (config(folder, f"data.cache={folder / name}") for name in ("cache", "half"))
    one, other = (feed.open_sources(c.data, c.blip3o())[1][2]["latents"] for c in (cfg, half))
    assert other.nbytes == one.nbytes // 2
    np.testing.assert_allclose(other.astype(np.float32), one, rtol=2**-8)


def sentence(capsys, argv):
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("blip3o-jax: ")
    return error


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.crop=original", "(crop shared there, original here)"),
        (
            "model.ta_tok.stochastic_temperature=0.05",
            "(ta_tok.config.stochastic_temperature 0.03 there, 0.05 here)",
        ),
        ("data.cache=nowhere", "nowhere holds no cache"),
        ('data.sources=[{"kind": "webdataset", "path": "c.tar"}]', "holds no source 'c.tar'"),
    ],
)
def test_a_cache_of_other_encoders_or_sources_is_refused_before_anything_is_made(
    override, expected, folder, tmp_path, capsys
):
    assert_refused(expected, override, folder=folder, tmp_path=tmp_path, capsys=capsys)


def test_a_cache_of_encoders_from_another_seed_is_refused(folder, tmp_path, capsys, monkeypatch):
    """Random encoders are drawn by numpy here, from the key that the run's seed gives."""

    def init(model, key, parts):
        weights = random_params(model.config, seed=int(jax.random.key_data(key)[-1]))
        return {part: weights[part] for part in parts}

    monkeypatch.setattr(Blip3o, "init", init)
    changes = ("init={}", "seed=1")
    expected = "cache was made with other settings (ta_tok.weights"
    assert_refused(expected, *changes, folder=folder, tmp_path=tmp_path, capsys=capsys)
    # By the seed of the weights that made the cache it is not refused for them.
    changes = ("init={}", "seed=0", 'data.sources=[{"kind": "webdataset", "path": "c.tar"}]')
    expected = "holds no source 'c.tar'"
    assert_refused(expected, *changes, folder=folder, tmp_path=tmp_path, capsys=capsys)


def assert_refused(expected, *changes, folder, tmp_path, capsys):
    """Training from the cache under changes of the config, before anything is made."""
    overrides = [f"--config.{change}" for change in (f"data.cache={folder / 'cache'}", *changes)]
    argv = [
        "train",
        "--config",
        str(folder / "config.py"),
        "--workdir",
        str(tmp_path / "run"),
        *overrides,
    ]
    assert expected in sentence(capsys, argv)
    assert not (tmp_path / "run").exists()


def test_encoders_are_known_by_their_weights(folder):
    cfg = config(folder)
    # copies, which may be written to
    params = jax.tree.map(np.array, encoder_params(cfg, load_part))
    model, data = cfg.blip3o(), cfg.data
    before = cache.describe(model, data, params)
    assert before == cache.describe(model, data, encoder_params(cfg, load_part))
    leaf = jax.tree.leaves(params["dc_ae"]["encoder"])[0]
    leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(np.inf))
    assert cache.difference(before, cache.describe(model, data, params)).startswith("dc_ae.weights")


def test_what_the_job_refuses(folder, tmp_path, capsys):
    argv = ["data", "cache", "--config", str(folder / "config.py"), "--out"]
    new, eight = str(tmp_path / "x"), ("--batch-size", "8")
    assert "--shard-records is at least 1" in sentence(capsys, [*argv, new, "--shard-records", "0"])
    assert "--batch-size 3 is not divisible by the 8 devices" in sentence(
        capsys, [*argv, new, "--batch-size", "3"]
    )
    none = ("--config.data.sources=[]", "--config.data.heldout=64")
    assert "names no data.sources" in sentence(capsys, [*argv, new, *none])
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("years of work")
    assert "holds thesis.txt and no cache.json" in sentence(capsys, [*argv, new, *eight])
    other = [*argv, str(folder / "cache"), *eight, "--latents", "bfloat16", "--shard-records", "4"]
    assert "holds a cache with other settings (latents float32 there, bfloat16 here" in sentence(
        capsys, other
    )


@pytest.mark.parametrize(
    "damage",
    [
        {"sources": None},
        {"sources": [3]},
        {"shard_records": 0},
        {"shard_records": "4"},
        {"sources": [{"path": "a", "records": 10**6 + 1, "blocks": None}], "shard_records": 1},
        {"sources": [{"path": "a", "records": -1, "blocks": None}]},
        {"sources": [{"path": "a", "records": 0, "blocks": None}]},
        {"sources": [{"path": "a", "records": 3}]},
        {"sources": [{"path": "a", "records": 3, "blocks": [0, "2"]}]},
        {"sources": [{"path": "a", "records": 3, "blocks": None, "files": [{"name": "a"}]}]},
        {"sources": [{"path": "a", "records": 3, "blocks": None, "files": {"name": "a"}}]},
        {"sources": [{"path": "a", "records": 3, "blocks": None, "files": None}]},
    ],
)
def test_a_damaged_description_is_said(damage, tmp_path):
    whole = {"format": 1, "sources": [{"path": "a", "records": 3, "blocks": [0, 2]}]}
    whole |= {"shard_records": 4}
    file = tmp_path / "cache.json"
    file.write_text(json.dumps(whole))
    assert cache.read_description(str(tmp_path)).items() >= whole.items()
    file.write_text(json.dumps(whole | damage))
    with pytest.raises(InputError, match=r"cache\.json is damaged; make it with `blip3o-jax data"):
        cache.read_description(str(tmp_path))
    file.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"holds no cache \(cache\.json cannot be read\)"):
        cache.read_description(str(tmp_path))
