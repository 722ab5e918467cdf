"""What a server refuses, and how: every answer is OpenAI's error, and no call harms another."""

import http.client
import json
import tempfile
import zlib

import numpy as np
import openai
import pytest
from editing import picture

pytest.importorskip("starlette")  # of the extra [test] too
from serving import QUICK, data_url, png

from blip3o_jax.serve import forms
from blip3o_jax.serve.bodies import EDITS, GENERATIONS

IMAGE = [{"image_url": data_url(picture(8, 8))}]


@pytest.mark.parametrize(
    ("change", "param", "sentence"),
    [
        ({"prompt": None}, "prompt", "a text, which is missing."),
        ({"prompt": " "}, "prompt", "The prompt is empty"),
        ({"prompt": "cat " * 400}, "prompt", "more than the 64 allowed"),
        ({"prompt": "a <S0>"}, "prompt", "the control token <S0>"),
        ({"prompt": "\ud800"}, "prompt", "is not UTF-8 text"),
        ({"\ud800": 1}, "\ud800", "this field is not served."),
        ({"n": 11}, "n", "1 to 10, not 11."),
        ({"n": 1.0}, "n", "1 to 10, not 1.0."),
        ({"size": "1024x1024"}, "size", '"auto" or "16x16", not '),
        ({"model": "gpt-image-1"}, "model", "not 'gpt-image-1'."),
        ({"response_format": "url"}, "response_format", '"b64_json", not '),
        ({"background": "transparent"}, "background", "not 'transparent'."),
        ({"output_format": "svg"}, "output_format", '"png" or "jpeg" or "webp", not '),
        ({"output_compression": 50}, "output_compression", "of jpeg and webp; a png has none."),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression", "0 to 100"),
        ({"stream": "yes"}, "stream", "true or false, not 'yes'."),
        ({"partial_images": 1}, "partial_images", "these come with stream true alone."),
        ({"partial_images": 4, "stream": True}, "partial_images", "0 to 3, not 4."),
        ({"negative_prompt": "ugly"}, "negative_prompt", "this field is not served."),
        ({"style": "vivid"}, "style", "this field is not served."),
        ({"images": IMAGE}, "images", "this field is not served."),
        ({"mask": IMAGE[0]}, "mask", "this field is not served."),
        ({"user": 3}, "user", "a text."),
        ({"seed": -1}, "seed", "a whole number from 0 to 4294967295, not -1."),
        ({"top_k": 5}, "top_k", "1200, which this server compiled, not 5."),
        ({"guidance_scale": float("nan")}, "guidance_scale", "a number from 0 to 1000, not nan."),
        ({"num_inference_steps": 1001}, "num_inference_steps", "from 1 to 1000, not 1001."),
    ],
)
def test_a_field_that_is_not_served_is_named(change, param, sentence, served):
    body = json.dumps({"prompt": "a cat"} | change)
    headers = {"content-type": "application/json"}
    answer = served.http.post(GENERATIONS, content=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].startswith(f"{param}: ")
    assert sentence in error["message"]
    assert answer.headers["x-request-id"].startswith("req_")


NO_ALPHA = data_url(picture(8, 8))


