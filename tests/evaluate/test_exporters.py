"""`evaluate NAME export`: the scorers' layouts, read by a reader that knows the benchmarks' own
descriptions and nothing of the exporters; every refusal of a prompt file."""

import json
import shutil

import official
import pytest
from clouds import serve_folder
from official import CASES, export, tree

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.evaluate.exporters.table import BENCHMARKS


@pytest.fixture(autouse=True)
def loaded(monkeypatch, tmp_path):
    official.load_painter(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_laid_out_as_the_scorer_reads_it(name, tmp_path, capsys):
    make, read, command = CASES[name]
    prompts, rows = make(tmp_path)
    assert export(name, prompts, tmp_path) == 0
    images = tmp_path / "out" / "images"
    read(images, rows)
    # The command of the scorer comes last.
    _, _, printed = capsys.readouterr().out.partition("In a clone of https://github.com/")
    command = command.replace("IMAGES", str(images)).replace("PROMPTS", str(prompts))
    assert command in printed
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    facts = [about[x] for x in ("benchmark", "checkpoint", "prompt_variant", "seed")]
    identity = checkpoints.open("emoji_64").identity
    assert facts == [name, identity, "official", 42 if name == "geneval" else 0]
    assert about["settings"]["num_inference_steps"] == 7
    folders = {file.split("/")[0] for file in tree(tmp_path / "out")}
    singles = {"singles"} if name in ("dpg", "oneig") else set()
    assert folders == {"export.json", "images", "job", "manifest.jsonl", *singles}


def test_the_other_variants_have_their_own_files_and_counts(tmp_path):
    prompts, rows = official.wise(tmp_path / "w", "", (400, 700, 1000))
    items = BENCHMARKS["wise-legacy"].read(prompts, "mine")
    assert [item.files for item in items] == [(f"{row['prompt_id']}.png",) for row in rows]
    prompts, rows = official.oneig_zh(tmp_path)
    items = BENCHMARKS["oneig-zh"].read(prompts, "mine")
    assert len(items) == 1320
    assert items[-1].files == ("multilingualism/mine/199.webp",)
    assert items[-1].prompt == rows[-1]["prompt_cn"]
    prompts, _ = official.longtext(tmp_path, "text_prompts_zh.jsonl")
    assert len(BENCHMARKS["longtext-zh"].read(prompts, "mine")) == 160
    prompts, _ = official.tiif(tmp_path / "t", 2538)
    assert len(BENCHMARKS["tiif"].read(prompts, "mine")) == 2 * 2538


def test_prompts_in_a_bucket_are_read_by_the_projects_own_client(tmp_path, monkeypatch):
    """pyarrow would open a bucket's name with a client and credentials of its own."""
    prompts, _ = official.gedit(tmp_path / "gedit")
    expected = BENCHMARKS["gedit"].read(prompts, "mine")
    own, asked = serve_folder(monkeypatch, tmp_path)
    items = BENCHMARKS["gedit"].read(own / "gedit", "mine")
    assert items == expected
    assert asked.count("cat_file") == 4  # of each file its end, then its rows
    (_, source), *_ = BENCHMARKS["gedit"].beside(own, items, own / "gedit")
    assert source()[:4] == b"\x89PNG"


def drop_last_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def swap(old, new):
    """A change of the first place where a text stands in a file."""

    def change(path):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def in_file(name, change):
    return lambda folder: change(folder / name)


def swap_key(path):
    edits = json.loads(path.read_text())
    edits.pop("7")
    path.write_text(json.dumps(edits))


WRONG = [
    ("geneval", drop_last_line, "has 552 prompts, the benchmark has 553"),
    ("geneval", swap('"include"', '"includes"'), "line 1 has no field `include`"),
    ("geneval", swap("two_object", "three_object"), "line 2: the tag 'three_object'"),
    ("geneval", swap('"cat 3"', '" "'), "line 4: `prompt` is empty"),
    ("geneval", swap('{"tag"', '"tag"'), "line 1 is not JSON"),
    ("geneval2", drop_last_line, "has 799 prompts, the benchmark has 800"),
    ("geneval2", swap("two cats 5", "two cats 4"), "'two cats 4' comes twice"),
    ("geneval2", swap("vqa_list", "vqa"), "line 1 has no field `vqa_list`"),
    ("dpg", lambda p: (p / "p3.txt").unlink(), "has 1064 prompts, the benchmark has 1065"),
    ("dpg", lambda p: (p / "p3.txt").rename(p / "p4.x.txt"), "'p4' comes twice"),
    ("dpg", in_file("p3.txt", lambda p: p.write_text(" ")), "p3.txt is empty"),
    ("wise", lambda p: (p / "natural_science_verified.json").unlink(), "cannot be read"),
    (
        "wise",
        in_file("natural_science_verified.json", swap('"prompt_id": 700', '"prompt_id": 701')),
        "'701' comes twice",
    ),
    ("wise", in_file("natural_science_verified.json", swap("Explanation", "E")), "`Explanation`"),
    ("oneig", drop_last_line, "has 1119 prompts, the benchmark has 1120"),
    ("oneig", swap("Portrait,", "Anime_Stylization,"), "has 246 prompts for anime, the benchmark"),
    ("oneig", swap("Portrait,001", "Portrait,000"), "'human_000' comes twice"),
    ("oneig", swap("prompt_en", "prompt_cn"), "has no field `prompt_en`"),
    ("longtext", drop_last_line, "has 159 prompts, the benchmark has 160"),
    ("longtext", swap('"prompt_id": 100', '"prompt_id": 80'), "1 of 160 are missing, such as"),
    ("longtext", swap('"prompt_id": 1}', '"prompt_id": 0}'), "'0' comes twice"),
    ("tiif-mini", in_file("file0.jsonl", drop_last_line), "has 276 prompts, the benchmark has 277"),
    ("tiif-mini", in_file("file1.jsonl", swap('"t+1"', '"t+0"')), "comes twice"),
    (
        "tiif-mini",
        in_file("file1.jsonl", swap("long_d", "longer_d")),
        "no field `long_description`",
    ),
    ("imgedit", swap_key, "has 736 edits, the benchmark has 737"),
    ("imgedit", swap('"edit_type": "style"', '"edit_type": "add"'), "has 99 edits `style`"),
    ("imgedit", swap('"9":', '"7":'), "'7' is there twice"),
    ("imgedit", swap("animal/3.png", "animal/none.png"), "none.png"),
    ("imgedit", swap('"7":', '"../7":'), "'../7.png' is not the name of a file"),
    ("gedit", lambda p: official.gedit(p, 605), "has 605 edits in `en`, the benchmark has 606"),
    ("gedit", lambda p: (p / "a-00000.parquet").write_bytes(b"PAR1"), "is not Parquet"),
    ("gedit", lambda p: [f.unlink() for f in p.glob("*.parquet")], "has no .parquet file"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Each benchmark's prompts, made once."""
    folder = tmp_path_factory.mktemp("official")
    return {name: (folder / name, make(folder / name)[0]) for name, (make, *_) in CASES.items()}


@pytest.mark.parametrize(("name", "change", "sentence"), WRONG)
def test_a_wrong_prompt_file_is_one_sentence(name, change, sentence, originals, tmp_path, capsys):
    folder, prompts = originals[name]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy / prompts.relative_to(folder))
    assert export(name, copy / prompts.relative_to(folder), copy) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert error.startswith("blip3o-jax: ")
    assert "\n" not in error
    assert not (copy / "out").exists()


def test_a_model_name_is_one_folder(tmp_path, capsys):
    prompts, _ = official.longtext(tmp_path)
    argv = ["evaluate", "longtext", "export", "--prompts", str(prompts)]
    assert main([*argv, "--model-name", "../x"]) == 2
    assert "--model-name '../x' is a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
