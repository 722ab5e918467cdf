"""Calls that wait: fairness, a full queue, clients that leave, time-outs, keys, and the end."""

import base64
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import openai
import pytest
from editing import CHANNELS, checkpoint

pytest.importorskip("starlette")  # of the extra [test] too
import serving
from serving import FEW, Held, pixels, until

from blip3o_jax.cli import main
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.serve import check_host
from blip3o_jax.request import Request
from blip3o_jax.serve import page
from blip3o_jax.serve.bodies import Asked
from blip3o_jax.serve.queue import Call, Queue, QueueFull

BODY = {"prompt": "a cat", **serving.QUICK}


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        yield threads


def asked(served, **how):
    """The images of a call over a connection of its own."""
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with client:
        return client.images.generate(prompt="a cat", **FEW, **how).data


def call(client, n=1, shape=("short",), is_batch=False):
    requests = [Request("a cat", index=index) for index in range(n)]
    return Call(client, Asked(requests, "png"), shape, print, is_batch)


def taken(queue, size):
    return [(item.call.client, item.request.index) for item in queue.take(size)]


def test_every_client_gets_one_image_before_anybody_gets_two():
    queue = Queue(64)
    for client, n in (("a", 4), ("b", 1), ("c", 2)):
        queue.put(call(client, n))
    assert taken(queue, 3) == [("a", 0), ("b", 0), ("c", 0)]
    assert taken(queue, 3) == [("a", 1), ("c", 1), ("a", 2)]
    assert taken(queue, 3) == [("a", 3)]


def test_a_batch_has_one_shape_that_of_who_waits_longest_and_batch_files_come_last():
    queue = Queue(64)
    late = call("late", 2, is_batch=True)
    queue.put(late)
    for client, shape in (("a", "short"), ("b", "long"), ("c", "short"), ("d", "long")):
        queue.put(call(client, 1, (shape,)))
    assert queue.ahead(late) == 4
    assert taken(queue, 8) == [("a", 0), ("c", 0), ("late", 0), ("late", 1)]
    assert taken(queue, 8) == [("b", 0), ("d", 0)]
    assert queue.ahead(late) is None


def test_a_queue_is_bounded_in_images_and_pixels(monkeypatch):
    queue = Queue(3)
    large = call("a", 5)
    queue.put(large)  # an empty queue takes any
    with pytest.raises(QueueFull):
        queue.put(call("b"))
    queue.put(call("b", is_batch=True))
    queue.cancel(large)
    queue.put(call("b", 3))
    with pytest.raises(QueueFull):
        queue.put(call("b"))
    monkeypatch.setattr("blip3o_jax.serve.queue.MOST_PIXELS", 150)
    queue, source = Queue(3), np.zeros((10, 10, 3), np.uint8)
    edit = Call("a", Asked([Request("a", (source,))], "png"), (), print)
    queue.put(edit)
    with pytest.raises(QueueFull):
        queue.put(edit)
    queue.close()
    assert queue.take(1) == []
    with pytest.raises(QueueFull):
        queue.put(call("a"))


def test_a_full_queue_says_when_to_come_again(served, pool, monkeypatch):
    monkeypatch.setattr(served.server.queue, "limit", 3)
    with Held(served) as held:
        first = pool.submit(asked, served, n=2)
        assert held.begun.wait(60)
        second = pool.submit(asked, served, n=3)
        until(lambda: len(served.server.queue) == 3)
        with pytest.raises(openai.RateLimitError, match="The queue is full") as error:
            asked(served)
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
        assert error.value.body["code"] == "rate_limit_exceeded"
    assert [len(future.result(60)) for future in (first, second)] == [2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_makes_room(stream, served):
    with Held(served) as held, socket.create_connection(served.address) as connection:
        body = json.dumps(BODY | {"n": 5, "stream": stream}).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert held.begun.wait(60)
        until(lambda: len(served.server.queue) == 3)
        connection.close()
        until(lambda: len(served.server.queue) == 0)
    until(lambda: served.server.open_calls == 0)
    assert len(asked(served, n=3)) == 3


def test_a_call_that_takes_too_long_is_given_up(served, monkeypatch):
    monkeypatch.setattr(served.server, "timeout", 0.2)
    with Held(served):
        with pytest.raises(
            openai.InternalServerError, match=r"not answered within 0\.2 s"
        ) as error:
            asked(served)
        assert error.value.status_code == 504
        stream = served.http.post("/v1/images/generations", json=BODY | {"stream": True}).text
        assert stream.endswith("\n\n")
        name, data = stream.split("\n")[-4:-2]
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: len(served.server.queue) == 0)


def test_a_model_that_fails_is_a_500_and_the_next_call_is_served(served, monkeypatch, caplog):
    with monkeypatch.context() as patch:

        def fail(*_):
            raise MemoryError("out of HBM")
            yield

        patch.setattr(served.server.pipeline, "run", fail)
        with pytest.raises(openai.InternalServerError, match="The model failed") as error:
            asked(served)
        assert "HBM" not in str(error.value)
        assert "out of HBM" in caplog.text
    assert len(asked(served)) == 1


