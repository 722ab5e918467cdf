"""A reward server: what it may answer, what it may be called, and how often it is asked."""

import http.server
import json
import math
import threading
from typing import ClassVar

import numpy as np
import pytest

from blip3o_jax.errors import InputError
from blip3o_jax.rl import rewards

IMAGES = [np.zeros((4, 4, 3), np.uint8)] * 2


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with the bytes of `answer`, as they are."""

    answer: ClassVar[bytes] = b""
    asked: ClassVar[int] = 0

    def do_POST(self):
        type(self).asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def ask(monkeypatch):
    """Asks a server that gives these bytes after the head, or instead of it."""
    monkeypatch.setattr(rewards.time, "sleep", lambda _: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(body, head="HTTP/1.0 200 OK\r\n\r\n"):
        Server.answer, Server.asked = head.encode() + body.encode(), 0
        reward = rewards.named(f"http://127.0.0.1:{server.server_port}/")
        return reward(IMAGES, ["a cat"] * 2, [{}] * 2, [[]] * 2)

    yield ask
    server.shutdown()
    server.server_close()


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


CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n"


@pytest.mark.parametrize("head", ["nothing of HTTP\r\n", CHUNKED])
def test_an_answer_that_is_cut_or_no_http_is_asked_for_again_and_then_a_sentence(head, ask):
    with pytest.raises(InputError, match=r"The reward server .* fails: "):
        ask("{", head)
    assert Server.asked == rewards.TRIES


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
        rewards.named(url)
    assert str(error.value).startswith(
        f"The reward server {url!r} names no host; write http://HOST"
    )


@pytest.mark.parametrize("url", ["http://h", "https://a.b:8000/c?d=%20", "http://[::1]:80/x"])
def test_a_name_that_a_server_can_have_is_taken(url):
    assert rewards.named(url).args == (url,)
