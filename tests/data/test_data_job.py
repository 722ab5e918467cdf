import io
import json

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.data import survey
from blip3o_jax.data.plots import BAR, MARK, histogram


def scene(seed, size=(96, 64)):
    """A picture of soft blobs, so that its hash is its own."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_the_hash_outlives_scaling_and_compression_but_tells_pictures_apart():
    first = survey.dhash(scene(0))
    small = survey.dhash(scene(0).resize((48, 32)))
    jpeg = survey.dhash(Image.open(io.BytesIO(encoded(scene(0), "jpeg", quality=60))))
    assert max((first ^ small).bit_count(), (first ^ jpeg).bit_count()) <= survey.NEAR
    assert min((first ^ survey.dhash(scene(i))).bit_count() for i in range(1, 40)) > 10
    ramp = Image.fromarray(np.broadcast_to(np.arange(90, dtype=np.uint8), (80, 90)))
    assert survey.dhash(ramp) == 0
    assert survey.dhash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 2**64 - 1


def seen(pixels, hash_, cell=100):
    return survey.Seen("", "", pixels=int(pixels), hash=int(hash_), thumbnail=bytes([cell] * 192))


def test_near_pictures_are_those_of_comparing_all_with_all():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 300, np.uint64)
    for i in range(0, 200, 10):  # of some, copies in which 0 to 5 bits differ
        flips = rng.choice(64, i // 10 % 6, replace=False)
        hashes[i + 1] = hashes[i] ^ np.uint64(sum(1 << int(b) for b in flips))
    close = np.bitwise_count(hashes[:, None] ^ hashes) <= survey.NEAR
    expected = [np.flatnonzero(row).tolist() for row in close if row.sum() > 1][::2]
    assert survey.near_groups([seen(i, h) for i, h in enumerate(hashes)]) == expected
    assert len(expected) == 14
    assert survey.near_groups([]) == survey.equal_groups([]) == []


def test_equal_pixels_are_equal_and_a_chain_of_near_ones_is_one_group():
    hashes = [0, 0b111, 0b111111]  # the ends differ in 6 bits
    chain = [seen(i, h) for i, h in enumerate(hashes)]
    assert survey.near_groups(chain) == [[0, 1, 2]]
    assert survey.equal_groups(chain) == []
    assert survey.equal_groups([*chain, chain[1]]) == [[1, 3]]


def test_flat_pictures_of_different_colours_are_not_near():
    assert survey.near_groups([seen(0, 0, 100), seen(1, 0, 116), seen(2, 0, 133)]) == [[0, 1]]


def write_config(folder, config):
    code = (
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({config!r})\n"
    )
    (folder / "config.py").write_text(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    """A mixture: a tar with a damaged, an empty and a long record; jsonl with copies of the tar's
    pictures and one edit."""
    folder = tmp_path_factory.mktemp("mixture")
    parts = {i: {"png": encoded(scene(i, (40 + 8 * i, 64)))} for i in range(12)}
    parts[3] = {"png": b"damaged"}
    parts[4]["txt"] = b""
    parts[5]["txt"] = b"a red heart left of " * 20
    made.tar(folder / "a.tar", range(12), parts)
    lines = [{"image": f"{i}.jpg", "caption": "a cat"} for i in (0, 1, 30)]
    lines += [{"instruction": "make it blue", "input_images": ["0.jpg"], "output_image": "31.jpg"}]
    for i in (0, 1, 30, 31):
        (folder / f"{i}.jpg").write_bytes(encoded(scene(i, (40 + 8 * i, 64)), "jpeg", quality=70))
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [
        {"kind": "webdataset", "path": str(folder / "a.tar")},
        {"kind": "jsonl", "path": str(folder / "b.jsonl")},
    ]
    config = {"stage": "joint", "batch_size": 4, "data": {"sources": sources, "heldout": 2}}
    write_config(folder, config)
    return folder


def test_check_reports_what_is_wrong_and_draws_it(folder, tmp_path, capsys, tokenizer):
    argv = [
        "data",
        "check",
        "--config",
        str(folder / "config.py"),
        "--out",
        str(tmp_path / "report"),
    ]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "report" / "report.json").read_text())
    tar, lines = report["sources"]
    assert (tar["records"], tar["usable"], tar["bad"], tar["longer_than_the_prompt"]) == (
        12,
        10,
        2,
        1,
    )
    assert [e["key"] for e in tar["examples"]] == ["a.tar:00003", "a.tar:00004"]
    assert (tar["shorter_side"]["min"], tar["shorter_side"]["max"]) == (40, 64)
    assert tar["smaller_than_the_run"] == 3  # widths 40, 48 and 56; the damaged one is not seen
    assert tar["aspect_ratio"]["max"] == 128 / 64
    assert (lines["usable"], lines["edits"]) == (4, 1)
    assert lines["prompt_tokens"]["min"] == len(tokenizer.encode_prompt("a cat"))
    assert report["near_duplicates"] == {"groups": 2, "superfluous": 2}
    groups = [
        json.loads(line)
        for line in (tmp_path / "report" / "duplicates.jsonl").read_text().splitlines()
    ]
    assert sorted(groups) == [["a.tar:00000", "b.jsonl:1"], ["a.tar:00001", "b.jsonl:2"]]
    problems = [
        json.loads(line)
        for line in (tmp_path / "report" / "problems.jsonl").read_text().splitlines()
    ]
    assert ["cannot be decoded" in problems[0]["reason"], "empty" in problems[1]["reason"]] == [
        True,
        True,
    ]
    for name in ("sizes", "aspect_ratios", "prompt_tokens"):
        assert Image.open(tmp_path / "report" / f"{name}.png").size == (720, 360)
    assert main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_check_names_edits_that_do_not_lie_on_their_source(tmp_path, capsys):
    """Of pictures 200 x 160, of which four pixels are 1.28 of the model's."""
    rng = np.random.default_rng(0)
    whole, other = (
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((320, 240))
        for _ in range(2)
    )
    before = whole.crop((60, 40, 260, 200))
    patched = before.copy()
    patched.paste((200, 30, 30), (20, 20, 80, 70))
    results = {
        "same": before,
        "recoloured": patched,
        "shifted": whole.crop((56, 40, 256, 200)),
        "zoomed": whole.resize((200, 160), box=(63, 42.4, 257, 197.6)),
        "other": other.crop((60, 40, 260, 200)),
    }
    before.save(tmp_path / "before.png")
    lines = []
    for name, image in results.items():
        image.save(tmp_path / f"{name}.png")
        line = {"instruction": name, "source_image": "before.png", "target_image": f"{name}.png"}
        lines.append(json.dumps(line))
    # A reference to an object beside the picture that is edited.
    both = {"input_images": ["before.png", "other.png"], "output_image": "shifted.png"}
    lines.append(json.dumps({"instruction": "both"} | both))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sources = [{"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}]
    cfg = {
        "stage": "joint",
        "data": {"sources": sources, "heldout": 2},
        "model": {"max_sources": 1},
    }
    write_config(tmp_path, cfg)
    places = ("--config", str(tmp_path / "config.py"), "--out", str(tmp_path / "report"))
    assert main(["data", "check", *places]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["sources"]
    assert (row["edits"], row["shifted_edits"], row["zoomed_edits"]) == (6, 2, 1)
    assert row["not_comparable_edits"] == 1
    assert row["more_sources_than_the_model_takes"] == 1
    named = [
        json.loads(line)
        for line in (tmp_path / "report" / "misplaced.jsonl").read_text().splitlines()
    ]
    assert [(line["key"], line["source"], line["reason"].split(" by ")[0]) for line in named] == [
        *(("a.jsonl:3", 1, "shifted"), ("a.jsonl:4", 1, "zoomed")),
        *(("a.jsonl:5", 1, "not comparable"), ("a.jsonl:6", 1, "shifted")),
        ("a.jsonl:6", 2, "not comparable"),
    ]
    assert named[0]["shift"] == pytest.approx(1.28, abs=0.1)
    assert named[0]["reason"] in ("shifted by 1.2 px", "shifted by 1.3 px")
    assert named[1]["zoom"] == pytest.approx(200 / 194 - 1, abs=0.006)
    assert "shift" not in named[2]


def test_a_limit_spreads_over_the_source(folder, tmp_path, capsys):
    argv = [
        "data",
        "check",
        "--config",
        str(folder / "config.py"),
        "--out",
        str(tmp_path / "report"),
        "--limit",
        "4",
    ]
    assert main(argv) == 0
    tar, lines = json.loads(capsys.readouterr().out.splitlines()[-1])["sources"]
    assert (tar["records"], tar["looked_at"], lines["looked_at"]) == (12, 4, 4)
    assert [e["key"] for e in tar["examples"]] == ["a.tar:00003"]  # of 0, 3, 6 and 9


def test_a_histogram_has_a_bar_where_the_values_are():
    pixels = np.asarray(
        histogram([1.0] * 30 + [64.0] * 10, "x", "y", mark=8.0, mark_name="limit", log=True)
    )
    columns = (pixels == BAR).all(-1).sum(0)
    filled = np.flatnonzero(columns)
    assert columns[filled[0]] > 2.5 * columns[filled[-1]] > 0
    assert (np.diff(filled) > 1).sum() == 1  # two bars
    marked = np.flatnonzero((pixels == MARK).all(-1).sum(0) > 200)
    assert abs(marked.mean() - (filled[0] + filled[-1]) / 2) < 12  # 8 is halfway between 1 and 64
    assert np.asarray(histogram([], "x", "y")).shape == (360, 720, 3)


def test_stats_count_what_is_read(folder, capsys):
    config, path = str(folder / "config.py"), str(folder / "a.tar")
    only = "--config.data.sources=" + json.dumps([{"kind": "webdataset", "path": path}])
    assert (
        main(["data", "stats", "--config", config, "--threads", "1,2", "--batches", "3", only]) == 0
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["threads"] for row in report["by_threads"]] == [1, 2]
    for row in report["by_threads"]:
        assert row["examples_per_second"] == pytest.approx(4e3 / row["wait_ms"])
        size = 1e6 * row["mb_per_second"] / row["examples_per_second"]
        assert 1000 < size < 30000  # bytes of a picture


PLAIN, WEIGHTED = '{"kind": "jsonl", "path": "a"}', '{"kind": "jsonl", "path": "b", "weight": 1}'


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["check", "--config", "emoji_joint", "--out", "x"], "names no data.sources"),
        (["check", "--limit", "-1", "--out", "x"], "--limit is at least 0"),
        (["stats", "--threads", "0"], "--threads are numbers of at least 1"),
        (["stats", "--batches", "0"], "--batches is at least 1"),
        (
            ["stats", "--config.data.max_bad_fraction=0"],
            "cannot be used, more than data.max_bad_fraction 0.0",
        ),
        (
            ["check", "--out", "x", '--config.data.sources=[{"kind": "tar", "path": "a.tar"}]'],
            "Unknown kind of source 'tar'",
        ),
        (
            ["check", "--out", "x", '--config.data.sources=[{"kind": "jsonl", "paht": "a"}]'],
            "'data.sources[0].paht'; did you mean 'path'",
        ),
        (["check", "--out", "x", "--config.data.sources=a.tar"], "wants a list of groups of keys"),
        (
            [
                "check",
                "--out",
                "x",
                '--config.data.sources=[{"kind": "jsonl", "path": "no.jsonl"}]',
            ],
            "no file at 'no.jsonl'",
        ),
        (["check", "--out", "x", "--config.data.long_captions=cut"], "'truncate' or 'drop'"),
        (["check", "--out", "x", "--config.data.crop=random"], "'shared' or 'original'"),
        (
            ["check", "--out", "x", "--config.stage=grpo"],
            "data.sources has no effect in stage 'grpo'",
        ),
        (
            [
                "check",
                "--out",
                "x",
                "--config.joint.stochastic_codes=true",
                "--config.data.cache=c",
            ],
            "stochastic_codes must be false",
        ),
        (
            ["check", "--out", "x", "--config.data.sources=[]", "--config.data.cache=c"],
            "name the sources",
        ),
        (["check", "--out", "x", "--config.data.tokenizer=no.json"], "No tokenizer at 'no.json'"),
        (["check", "--out", "x", f"--config.data.sources=[{WEIGHTED}, {PLAIN}]"], "or none"),
        (
            [
                "check",
                "--out",
                "x",
                '--config.data.sources=[{"kind": "jsonl", "path": "a", "weight": 1, "repeat": 2}]',
            ],
            "not both",
        ),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--config" not in argv:
        argv = [*argv, "--config", str(folder / "config.py")]
    assert main(["data", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in error if line.startswith("blip3o-jax: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert list(tmp_path.iterdir()) == []