def test_pages_of_other_sites_reach_nothing(served):
    """Neither by a form that a browser sends anywhere, nor by a name that means this machine."""
    port = served.url.rpartition(":")[2]
    for headers, status in (
        ({"origin": "http://elsewhere"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": f"http://localhost:{port}"}, 403),
        ({"host": f"elsewhere:{port}"}, 403),
        ({"host": f"127.0.0.1.elsewhere:{port}"}, 403),
        ({"origin": served.url}, 200),
        ({"host": f"localhost:{port}"}, 200),
        ({"host": f"[::1]:{port}", "origin": f"http://[::1]:{port}"}, 200),
    ):
        answer = served.http.get("/v1/models", headers=headers)
        assert answer.status_code == status, headers
    assert served.http.get("/health", headers={"host": "probe"}).status_code == 200


def test_the_page_comes_with_the_policy_that_it_is_tested_with(served):
    answer = served.http.get("/")
    assert answer.content == page.PAGE.read_bytes()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    # The policy under which the tests of the page use it: its own blocks, nothing from elsewhere.
    assert answer.headers["content-security-policy"] == page.policy(answer.text)


def test_unknown_routes_and_methods_are_errors_of_the_same_form(served):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/images/edits", 405),
        ("DELETE", "/v1/models", 405),
    ):
        answer = served.http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith(f"{method} {path}: ")


def test_keys_are_asked_for_and_what_comes_after_the_end_is_refused(pipeline, pool, tmp_path):
    """One server with two keys, until it is told to stop while a call waits."""
    with serving.served(pipeline, tmp_path, keys=("one", "two"), drain=60) as running:
        for key in ("one", "two"):
            answer = running.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        for header in ("Bearer three", "Bearer", "Bearer onetwo", "", "Bearer \xe9"):
            for path in ("/v1/models", "/metrics", "/nothing"):
                headers = {"authorization": header.encode("latin-1")}
                answer = running.http.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/openapi.json"):
            assert running.http.get(path, headers={"authorization": ""}).status_code == 200
        with Held(running) as held:
            waiting = pool.submit(running.http.post, "/v1/images/generations", json=BODY)
            assert held.begun.wait(60)
            running.process.handle_exit(signal.SIGTERM, None)
            until(lambda: running.server.batches.is_stopping)
            for path in ("/ready", "/v1/images/generations", "/v1/files", "/v1/batches"):
                method = "GET" if path == "/ready" else "POST"
                answer = running.http.request(method, path)
                assert answer.status_code == 503
                assert answer.json()["error"]["message"] == "The server stops."
            assert running.http.get("/health").status_code == 200
        assert len(waiting.result(60).json()["data"]) == 1
    assert running.process.cut_off == 0


@pytest.mark.parametrize(
    ("host", "has_keys", "sentence"),
    [
        ("127.0.0.1", False, ""),
        ("localhost", False, ""),
        ("::1", False, ""),
        ("0.0.0.0", True, ""),
        ("0.0.0.0", False, "open to others than this machine; add --api-key-file"),
        ("::", False, "open to others than this machine"),
        ("192.168.0.7", False, "open to others than this machine"),
        ("example.com", True, "is an IP address or localhost, not 'example.com'."),
    ],
)
def test_others_than_this_machine_need_keys(host, has_keys, sentence):
    if not sentence:
        check_host(host, has_keys)
        return
    with pytest.raises(InputError) as error:
        check_host(host, has_keys)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "open to others"),
        (["--api-key-file", "nowhere"], "The key file nowhere cannot be read"),
        (["--api-key-file", "empty"], "empty has no keys: write one a line."),
        (["--api-key-file", "strange"], "strange: key 2 is not of ASCII letters"),
        (["--port", "65536"], "--port is from 0 to 65535, not 65536."),
        (["--queue", "0"], "--queue is at least 1, not 0."),
        (["--timeout", "nan"], "--timeout is a number of seconds, not nan."),
        (["--drain", "-1"], "--drain is a number of seconds, not -1.0."),
        (["--batch-size", "0"], "--batch-size is at least 1, not 0."),
        (["--port", "TAKEN"], "cannot be listened at: Address already in use."),
        (["--checkpoint", "emoji_46", "--port", "0"], "did you mean 'emoji_64'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "strange").write_text("one\ntwo three\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", *(port if x == "TAKEN" else x for x in options)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_sigterm_ends_the_command_with_0_after_what_was_asked(tmp_path):
    """The command itself: ready, one image, a stop in the middle of a call."""
    folder = checkpoint(tmp_path / "tiny", CHANNELS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = ["serve", "--checkpoint", folder, "--port", str(port), "--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "blip3o_jax", *argv],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_FLAGS": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Ready" in line:
                break
        assert "Ready after" in lines[-1], lines
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            how = {"prompt": "a cat", "n": 10, "extra_body": {"num_inference_steps": 30}}
            answer = pool.submit(client.images.generate, **how)
            metrics = 'blip3o_seconds_count{stage="queue"}'
            until(lambda: metrics in serving.get(f"http://127.0.0.1:{port}/metrics"))
            process.send_signal(signal.SIGTERM)
            images = answer.result(120).data
        assert len(images) == 10
        assert pixels(images[0]).shape == (16, 16, 3)
        assert base64.b64decode(images[0].b64_json) != base64.b64decode(images[1].b64_json)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