@pytest.mark.parametrize(
    ("change", "param", "sentence"),
    [
        ({"images": None}, "images", "a list of {image_url} or {file_id}."),
        ({"images": [{"file_id": "file-1"}]}, "images[0]", "there is no file 'file-1'."),
        ({"images": IMAGE * 2}, "images", "2 source images for one edit; the checkpoint takes 1."),
        ({"images": [{"image_url": "http://elsewhere/a.png"}]}, "images[0]", "is a data URL"),
        ({"images": [{"image_url": "data:image/png;base64,é"}]}, "images[0]", "cannot be used"),
        ({"images": [{"image_url": "data:image/png;base64,AAAA"}]}, "images[0]", "is unknown."),
        ({"images": [IMAGE[0] | {"detail": 1}]}, "images[0].detail", "this field is not served."),
        ({"images": [{"image_url": data_url(picture(1, 8193))}]}, "images[0]", "than 8192 on a"),
        ({"mask": {"image_url": NO_ALPHA}}, "mask", "it has no alpha channel."),
        ({"mask": NO_ALPHA}, "mask", "image_url is a data URL"),
        (
            {"mask": {"image_url": data_url(np.zeros((8, 9, 4), np.uint8))}},
            "mask",
            "The mask is 9 x 8 pixels and the first image 8 x 8 pixels; make them the same size.",
        ),
        ({"size": "8x8"}, "size", '"auto", not '),
        ({"renorm_min": 0.5}, "renorm_min", "1.0, which this server compiled, not 0.5."),
        ({"reference_quirks": True}, "reference_quirks", "false, which this server compiled"),
        ({"image": "x"}, "image", "this field is not served."),
    ],
)
def test_an_image_that_is_not_served_is_named(change, param, sentence, served):
    answer = served.http.post(EDITS, json={"prompt": "blue", "images": IMAGE} | QUICK | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert sentence in error["message"]


def test_pixels_are_limited_before_they_are_decoded(served):
    width, height = 8000, 4000  # above the 16.7 million of a server
    data = png(np.zeros((1, 1, 3), np.uint8))
    start = data.index(b"IHDR")
    header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + data[start + 12 : start + 17]
    large = data[:start] + header + zlib.crc32(header).to_bytes(4) + data[start + 21 :]
    with pytest.raises(openai.BadRequestError, match="more than 16,777,216 pixels"):
        served.client.images.edit(image=large, prompt="blue")


FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "sentence"),
    [
        (b"{", {"content-type": "application/json"}, 400, "The body is not JSON"),
        (b"[]", {"content-type": "application/json"}, 400, "is not a JSON object"),
        (b"\xff", {"content-type": "application/json"}, 400, "it is not UTF-8 text"),
        (b'{"n": 1, "n": 2}', {"content-type": "application/json"}, 400, "'n' is there twice"),
        (b"[" * 100_000, {"content-type": "application/json"}, 400, "nested too deeply"),
        (b"prompt=x", {"content-type": "text/plain"}, 415, "application/json or multipart"),
        (b"", {}, 415, "not missing."),
        (b"nothing", FORM, 400, "The body is not a form"),
        (b"--x\r\n\r\n", FORM, 400, "The body is not a form"),
        (b"", {"content-type": "multipart/form-data"}, 400, "Missing boundary"),
        (b"{}", {"content-type": "application/json", "content-length": "9" * 9}, 413, "more than"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(content, headers, status, sentence, served):
    answer = raw(served, EDITS, content, headers)
    assert answer[0] == status
    assert sentence in answer[1]["error"]["message"]


def raw(served, path, content, headers, method="POST"):
    """The status and body of a request whose headers are just these."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(content)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_a_form_is_held_to_its_fields(served):
    image = ("a.png", png(picture(8, 8)))
    cases = [
        ({"prompt": "x"}, [], "images", "a list of"),
        ({"prompt": ["x", "y"]}, [("image", image)], "prompt", "this field is there twice."),
        ({"prompt": "x", "images": "y"}, [("image", image)], "images", "are `image` or `image[]`"),
        ({"prompt": "x", "image": "y"}, [], "image", "a file, not a text."),
        ({"prompt": "x"}, [("image", image), ("prompt2", image)], "prompt2", "a file, which only"),
        ({"prompt": "x", "n": "many"}, [("image", image)], "n", "1 to 10, not 'many'."),
        ({"prompt": "x"}, [("image", image)] * 2, "images", "the checkpoint takes 1."),
    ]
    for data, files, param, sentence in cases:
        if files:
            answer = served.http.post(EDITS, data=data, files=files)
            status, body = answer.status_code, answer.json()
        else:
            status, body = raw(served, EDITS, form(data), FORM)
        error = body["error"]
        assert (status, error["param"]) == (400, param)
        assert sentence in error["message"]


def form(fields: dict) -> bytes:
    parts = [
        f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    return "".join([*parts, "--x--\r\n"]).encode()


def test_a_body_that_grows_beyond_the_limit_is_cut_off(served, monkeypatch):
    monkeypatch.setattr(forms.read_bytes, "__defaults__", (1000,))
    chunks = (b" " * 400 for _ in range(5))
    headers = {"content-type": "application/json"}
    answer = served.http.post(GENERATIONS, content=chunks, headers=headers)
    assert (answer.status_code, "more than 1000 bytes" in answer.text) == (413, True)


def test_a_thousand_malformed_bodies_are_refused_and_leave_nothing(
    served, caplog, monkeypatch, tmp_path
):
    """Valid bodies with bytes changed, cut off or doubled: JSON and forms, in turn."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    picture_of = png(picture(8, 8))
    valid = [
        (json.dumps({"prompt": "x", "n": 1, "images": IMAGE, **QUICK}).encode(), {}),
        (
            form({"prompt": "x", "n": 2, "seed": 3, "stream": "true", "num_inference_steps": 2}),
            FORM,
        ),
        (
            form({"prompt": "x", "num_inference_steps": 2})[: -len("--x--\r\n")]
            + b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
            + picture_of
            + b"\r\n--x--\r\n",
            FORM,
        ),
    ]
    statuses = []
    for number in range(1000):
        body, headers = valid[number % 3]
        data = bytearray(body)
        for _ in range(int(rng.integers(1, 6))):
            place, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
            kind = int(rng.integers(3))
            if kind == 0:
                data[place : place + length] = rng.bytes(length)
            elif kind == 1:
                del data[place : place + 8 * length]
            else:
                data[place:place] = data[place : place + 8 * length]
            data = data or bytearray(b"x")
        answer = served.http.post(
            EDITS,
            content=bytes(data),
            headers={"content-type": "application/json", "connection": "keep-alive"} | headers,
        )
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
            assert "Traceback" not in answer.text
    assert set(statuses) == {200, 400}
    assert statuses.count(400) > 700
    assert [record for record in caplog.records if record.exc_info] == []
    assert list(tmp_path.iterdir()) == []
