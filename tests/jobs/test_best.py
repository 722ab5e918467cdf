"""Jobs that choose by rewards: what is kept, what is refused, and what a server may do."""

import base64
import http.server
import importlib.util
import io
import json
import pathlib
import threading
from typing import ClassVar

import numpy as np
import pytest
from asking import generate, manifest
from editing import FLAGS
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.jobs import work
from blip3o_jax.rl.rewards import http as http_reward
from blip3o_jax.rl.rewards import ocr

pytestmark = pytest.mark.usefixtures("small")


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers with how blue an image is; with what `says` holds first."""

    says: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]]
        assert len(images) == len(body["prompts"]) == len(body["metadata"])
        rewards = [float(np.asarray(image)[..., 2].mean()) for image in images]
        code, answer = self.says.pop(0) if self.says else (200, {"rewards": rewards})
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    Judge.says.clear()
    server.shutdown()
    server.server_close()


def test_the_best_of_several_is_kept_and_says_which_one_it_is(channels, judge):
    """The server fails once, which is no reason to give up."""
    Judge.says.append((503, {}))
    assert generate(channels, "--num-images", "4", out="all") == 0
    options = ["--num-images", "2", "--best-of", "2", "--reward", judge]
    assert generate(channels, *options, out="best") == 0
    every = {}
    for row in manifest("all"):
        with Image.open(pathlib.Path("all") / row["file"]) as image:
            every[row["id"], row["index"]] = np.asarray(image)
    for row in manifest("best"):
        places = [2 * row["index"], 2 * row["index"] + 1]
        blue = [every[row["id"], place][..., 2].mean() for place in places]
        assert row["candidate"] == places[int(np.argmax(blue))]
        assert row["rewards"] == pytest.approx(blue)
        assert row["reward"] == max(row["rewards"])
        with Image.open(pathlib.Path("best") / row["file"]) as image:
            np.testing.assert_array_equal(np.asarray(image), every[row["id"], row["candidate"]])


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ((404, {}), "fails: HTTP Error 404"),
        ((200, {"rewards": [1.0]}), "gives 1 reward for 2 images."),
        ((200, {"scores": []}), "its answer has no list `rewards`."),
        ((200, {"rewards": [None, None]}), "the reward has nothing to say of its images."),
    ],
)
def test_a_request_that_cannot_be_judged_fails_alone(says, sentence, channels, judge):
    pathlib.Path("prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}')
    Judge.says.append(says)
    assert generate(channels, "--best-of", "2", "--reward", judge) == work.FAILED
    first, second = manifest()
    assert sentence in first["error"]
    assert second["candidate"] in (0, 1)


def test_a_server_that_is_away_ends_the_job_which_goes_on_when_it_is_back(
    channels, judge, capsys, never, monkeypatch
):
    monkeypatch.setattr(http_reward.time, "sleep", lambda _: None)
    options = ["--reward", judge, "--batch-size", "2"]
    assert generate(channels, *options, out="whole") == 0
    # The third request finds nobody.
    busy = (503, {})
    image = (200, {"rewards": [1.0]})
    Judge.says += [image, image, busy, busy, busy]
    assert generate(channels, *options) == 2
    error = capsys.readouterr().err
    assert f"The reward server {judge} fails: HTTP Error 503" in error
    assert error.endswith("; the same command makes the rest.\n")
    assert main(["generate", "--out", "made", "--status"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 2
    assert generate(channels, *options) == 0
    files = [row["file"] for row in manifest()]
    assert files == [row["file"] for row in manifest("whole")]
    # Nobody there from the start is known before anything is loaded.
    never()
    options[1] = "http://127.0.0.1:9/"
    assert generate(channels, *options, out="none") == 2
    assert "The reward server http://127.0.0.1:9/ fails: " in capsys.readouterr().err
    assert not pathlib.Path("none").exists()


def test_rewards_that_cannot_be_are_refused(channels, capsys, never, monkeypatch):
    never()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rapidocr" else find(name)
    )
    for options, sentence in {
        ("--best-of", "0"): "--best-of is at least 1",
        ("--best-of", "2"): "--best-of needs a --reward",
        ("--reward", "scene"): "There is no reward 'scene'; did you mean 'scenes'?",
        (
            "--reward",
            "scenes",
            "--reward",
            "ocr",
        ): "The reward 'ocr' needs the extra [ocr]; install",
        ("--reward", "http://"): "The reward server 'http://' names no host;",
    }.items():
        assert generate(channels, *options) == 2
        assert sentence in capsys.readouterr().err


def test_prompts_that_a_reward_cannot_judge_are_refused_before_there_are_images(
    channels, capsys, never, monkeypatch
):
    """A typed one ends the command, one of a file fails alone."""
    never()
    monkeypatch.setattr(ocr, "check_extra", lambda: None)
    monkeypatch.setattr(ocr, "read", lambda image: "cat")
    options = ["--checkpoint", channels, *FLAGS, "--out", "made"]
    for reward, sentence in {
        "ocr": "reads what a prompt has in double quotes, and 'a cat' has nothing there.",
        "strict": "'a cat' has no metadata of GenEval (`tag`, `include`) to judge it by.",
        "edit_done": "The reward 'edit_done' is of the edits of `blip3o-jax grpo`;",
    }.items():
        assert main(["generate", "a cat", *options, "--reward", reward]) == 2
        assert sentence in capsys.readouterr().err
        assert not pathlib.Path("made").exists()
    pathlib.Path("prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}')
    assert generate(channels, "--reward", "ocr") == work.FAILED
    assert all("double quotes" in row["error"] for row in manifest())


def test_what_a_reward_is_told_is_a_part_of_the_job(channels, judge, capsys):
    file = pathlib.Path("prompts.jsonl")
    row = {"prompt": "a cat", "include": [{"class": "cat", "count": 2}]}
    for options, code in ((["--reward", judge], 2), ([], 0)):
        out = f"out-{code}"
        file.write_text(json.dumps(row))
        assert generate(channels, *options, out=out) == 0
        assert generate(channels, *options, out=out) == 0
        file.write_text(json.dumps(row | {"include": [{"class": "cat", "count": 3}]}))
        capsys.readouterr()
        assert generate(channels, *options, out=out) == code
        refused = "out-2 holds a job with input " in capsys.readouterr().err
        assert refused == bool(options)


def test_the_best_by_words_and_the_mean_of_several_rewards(channels, judge, monkeypatch):
    monkeypatch.setattr(ocr, "check_extra", lambda: None)
    monkeypatch.setattr(ocr, "read", lambda image: "cat" if image[0, 0, 0] % 2 else "cut")
    pathlib.Path("prompts.jsonl").write_text('{"prompt": "the word \\"CAT\\""}')
    options = ["--best-of", "3", "--reward", "ocr"]
    assert generate(channels, *options) == 0
    (row,) = manifest()
    assert set(row["rewards"]) <= {1.0, 1 - 1 / 3}
    assert row["reward"] == max(row["rewards"])
    Judge.says.append((200, {"rewards": [3.0, None, 5.0]}))
    assert generate(channels, *options, "--reward", judge, out="both") == 0
    (both,) = manifest("both")
    by_words, by_server = np.array(row["rewards"]), np.array([3.0, 0.0, 5.0])
    np.testing.assert_allclose(both["rewards"], (by_words + by_server) / 2)
    assert both["candidate"] == 2
    # Its results are of these rewards and no other ones.
    assert generate(channels, *options, out="both") == 2
