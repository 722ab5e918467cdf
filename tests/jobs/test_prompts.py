import json

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.images import image_format, mask_name
from blip3o_jax.jobs.prompts import read_edits, read_prompts
from blip3o_jax.origin import encode_image

BOM = b"\xef\xbb\xbf"
TWO = ["two red hearts", "a blue cat"]
STRANGE = "two red hearts\u2028on\u0085gray\u000band\u2029\u000c\u001cblue"


@pytest.mark.parametrize(
    ("name", "written", "prompts"),
    [
        ("a.txt", BOM + b"two red hearts\r\n\r\n \ta blue cat \r\n", TWO),
        ("a.csv", BOM + b"prompt,source\r\ntwo red hearts,a\r\na blue cat,b\r\n", TWO),
        ("a.jsonl", BOM + b'{"prompt": "two red hearts"}\r\n{"prompt": "a blue cat"}\r\n', TWO),
        ("a.txt", f"{STRANGE}\na blue cat".encode(), [STRANGE, "a blue cat"]),
        ("a.jsonl", json.dumps({"prompt": STRANGE}, ensure_ascii=False).encode(), [STRANGE]),
        ("a.csv", f"prompt\n{STRANGE}\n".encode(), [STRANGE]),
        (
            "a.csv",
            b'id,prompt\n1,"two red hearts\non gray"\n2,"a ""blue"" cat, left\r\nof it"\n',
            ["two red hearts\non gray", 'a "blue" cat, left\r\nof it'],
        ),
        ("a.jsonl", b'{"prompt": "two red hearts\\non gray"}', ["two red hearts\non gray"]),
    ],
)
def test_prompts_are_those_that_were_written(name, written, prompts, tmp_path):
    (tmp_path / name).write_bytes(written)
    assert [row.text for row in read_prompts(str(tmp_path / name))] == prompts


@pytest.mark.parametrize(
    ("name", "written", "sentence"),
    [
        ("a.csv", b'prompt\na cat\n"two red hearts\n', "line 3 is not CSV: unexpected end of data"),
        ("a.csv", b'prompt\n"two" red hearts\n', "line 2 is not CSV: ',' expected after '\"'"),
        ("a.txt", "a cat".encode("utf-16"), "cannot be read: it is not UTF-8 text"),
        ("a.txt", b"a cat\na d\xffg\n", "it is not UTF-8 text from line 2 on"),
        ("a.csv", b"prompt\na cat\na red cat, a dog\n", "line 3 has more cells than columns"),
        ("a.csv", b"prompt,prompt\na,b\n", "has several columns `prompt`"),
        (
            "a.jsonl",
            b'{"prompt": "a cat"}\n{"prompt": "a", "seed": 3}',
            "line 2: `seed` is not read",
        ),
        ("a.jsonl", b'{"prompt": "a cat", "top_k": 3}', "give --top-k for all of them"),
        (
            "a.csv",
            b"index,prompt\n1,a cat\n",
            "a.csv line 2: `index` is not read from a row; leave it",
        ),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not JSON: it is nested too deeply."),
        (
            "a.jsonl",
            b'{"prompt": "a cat"\n',
            "line 1 is not JSON: Expecting ',' delimiter (column 19)",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a cat", "prompt": "a dog"}',
            "a.jsonl line 1 is not JSON: the key 'prompt' is there twice.",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a cat"}\n{"prompt": "a", "include": [{"class": 1, "class": 2}]}',
            "a.jsonl line 2 is not JSON: the key 'class' is there twice.",
        ),
        ("a.csv", b"id,prompt\nx,a cat\ny,a dog\nx,a fish\n", "a.csv line 4 has the id 'x', as "),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_sentence(name, written, sentence, tmp_path):
    (tmp_path / name).write_bytes(written)
    with pytest.raises(InputError) as error:
        read_prompts(str(tmp_path / name))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "written", "where"),
    [
        ("a.txt", b"a cat\n\na dog", "line 3"),
        ("a.csv", b"id,prompt\nx,a cat\ny,a dog\n", "line 3"),
        ("a.jsonl", b'{"prompt": "a cat"}\n\n{"prompt": "a dog", "id": "x"}', "line 3"),
    ],
)
def test_a_row_says_where_it_stands_also_under_an_id_of_its_own(name, written, where, tmp_path):
    (tmp_path / name).write_bytes(written)
    assert read_prompts(str(tmp_path / name))[1].where == f"{tmp_path / name} {where}"


@pytest.mark.parametrize(("suffix", "farthest"), [("png", 0), ("webp", 0), ("jpg", 12)])
def test_an_image_is_written_in_the_format_of_its_name(suffix, farthest, tmp_path):
    """With its origin: nothing but a JPEG changes pixels."""
    y, x = np.mgrid[:64, :64]
    image = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
    origin = {"prompt": "an \u00e9clair", "seed": 7, "settings": {"top_k": 3}}
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encode_image(image, origin, image_format(str(path))))
    with Image.open(path) as saved:
        assert saved.format == {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}[suffix]
        difference = np.abs(np.asarray(saved).astype(int) - image).max()
        described = saved.getexif().get(270)
        texts = saved.text if suffix == "png" else json.loads(described)
    assert difference <= farthest
    assert texts["prompt"] == "an \u00e9clair"
    if suffix == "png":
        texts = dict(texts, settings=json.loads(texts["settings"]), seed=int(texts["seed"]))
    assert texts == origin
    assert mask_name(f"b/a.{suffix}") == "b/a.mask.png"


def test_a_folder_is_no_format_and_others_are_refused(capsys, tmp_path, monkeypatch):
    assert [image_format(name) for name in ("out", "a.v2", "A.PNG")] == [None, None, "png"]
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a cat", "--out", "a.tiff"]) == 2
    assert "--out a.tiff: pictures are written as .png, .webp" in capsys.readouterr().err
    assert main(["generate", "a cat", "a dog", "--out", "a.webp"]) == 2
    assert "a.webp is one file, but you asked for 2 images" in capsys.readouterr().err
    for options in (["--format", "webp"], ["--share", "0/2"]):
        assert main(["generate", "a cat", "--out", "a.webp", *options]) == 2
        assert "--format and --share are of a job; a.webp is one file." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


WISH = {"instruction": "a hat"}


def test_an_instruction_keeps_its_separators_too(tmp_path):
    row = json.dumps({"image": "a.png", "instruction": STRANGE}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(BOM + row.encode() + b"\r\n")
    assert [edit.text for edit in read_edits(str(tmp_path / "a.jsonl"))] == [STRANGE]
    for name in ("a\n.png", "a\u2028.png", "a\0", "\ud83d"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"image": ["b.png", name], **WISH}))
        with pytest.raises(InputError, match=r"a.jsonl line 1: `image` has a line break or a char"):
            read_edits(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "3\u202fPM\u3000.png", **WISH}))
    assert read_edits(str(tmp_path / "a.jsonl"))[0].paths == (
        str(tmp_path / "3\u202fPM\u3000.png"),
    )
    (tmp_path / "a.jsonl").write_bytes(b"[" * 100_000)
    with pytest.raises(InputError, match=r"a.jsonl line 1 is not JSON: it is nested"):
        read_edits(str(tmp_path / "a.jsonl"))
