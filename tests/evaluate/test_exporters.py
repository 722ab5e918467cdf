"""`evaluate NAME export`: the scorers' layouts, read by a reader that knows the benchmarks' own
descriptions and nothing of the exporters; every refusal of a prompt file."""

import json
import pathlib
import shutil

import official
import pytest
from official import IDS, SIDE, Painter, colour
from PIL import Image

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.evaluate.exporters.table import BENCHMARKS


@pytest.fixture(autouse=True)
def loaded(monkeypatch, tmp_path):
    """A painter in place of a model, which may edit."""
    painter = Painter(checkpoints.open("emoji_64").identity)
    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", lambda _: painter)
    config = type(checkpoints.config_of("emoji_64"))
    monkeypatch.setattr(config, "check_sources", lambda *_: None)
    monkeypatch.chdir(tmp_path)


def tree(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def shows(path, *colours):
    """The image's colours, or those of the quarters of a grid, row by row."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    if len(colours) == 1:
        assert image.getcolors() == [(image.width * image.height, colours[0])]
        return
    assert image.size == (2 * SIDE, 2 * SIDE)
    places = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
    for (x, y), expected in zip(places, colours, strict=True):
        quarter = image.crop((x, y, x + SIDE, y + SIDE))
        assert quarter.getcolors() == [(SIDE * SIDE, expected)]


def four(prompt, seed):
    return [colour(prompt, seed, k) for k in range(4)]


def read_geneval(images, rows):
    """<DIR>/00000/metadata.jsonl and <DIR>/00000/samples/0000.png .. 0003.png, seed 42."""
    names = {f"{i:05d}/samples/{k:04d}.png" for i in range(553) for k in range(4)}
    assert tree(images) == names | {f"{i:05d}/metadata.jsonl" for i in range(553)}
    for i, row in enumerate(rows):
        (line,) = (images / f"{i:05d}/metadata.jsonl").read_text().splitlines()
        assert json.loads(line) == row
        for k, expected in enumerate(four(row["prompt"], 42)):
            shows(images / f"{i:05d}/samples/{k:04d}.png", expected)


def read_geneval2(images, rows):
    """One JSON {prompt: filepath}, an image a prompt."""
    paths = json.loads((images / "image_paths.json").read_text())
    assert list(paths) == [row["prompt"] for row in rows]
    assert len(set(paths.values())) == 800
    assert len(tree(images)) == 801
    for prompt, path in paths.items():
        shows(path, colour(prompt, 0, 0))


def read_dpg(images, rows):
    """A flat folder of 2x2 grids <id>.png, and nothing else."""
    assert tree(images) == {f"{key}.png" for key in rows}
    assert len(rows) == 1065
    for key, prompt in rows.items():
        shows(images / f"{key}.png", *four(prompt, 0))


def read_wise(images, rows):
    """A flat folder 1.png .. 1000.png."""
    assert tree(images) == {f"{i}.png" for i in range(1, 1001)}
    for row in rows:
        shows(images / f"{row['prompt_id']}.png", colour(row["Prompt"], 0, 0))


def read_oneig(images, rows):
    """<category>/<model>/<id>.webp, grids of four; ids keep their zeros."""
    folders = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object"}
    folders |= {"Text_Rendering": "text", "Knowledge_Reasoning": "reasoning"}
    names = {f"{folders[row['category']]}/mine/{row['id']}.webp": row for row in rows}
    assert tree(images) == set(names)
    assert {"anime/mine/000.webp", "reasoning/mine/224.webp"} <= set(names)
    for name, row in names.items():
        shows(images / name, *four(row["prompt_en"], 0))


def read_longtext(images, rows):
    """Flat {prompt_id:04d}_{k}.png with k = 1..4; ids 0-79, 100-139, 160-199."""
    assert tree(images) == {f"{i:04d}_{k}.png" for i in IDS for k in (1, 2, 3, 4)}
    for row in rows:
        for k, expected in enumerate(four(row["prompt"], 0), 1):
            shows(images / f"{row['prompt_id']:04d}_{k}.png", expected)


def read_tiif(images, rows):
    """<type>/<model>/{short,long}_description/<idx>.png, idx = order inside the file."""
    names = {
        f"{kind}/mine/{length}/{i}.png": row[length]
        for kind, own in rows.items()
        for i, row in enumerate(own)
        for length in ("short_description", "long_description")
    }
    assert tree(images) == set(names)
    assert len(names) == 2 * 277
    for name, prompt in names.items():
        shows(images / name, colour(prompt, 0, 0))


def read_imgedit(images, rows):
    """Flat <key>.png, each of its source's size."""
    assert tree(images) == {f"{key}.png" for key in rows}
    assert len(rows) == 737
    for key, row in rows.items():
        k = int(row["id"].split("/")[1][0])
        with Image.open(images / f"{key}.png") as image:
            assert image.size == (5 + k, 6)
        shows(images / f"{key}.png", colour(f"{row['prompt']}{20 * k}", 0, 0))


def read_gedit(images, rows):
    """<model>/fullset/<task_type>/<lang>/<key>.png with <key>_SRCIMG.png beside it."""
    names = {
        f"mine/fullset/{row['task_type']}/{row['instruction_language']}/{row['key']}": row
        for row in rows
    }
    assert len(names) == 1212
    assert tree(images) == {f"{x}{end}.png" for x in names for end in ("", "_SRCIMG")}
    for name, row in names.items():
        i = int(row["key"], 16)
        shows(images / f"{name}_SRCIMG.png", (i % 200, 9, 9))
        shows(images / f"{name}.png", colour(f"{row['instruction']}{i % 200}", 0, 0))
        with Image.open(images / f"{name}.png") as image:
            assert image.size == (5 + i % 3, 4)


CASES = {
    "geneval": (official.geneval, read_geneval, "evaluate_images.py IMAGES --outfile"),
    "geneval2": (official.geneval2, read_geneval2, "--image_filepath_data IMAGES/image_paths.json"),
    "dpg": (official.dpg, read_dpg, f"dist_eval.sh IMAGES {SIDE}"),
    "wise": (official.wise, read_wise, "IMAGE_DIR=IMAGES"),
    "oneig": (official.oneig, read_oneig, "--model_names mine --image_grid 2,2"),
    "longtext": (official.longtext, read_longtext, "--sample_dir IMAGES"),
    "tiif-mini": (official.tiif, read_tiif, "--image_dir IMAGES --eval_model mine"),
    "imgedit": (official.imgedit, read_imgedit, "--result_img_folder IMAGES --edit_json PROMPTS"),
    "gedit": (official.gedit, read_gedit, "--model_name mine"),
}


def export(name, prompts, folder, *more):
    argv = ["evaluate", name, "export", "--prompts", str(prompts), "--out", str(folder / "out")]
    if name == "imgedit":
        argv += ["--sources", str(folder / "sources")]
    return main([*argv, "--model-name", "mine", "--num-inference-steps", "7", *more])


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


def test_an_export_without_one_image_has_no_end_and_is_mended(tmp_path, monkeypatch, capsys):
    write = pathlib.Path.write_bytes

    def write_most(path, data):
        return path.name == "0101_2.png" or write(path, data)

    prompts, rows = official.longtext(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(pathlib.Path, "write_bytes", write_most)
        assert export("longtext", prompts, tmp_path) == 2
    assert "1 of 640 are missing, such as ['0101_2.png']" in capsys.readouterr().err
    assert not (tmp_path / "out/export.json").exists()
    assert export("longtext", prompts, tmp_path) == 0
    read_longtext(tmp_path / "out/images", rows)


def bytes_of(folder):
    """All files that a scorer or an import reads."""
    names = {name for name in tree(folder) if name.startswith("images/")} | {"export.json"}
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", ["dpg", "gedit"])
def test_an_export_is_divided_and_goes_on_where_it_was_killed(name, tmp_path, capsys):
    """The end is that of one process that was never killed."""
    make, read, _ = CASES[name]
    prompts, rows = make(tmp_path)
    out = tmp_path / "out"
    assert export(name, prompts, tmp_path, "--share", "0/2") == 0
    assert "Share 0/2" in capsys.readouterr().out
    assert not (out / "export.json").exists()
    # As if killed: two shards were not recorded yet, and a file is half written.
    recorded = sorted((out / "job/done").glob("*.jsonl"))
    for file in recorded[-2:]:
        row = json.loads(file.read_text().splitlines()[0])
        (out / row["file"]).write_bytes(b"half")
        file.unlink()
    assert export(name, prompts, tmp_path, "--share", "1/2") == 0
    assert not (out / "export.json").exists()
    assert export(name, prompts, tmp_path) == 0
    read(out / "images", rows)
    divided = bytes_of(out)
    assert export(name, prompts, tmp_path, "--overwrite") == 0
    assert bytes_of(out) == divided
    # Other settings are another export.
    capsys.readouterr()
    assert export(name, prompts, tmp_path, "--seed", "3") == 2
    assert "holds a job with seed 0; this one has seed 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scores/results.jsonl", "images/dpg-bench_results.txt"])
def test_what_a_scorer_wrote_is_not_overwritten(name, tmp_path, capsys):
    prompts, _ = official.geneval2(tmp_path)
    assert export("geneval2", prompts, tmp_path) == 0
    results = tmp_path / "out" / name
    results.parent.mkdir(exist_ok=True)
    results.write_text("scores")
    capsys.readouterr()
    assert export("geneval2", prompts, tmp_path, "--overwrite") == 2
    assert f"what the export did not write, such as ['{name}']" in capsys.readouterr().err
    assert results.read_text() == "scores"
    results.rename(tmp_path / "elsewhere")
    assert export("geneval2", prompts, tmp_path, "--overwrite") == 0
    assert not results.exists()


def test_a_model_name_is_one_folder(tmp_path, capsys):
    prompts, _ = official.longtext(tmp_path)
    argv = ["evaluate", "longtext", "export", "--prompts", str(prompts)]
    assert main([*argv, "--model-name", "../x"]) == 2
    assert "--model-name '../x' is a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
