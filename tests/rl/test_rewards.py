"""A reward server: what it is sent, what it may answer, what it may be called, and how often it is
asked."""

import base64
import http.server
import io
import json
import math
import os
import pickle
import threading
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.errors import InputError
from blip3o_jax.rl.rewards import http as client
from blip3o_jax.rl.rewards.protocol import named
from blip3o_jax.scenes import edits
from blip3o_jax.scenes.config import WorldConfig

IMAGES = [np.zeros((4, 4, 3), np.uint8)] * 2


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with the bytes of `answer`, as they are."""

    answer: ClassVar[bytes] = b""
    asked: ClassVar[int] = 0
    body: ClassVar[bytes] = b""

    def do_POST(self):
        type(self).asked += 1
        type(self).body = self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()
    running.server_close()


@pytest.fixture
def ask(monkeypatch, server):
    """Asks a server that gives these bytes after the head, or instead of it."""
    monkeypatch.setattr(client.time, "sleep", lambda _: None)

    def ask(body, head="HTTP/1.0 200 OK\r\n\r\n"):
        Server.answer, Server.asked = head.encode() + body.encode(), 0
        return named(server)(IMAGES, ["a cat"] * 2, [{}] * 2, [[]] * 2)

    return ask


def test_numbers_and_null_are_rewards(ask):
    one, two = ask('{"rewards": [3, null]}')
    assert one == 3.0
    assert math.isnan(two)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (json.dumps({"rewards": [10**400, 1]}), "a reward is a number, not such a long one."),
        ('{"rewards": [1, NaN]}', "a reward is a number, not nan."),
        ('{"rewards": [1, Infinity]}', "a reward is a number, not inf."),
        ('{"rewards": [1, 1e999]}', "a reward is a number, not inf."),
        ('{"rewards": [true, 1]}', "a reward is a number, not True."),
        ('{"rewards": ["1", 1]}', "a reward is a number, not '1'."),
        ('{"rewards": {"0": 1}}', "its answer has no list `rewards`."),
        ('{"rewards": [1], "rewards": [1, 2]}', "the key 'rewards' is there twice."),
        ('{"rewards": [1]}', "it gives 1 reward for 2 images."),
        (f'{{"rewards": [{"1" * 5000}, 1]}}', "its answer is not JSON: Exceeds the limit"),
        ("[1, 2]", "its answer is not a JSON object."),
        ("\xff", "its answer is not JSON"),
        ("[" * 100_000, "its answer is not JSON: it is nested too deeply."),
        ("", "its answer is not JSON: Expecting value"),
    ],
)
def test_any_other_answer_is_one_sentence(answer, sentence, ask):
    with pytest.raises(InputError, match=r"The reward server http://127.0.0.1:\d+/: ") as error:
        ask(answer)
    assert sentence in str(error.value)
    assert Server.asked == 1


ASKED = {"tag": "colors", "include": [{"class": "cat", "count": 1}]}
SCORES = {"scores": [1.0, -0.5], "rewards": [1, 0], "group_rewards": {"colors": [0.5]}}


def test_the_server_of_geneval_is_asked_in_its_own_protocol(server):
    Server.answer = b"HTTP/1.0 200 OK\r\n\r\n" + pickle.dumps(SCORES)
    asked = ASKED | {"ground": "gray"}
    reward = named(f"geneval+{server}")
    assert reward(IMAGES, ["a cat", "cats"], [asked] * 2, [[]] * 2) == [1.0, -0.5]
    body = pickle.loads(Server.body)
    assert body["only_strict"] is False
    names = "tag", "include"
    rows = [{"prompt": prompt, **{x: asked[x] for x in names}} for prompt in ("a cat", "cats")]
    assert body["meta_datas"] == rows
    with Image.open(io.BytesIO(body["images"][0])) as image:
        assert (image.format, image.size) == ("JPEG", (4, 4))
    with pytest.raises(InputError, match=r"^'cats' has no metadata of GenEval"):
        reward(IMAGES, ["a cat", "cats"], [asked, {"tag": "colors"}], [[]] * 2)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (pickle.dumps({"scores": [1.0, os.getpid]}), "its answer cannot be read: posix.getpid is"),
        (pickle.dumps({"scores": np.ones(2)}), "its answer cannot be read: numpy"),
        (pickle.dumps([1.0, 2.0]), "its answer cannot be read: list indices must be"),
        (pickle.dumps({"scores": [1.0]}), "it gives 1 score for 2 images."),
        (pickle.dumps({"scores": [1.0, math.nan]}), "a score is a number, not nan."),
        (pickle.dumps(SCORES)[:-9], "its answer cannot be read: "),
        (b"", "its answer cannot be read: "),
    ],
)
def test_a_pickle_is_read_for_numbers_alone(answer, sentence, server):
    Server.answer = b"HTTP/1.0 200 OK\r\n\r\n" + answer
    with pytest.raises(InputError) as error:
        named(f"geneval+{server}")(IMAGES, ["a cat"] * 2, [ASKED] * 2)
    assert str(error.value).startswith(f"The reward server {server}: {sentence}")


@pytest.mark.parametrize(("code", "error"), [(503, client.Unreachable), (500, InputError)])
def test_a_server_that_is_busy_is_away_and_one_that_fails_is_not(code, error, ask):
    with pytest.raises(InputError, match=rf"fails: HTTP Error {code}") as raised:
        ask("", f"HTTP/1.0 {code} Sorry\r\n\r\n")
    assert raised.type is error
    assert Server.asked == (3 if error is client.Unreachable else 1)


CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n"


@pytest.mark.parametrize("head", ["nothing of HTTP\r\n", CHUNKED])
def test_an_answer_that_is_cut_or_no_http_is_asked_for_again_and_then_a_sentence(head, ask):
    with pytest.raises(InputError, match=r"The reward server .* fails: "):
        ask("{", head)
    assert Server.asked == 1 + len(client.PAUSES)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///path",
        "http://:80/path",
        "http://host:x/",
        "http://host:99999/",
        "http://[::1/",
        "http://ho st/",
        "http://host/a b",
        "http://host/\n",
        "https://h\u00f6st/",
    ],
)
def test_a_name_that_no_server_has_is_refused_at_once(url):
    with pytest.raises(InputError) as error:
        named(url)
    assert str(error.value).startswith(
        f"The reward server {url!r} names no host; write http://HOST"
    )


@pytest.mark.parametrize("url", ["http://h", "https://a.b:8000/c?d=%20", "http://[::1]:80/x"])
def test_a_name_that_a_server_can_have_is_taken(url):
    assert named(url, 5.0).args == (url, 5.0)


def test_an_edit_is_sent_with_its_source_apart(server):
    Server.answer = b'HTTP/1.0 200 OK\r\n\r\n{"rewards": [1, 2]}'
    edit = edits.sample(WorldConfig(seed=3), 0)
    source = np.full((4, 4, 3), 9, np.uint8)
    asked = [{"prompt": edit.instruction, "source": source, "edit": edit}, {"prompt": "a cat"}]
    # None of the judge's rewards, whose pictures are larger.
    rewards = named(server)(IMAGES, ["a", "b"], asked, [[source], []])
    assert rewards == [1.0, 2.0]
    body = json.loads(Server.body)
    facts, plain = body["metadata"]
    assert plain == {"prompt": "a cat"}
    assert facts["edit"]["instruction"] == edit.instruction
    assert "source" not in facts
    (picture,), nothing = body["sources"]
    assert nothing == []
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        np.testing.assert_array_equal(np.asarray(image), source)
