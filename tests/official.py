"""Prompt files of the official benchmarks' form, count and fields, in words of our own; a pipeline
that paints a colour for each (prompt, seed, index); readers of the scorers' layouts, who know the
benchmarks' own descriptions and nothing of the exporters."""

import csv
import io
import json
import zlib

import numpy as np
from PIL import Image

from blip3o_jax import checkpoints
from blip3o_jax.cli import main
from blip3o_jax.request import Sample

SIDE = 4
IDS = [*range(80), *range(100, 140), *range(160, 200)]  # LongText-Bench's
TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
KINDS = {
    **{"extract": 117, "style": 100, "add": 95, "adjust": 94, "background": 94},
    **{"replace": 92, "remove": 86, "action": 36, "compose": 23},
}
CATEGORIES = {
    **{"Anime_Stylization": 245, "Portrait": 244, "General_Object": 206},
    **{"Text_Rendering": 200, "Knowledge_Reasoning": 225},
}


def colour(prompt, seed, index):
    return tuple(zlib.crc32(f"{prompt}|{seed}|{index}".encode()).to_bytes(4, "big")[:3])


class Painter:
    """Stands for a loaded model."""

    batch_size = 4

    def __init__(self, identity):
        self.identity = identity

    def warn(self, requests):
        pass

    def run(self, requests, failed):
        for request in requests:
            size, text = (SIDE, SIDE), request.prompt
            for source in request.images:
                with Image.open(source) as opened:
                    size, first = opened.size, opened.convert("RGB").getpixel((0, 0))
                text = f"{text}{first[0]}"
            shade = colour(text, request.seed, request.index)
            image = np.full((size[1], size[0], 3), shade, np.uint8)
            yield Sample(request, 0, image, np.zeros(0, int))


def load_painter(monkeypatch):
    """Puts a painter in place of a model, which may edit."""
    painter = Painter(checkpoints.open("emoji_64").identity)
    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", lambda _: painter)
    config = type(checkpoints.config_of("emoji_64"))
    monkeypatch.setattr(config, "check_sources", lambda *_: None)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def geneval(folder):
    rows = [
        {"tag": TAGS[i % 6], "include": [{"class": "cat", "count": 1}], "prompt": f"cat {i}"}
        for i in range(553)
    ]
    return lines(folder / "evaluation_metadata.jsonl", rows), rows


def geneval2(folder):
    rows = [
        {
            **{"prompt": f"two cats {i}", "atom_count": 1, "skills": ["object"] * (1 + i % 3)},
            "vqa_list": [["Is there a cat?", "Yes"]] * (1 + i % 3),
        }
        for i in range(800)
    ]
    return lines(folder / "geneval2_data.jsonl", rows), rows


def dpg(folder):
    (folder / "prompts").mkdir(parents=True)
    rows = {f"p{i}": f"a cat {i}" for i in range(1065)}
    for key, text in rows.items():
        (folder / "prompts" / f"{key}.txt").write_text(text + "\n")
    return folder / "prompts", rows


def wise(folder, suffix="_verified", ends=(400, 640, 1000)):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
    rows, start = [], 1
    for name, end in zip(names, ends, strict=True):
        own = [
            {
                **{"Prompt": f"bread {i}", "Explanation": "e", "Category": "c"},
                **{"Subcategory": "s", "prompt_id": i},
            }
            for i in range(start, end + 1)
        ]
        (folder / f"{name}{suffix}.json").write_text(json.dumps(own))
        rows, start = rows + own, end + 1
    return folder, rows


def oneig(folder, name="OneIG-Bench.csv", column="prompt_en", categories=CATEGORIES):
    rows = [
        {
            **{"category": category, "id": f"{i:03d}", column: f'"big" cat, {category} {i}'},
            **{"type": "T, P", "prompt_length": "short", "class": "None"},
        }
        for category, count in categories.items()
        for i in range(count)
    ]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(stream.getvalue())
    return folder / name, rows


def oneig_zh(folder):
    return oneig(folder, "OneIG-Bench-ZH.csv", "prompt_cn", CATEGORIES | {"Multilingualism": 200})


def longtext(folder, name="text_prompts.jsonl"):
    rows = [
        {
            **{"category": "sign", "length": "short", "prompt": f"a sign {i}"},
            **{"text": ["we sell", "bread"], "text_length": 3, "prompt_id": i},
        }
        for i in IDS
    ]
    return lines(folder / name, rows), rows


def tiif(folder, count=277):
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for k in range(10):
        own = [
            {"type": f"t+{k}", "short_description": f"s{k} {i}", "long_description": f"l{k} {i}"}
            for i in range(k, count, 10)
        ]
        lines(folder / f"file{k}.jsonl", own)
        rows[f"t+{k}"] = own
    return folder, rows


def imgedit(folder):
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    rows = {
        str(2 * i + 7): {"id": f"animal/{i % 9}.png", "prompt": f"make it {i}", "edit_type": kind}
        for i, kind in enumerate(kinds)
    }
    (folder / "sources" / "animal").mkdir(parents=True)
    for k in range(9):
        Image.new("RGB", (5 + k, 6), (20 * k, 0, 0)).save(folder / f"sources/animal/{k}.png")
    (folder / "basic_edit.json").write_text(json.dumps(rows))
    return folder / "basic_edit.json", rows


def gedit(folder, each=606):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            **{"task_type": f"task-{i % 11}", "key": f"{i:04x}", "instruction": f"{language} {i}"},
            **{"instruction_language": language, "Intersection_exist": i % 2 == 0},
            "input_image": {"bytes": _png((5 + i % 3, 4), (i % 200, 9, 9)), "path": None},
        }
        for language in ("en", "cn")
        for i in range(each)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2 + 5
    for name, part in (("a-00000.parquet", rows[:half]), ("a-00001.parquet", rows[half:])):
        pq.write_table(pa.Table.from_pylist(part), folder / name)
    return folder, rows


def _png(size, first):
    stream = io.BytesIO()
    Image.new("RGB", size, first).save(stream, "png")
    return stream.getvalue()


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
    "geneval": (geneval, read_geneval, "evaluate_images.py IMAGES --outfile"),
    "geneval2": (geneval2, read_geneval2, "--image_filepath_data IMAGES/image_paths.json"),
    "dpg": (dpg, read_dpg, f"dist_eval.sh IMAGES {SIDE}"),
    "wise": (wise, read_wise, "IMAGE_DIR=IMAGES"),
    "oneig": (oneig, read_oneig, "--model_names mine --image_grid 2,2"),
    "longtext": (longtext, read_longtext, "--sample_dir IMAGES"),
    "tiif-mini": (tiif, read_tiif, "--image_dir IMAGES --eval_model mine"),
    "imgedit": (imgedit, read_imgedit, "--result_img_folder IMAGES --edit_json PROMPTS"),
    "gedit": (gedit, read_gedit, "--model_name mine"),
}


def export(name, prompts, folder, *more):
    argv = ["evaluate", name, "export", "--prompts", str(prompts), "--out", str(folder / "out")]
    if name == "imgedit":
        argv += ["--sources", str(folder / "sources")]
    return main([*argv, "--model-name", "mine", "--num-inference-steps", "7", *more])
