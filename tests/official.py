"""Prompt files of the official benchmarks' form, count and fields, in words of our own; a pipeline
that paints a colour for each (prompt, seed, index)."""

import csv
import io
import json
import zlib

import numpy as np
from PIL import Image

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
