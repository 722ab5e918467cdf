"""A batch file of OpenAI's: what comes back for each of its lines, and every refusal."""

import base64
import io
import json
import math
import pathlib

import numpy as np
import pytest
from editing import FLAGS, QUICK
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.serve.bodies import EDITS, GENERATIONS

ALPHA = np.zeros((20, 30), np.uint8)
ALPHA[:, :9] = 255


def url_of(path):
    return f"data:image/png;base64,{base64.b64encode(pathlib.Path(path).read_bytes()).decode()}"


def line(id_, body, url=GENERATIONS, **more):
    return json.dumps({"custom_id": id_, "method": "POST", "url": url, "body": body} | more)


def served(channels, *lines, code=0, out="made"):
    pathlib.Path("batch.jsonl").write_text("\n".join(lines))
    argv = ["generate", "--prompts", "batch.jsonl", "--checkpoint", channels, *FLAGS]
    assert main([*argv, "--out", out]) == code
    return {
        name: [json.loads(x) for x in (pathlib.Path(out) / f"{name}.jsonl").open()]
        for name in ("output", "errors")
    }


def pictures(row):
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    data = [base64.b64decode(image["b64_json"]) for image in row["response"]["body"]["data"]]
    return [np.asarray(Image.open(io.BytesIO(image))) for image in data]


def test_images_and_edits_of_a_batch_come_back_under_their_ids(channels, loaded, pipeline):
    body = {"prompt": "a cat", "n": 2, "seed": 5, "model": channels, "size": "16x16"}
    edit = {"prompt": "make it blue", "images": [{"image_url": url_of("a.png")}], "user": "x"}
    Image.fromarray(np.dstack([np.zeros((20, 30, 3), np.uint8), ALPHA])).save("m.png")
    masked = edit | {"mask": {"image_url": url_of("m.png")}}
    lines = [line("one", body), line("two", edit, EDITS), line("three", {"prompt": ""})]
    lines.append(line("four", masked, EDITS))
    files = served(channels, *lines, code=1)
    assert [row["custom_id"] for row in files["output"]] == ["one", "two", "four"]
    expected = pipeline.generate("a cat", seed=5, num_images=2, **QUICK)
    for made, image in zip(pictures(files["output"][0]), expected, strict=True):
        np.testing.assert_array_equal(made, np.asarray(image))
    (made,) = pictures(files["output"][1])
    np.testing.assert_array_equal(made, pipeline.edit("a.png", "make it blue", **QUICK)[0])
    (made,) = pictures(files["output"][2])
    (expected,) = pipeline.edit("a.png", "make it blue", within=ALPHA, **QUICK)
    np.testing.assert_array_equal(made, expected)
    assert (made[:, :9] == np.asarray(Image.open("a.png"))[:, :9]).all()
    (row,) = files["errors"]
    assert (row["custom_id"], row["response"]["status_code"]) == ("three", 400)
    message = row["response"]["body"]["error"]["message"]
    assert message.startswith("batch.jsonl line 3: The prompt is empty")
    # The same command gives the same bytes.
    before = pathlib.Path("made/output.jsonl").read_bytes()
    served(channels, *lines, code=1)
    assert pathlib.Path("made/output.jsonl").read_bytes() == before
    argv = ["generate", "a cat", "--checkpoint", channels, *FLAGS, "--out", "made", "--overwrite"]
    assert main(argv) == 0
    assert not pathlib.Path("made/output.jsonl").exists()


def test_a_picture_that_another_share_is_to_make_again_is_named(channels, loaded, capsys):
    edit = {"prompt": "make it blue", "images": [{"image_url": url_of("a.png")}]}
    served(channels, line("one", {"prompt": "a cat"}), line("two", edit, EDITS))
    rows = [json.loads(x) for x in pathlib.Path("made/manifest.jsonl").read_text().splitlines()]
    pathlib.Path("made", rows[0]["file"]).unlink()
    shards = [pathlib.Path(f"made/job/done/00000{i}.jsonl").read_text() for i in (0, 1)]
    owner = ['"id": "one"' in shard for shard in shards].index(True)
    argv = ["generate", "--prompts", "batch.jsonl", "--checkpoint", channels, *FLAGS]
    argv += ["--out", "made", "--share"]
    assert main([*argv, f"{1 - owner}/2"]) == 2
    assert f"made/{rows[0]['file']} cannot be read; its share" in capsys.readouterr().err
    assert main([*argv, f"{owner}/2"]) == 0


@pytest.mark.parametrize(
    ("change", "param", "sentence"),
    [
        ({"n": 11}, "n", "1 to 10, not 11."),
        ({"n": True}, "n", "1 to 10, not True."),
        ({"prompt": 3}, "prompt", "a text"),
        ({"size": "1024x1024"}, "size", '"auto" or "16x16", not '),
        ({"model": "gpt-image-1"}, "model", "not 'gpt-image-1'"),
        ({"style": "vivid"}, "style", "this field is not served."),
        ({"negative_prompt": "ugly"}, "negative_prompt", "this field is not served."),
        ({"stream": True}, "stream", "false, not True."),
        ({"output_format": "gif"}, "output_format", "not 'gif'"),
        ({"seed": -1}, "seed", "a whole number from 0 to 4294967295, not -1."),
        ({"seed": "1"}, "seed", "a whole number"),
        ({"guidance_scale": "2"}, "guidance_scale", "a number from 0 to 1000, not '2'."),
        ({"guidance_scale": math.inf}, "guidance_scale", "a number from 0 to 1000, not inf."),
        ({"guidance_scale": math.nan}, "guidance_scale", "a number from 0 to 1000, not nan."),
        ({"top_k": 10**400}, "top_k", "a number from 1 to 2147483647, not such a long one."),
        ({"top_k": 3.5}, "top_k", "a whole number, not 3.5."),
        ({"num_inference_steps": 0}, "num_inference_steps", "a number from 1 to 1000, not 0."),
        ({"num_inference_steps": True}, "num_inference_steps", "from 1 to 1000, not True."),
        ({"images": []}, "images", "this field is not served."),
        ({"url": EDITS}, "url", "this field is not served."),
    ],
)
def test_what_a_body_may_not_ask_for_is_named(change, param, sentence, channels, loaded):
    """And does not stop the others; nothing is passed over."""
    files = served(channels, line("bad", {"prompt": "a cat"} | change), code=1)
    (row,) = files["errors"]
    error = row["response"]["body"]["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert sentence in error["message"]
    assert files["output"] == []


@pytest.mark.parametrize(
    ("images", "param"),
    [
        (None, "images"),
        ([], "images"),
        ([{"image_url": "http://elsewhere/a.png"}], "images[0]"),
        ([{"file_id": "file-1"}], "images[0]"),
        ([{"image_url": "data:image/png;base64,???"}], "images[0]"),
        ([{"image_url": "data:image/png;base64,AAAA"}], "images[0]"),
    ],
)
def test_images_come_as_data_and_from_nowhere_else(images, param, channels, loaded):
    body = {"prompt": "x"} | ({} if images is None else {"images": images})
    (row,) = served(channels, line("bad", body, EDITS), code=1)["errors"]
    assert row["response"]["body"]["error"]["param"] == param


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([line("a", {}), line("a", {})], "line 2: the custom_id 'a' stands in a line before"),
        ([line("\ud800", {})], "line 1: the custom_id '\\ud800' is not UTF-8 text."),
        ([line("a", {}), '{"prompt": "a cat"}'], "line 2 has no `custom_id`."),
        ([line("a", {}), "{"], "line 2 is not JSON: Expecting property name"),
        ([line("a", {}), '{"custom_id": "b", "custom_id": "c"}'], "'custom_id' is there twice."),
        ([line(str(n), {}) for n in range(50_001)], "50001 lines; a batch file has 50000 at most"),
    ],
)
def test_a_file_that_is_no_batch_is_refused(lines, sentence, channels, loaded, capsys):
    pathlib.Path("batch.jsonl").write_text("\n".join(lines))
    argv = ["generate", "--prompts", "batch.jsonl", "--checkpoint", channels, "--out", "made"]
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err
    assert not pathlib.Path("made").exists()
