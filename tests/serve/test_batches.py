"""Files and batches as the official client uses them, on a server that others use too."""

import asyncio
import concurrent.futures
import errno
import json
import re

import numpy as np
import openai
import pytest
from editing import picture

pytest.importorskip("starlette")  # of the extra [test] too
import serving
from serving import QUICK, Held, data_url, pixels, png, until

from blip3o_jax.request import Request
from blip3o_jax.sample.settings import EditSettings, Settings
from blip3o_jax.serve import batches
from blip3o_jax.serve.bodies import EDITS, GENERATIONS
from blip3o_jax.serve.store import Store


def line(id_, body, url=GENERATIONS, **more):
    row = {"custom_id": id_, "method": "POST", "url": url, "body": {**body, **QUICK}}
    return json.dumps(row | more)


def uploaded(client, *lines):
    content = "\n".join(lines).encode()
    return client.files.create(file=("lines.jsonl", content), purpose="batch")


def begun(client, *lines, endpoint=GENERATIONS):
    file = uploaded(client, *lines)
    how = {"endpoint": endpoint, "completion_window": "24h", "metadata": {"a": "b"}}
    return client.batches.create(input_file_id=file.id, **how)


def ended(client, batch):
    """The batch at its end, and its lines of output and of errors by custom_id."""
    until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "cancelled"))
    batch = client.batches.retrieve(batch.id)
    results = []
    for id_ in (batch.output_file_id, batch.error_file_id):
        text = client.files.content(id_).text if id_ else ""
        rows = [json.loads(row) for row in text.splitlines()]
        results.append({row["custom_id"]: row["response"] for row in rows})
        assert len(results[-1]) == len(rows)
    return batch, *results


class image:
    """A row's image, as `pixels` takes it."""

    def __init__(self, response, place=0):
        self.b64_json = response["body"]["data"][place]["b64_json"]


def test_a_batch_gives_the_images_of_its_lines_and_the_errors_of_others(served, plain):
    client = served.client
    batch = begun(
        client,
        line("one", {"prompt": "a cat", "n": 2, "seed": 5}),
        line("two", {"prompt": "two red hearts", "output_format": "webp"}),
        line("three", {"prompt": "x", "style": "vivid"}),
        line("four", {"prompt": "x", "images": []}, EDITS),
        line("five", {"prompt": ""}),
        line("six", {"prompt": "x", "stream": True}),
        line("seven", {"prompt": "x"}, method="GET"),
    )
    assert (batch.object, batch.metadata, batch.status) == ("batch", {"a": "b"}, "validating")
    batch, output, errors = ended(client, batch)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (7, 2, 5)
    assert batch.created_at <= batch.in_progress_at <= batch.completed_at
    settings = Settings(**QUICK)
    requests = [Request("a cat", seed=5, index=i, settings=settings) for i in (0, 1)]
    requests.append(Request("two red hearts", settings=settings))
    given = [(output["one"], 0), (output["one"], 1), (output["two"], 0)]
    for sample, (row, place) in zip(plain.run(requests), given, strict=True):
        np.testing.assert_array_equal(pixels(image(row, place)), sample.image)
    params = {id_: row["body"]["error"]["param"] for id_, row in errors.items()}
    expected = {"three": "style", "four": "url", "five": "prompt", "six": "stream"}
    assert params == expected | {"seven": "method"}
    assert {row["status_code"] for row in errors.values()} == {400}
    message = errors["three"]["body"]["error"]["message"]
    assert message == "lines.jsonl line 3: style: this field is not served."
    assert batch.id in [other.id for other in client.batches.list()]


def test_images_of_edits_may_be_files(served, plain):
    source = picture(20, 30)
    file = served.client.files.create(file=("a.png", png(source)), purpose="vision")
    edit = {"prompt": "make it blue", "images": [{"file_id": file.id}]}
    gone = edit | {"images": [{"file_id": "file-1"}]}
    batch = begun(served.client, line("a", edit, EDITS), line("b", gone, EDITS), endpoint=EDITS)
    _, output, errors = ended(served.client, batch)
    request = Request("make it blue", (source,), settings=EditSettings(**QUICK))
    (sample,) = plain.run([request])
    np.testing.assert_array_equal(pixels(image(output["a"])), sample.image)
    error = errors["b"]["body"]["error"]
    assert (error["param"], "there is no file 'file-1'" in error["message"]) == ("images[0]", True)


def test_files_are_listed_read_and_deleted(served):
    client = served.client
    made = [uploaded(client, str(number)) for number in range(3)]
    listed = [file.id for file in client.files.list(limit=2)]  # page after page
    assert listed[:3] == [file.id for file in reversed(made)]
    first = client.files.retrieve(made[0].id)
    assert (first.bytes, first.filename, first.purpose) == (1, "lines.jsonl", "batch")
    assert client.files.content(made[2].id).text == "2"
    assert client.files.delete(made[0].id).deleted
    # Those of one purpose, from either end; what is asked for is never passed over.
    picture = client.files.create(file=("a.png", b"x"), purpose="vision")
    assert picture.id not in [file.id for file in client.files.list(purpose="batch")]
    (first, *_) = client.files.list(purpose="vision", order="desc")
    assert first.id == picture.id
    oldest = [file.id for file in client.files.list(order="asc", limit=2)]
    assert oldest == [file.id for file in client.files.list()][::-1]
    refused = [("files", "order", "up"), ("files", "purpose", "fine-tune"), ("files", "page", "2")]
    refused += [("files", "after", made[0].id), ("batches", "after", "batch_1")]
    for kind, name, value in [*refused, ("batches", "order", "asc"), ("batches", "limit", "0")]:
        answer = served.http.get(f"/v1/{kind}", params={name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    with pytest.raises(openai.NotFoundError, match="There is no file"):
        client.files.retrieve(made[0].id)
    for name in ("..", "file-1", f"{made[1].id}.json", "%2e%2e%2fbatches"):
        assert served.http.get(f"/v1/files/{name}/content").status_code == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"output_expires_after": {}}, "output_expires_after"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"input_file_id": "file-1"}, "id"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(change, param, served):
    body = {"input_file_id": uploaded(served.client, "").id, "endpoint": GENERATIONS}
    body |= {"completion_window": "24h"} | change
    answer = served.http.post("/v1/batches", json=body)
    assert answer.status_code == (404 if param == "id" else 400)
    assert answer.json()["error"]["param"] == param


def test_an_upload_that_cannot_be_is_refused(served):
    for data, files, param in (
        ({"purpose": "fine-tune"}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "batch"}, {"other": ("a", b"x")}, "other"),
        ({"purpose": "batch", "x": "y"}, {"file": ("a", b"x")}, "x"),
    ):
        answer = served.http.post("/v1/files", data=data, files=files)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_file_that_is_no_batch_fails_with_its_line(served):
    batch, *_ = ended(served.client, begun(served.client, line("a", {}), line("a", {})))
    assert batch.status == "failed"
    (error,) = batch.errors.data
    assert error.message == "lines.jsonl line 2: the custom_id 'a' stands in a line before."
    batch, *_ = ended(served.client, begun(served.client, line("a", {}), line("\ud800", {})))
    (error,) = batch.errors.data
    assert error.message == "lines.jsonl line 2: the custom_id '\\ud800' is not UTF-8 text."


def test_neither_a_full_disk_nor_a_damaged_record_ends_the_work(tmp_path, monkeypatch, caplog):
    """What could not be recorded is once there is room; until then the next batch waits."""
    store = Store(tmp_path)
    file = store.add_file(line("a", {}).encode(), "lines.jsonl", "batch")
    ids = [store.new_id("batches") for _ in range(3)]
    batch = {"endpoint": GENERATIONS, "status": "validating", "expires_at": 1 << 40}
    for id_ in ids:
        store.write("batches", batch | {"id": id_, "input_file_id": file["id"]})
    # One is damaged as it waits, one was at the start already.
    damaged = tmp_path / "batches" / f"{ids[1]}.json"
    damaged.write_text("")

    async def answer(*_):
        return 200, {}

    worker, write, tries = batches.Batches(store, answer, 2), store.write, []
    worker._waiting.append(ids[1])

    def full(*what):
        tries.append(what)
        if len(tries) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*what)

    async def works():
        work = asyncio.ensure_future(worker.run())
        while not (work.done() or store.read("batches", ids[2])["status"] == "completed"):
            await asyncio.sleep(0.01)
        worker.is_stopping = True
        await work

    monkeypatch.setattr(store, "write", full)
    monkeypatch.setattr(batches, "TICK", 0.01)
    asyncio.run(asyncio.wait_for(works(), 60))
    listed = {row["id"]: row["status"] for row in store.list("batches")}
    assert listed == {ids[2]: "completed", ids[0]: "failed"}
    assert {fields["id"] for kind, fields in tries[:4]} == {ids[0]}
    assert f"Left out: {damaged} is not JSON" in caplog.text
    assert "not recorded yet: [Errno 28] No space left on device." in caplog.text


def test_a_cancelled_batch_gives_what_is_done(served):
    lines = [line(str(number), {"prompt": "a cat"}) for number in range(40)]
    with Held(served) as held:
        batch = begun(served.client, *lines)
        assert held.begun.wait(60)
        assert served.client.batches.cancel(batch.id).status == "cancelling"
    batch, output, errors = ended(served.client, batch)
    assert (batch.status, errors) == ("cancelled", {})
    assert 1 <= len(output) == batch.request_counts.completed < 40
    with pytest.raises(openai.ConflictError, match="is cancelled already"):
        served.client.batches.cancel(batch.id)


def test_a_restart_goes_on_where_a_batch_was_left(pipeline, tmp_path):
    """With one line that is done, and one that was half written when the process was killed."""
    store = Store(tmp_path)
    lines = "\n".join(line(str(number), {"prompt": "a cat"}) for number in range(3))
    file = store.add_file(lines.encode(), "lines.jsonl", "batch")
    id_ = store.new_id("batches")
    batch = {"id": id_, "object": "batch", "endpoint": GENERATIONS, "status": "in_progress"}
    batch |= {"input_file_id": file["id"], "created_at": 1, "expires_at": 1 << 40}
    store.write("batches", batch | {"completion_window": "24h"})
    done = {"custom_id": "1", "response": {"status_code": 200, "body": "as it was"}}
    store.results(id_, "output").write_text(json.dumps(done) + '\n{"custom_id": "2", "resp')
    with serving.served(pipeline, tmp_path) as running:
        (batch,) = running.client.batches.list()
        batch, output, _ = ended(running.client, batch)
    assert output["1"]["body"] == "as it was"
    assert sorted(output) == ["0", "1", "2"]
    assert re.fullmatch(r"[A-Za-z0-9+/]+=*", output["2"]["body"]["data"][0]["b64_json"])
    assert (batch.request_counts.total, batch.request_counts.completed) == (3, 3)


def test_a_stop_in_the_middle_of_a_batch_loses_and_doubles_nothing(pipeline, tmp_path):
    lines = [line(str(number), {"prompt": "a cat"}) for number in range(16)]
    lines = [
        text.replace('"num_inference_steps": 2', '"num_inference_steps": 300') for text in lines
    ]

    def done(client, batch):
        return client.batches.retrieve(batch.id).request_counts.completed

    with serving.served(pipeline, tmp_path) as running:
        batch = begun(running.client, *lines)
        until(lambda: done(running.client, batch) >= 1)
    store = Store(tmp_path)
    assert store.read("batches", batch.id)["status"] == "in_progress"
    before = store.done(batch.id)
    assert 1 <= len(before) < 16
    with serving.served(pipeline, tmp_path) as running:
        batch, output, errors = ended(running.client, batch)
    assert (len(output), errors, batch.request_counts.completed) == (16, {}, 16)


def test_a_call_comes_before_the_lines_of_a_batch(served):
    lines = [line(str(number), {"prompt": "a cat"}) for number in range(9)]
    with Held(served) as held:
        batch = begun(served.client, *lines)
        assert held.begun.wait(60)
        until(lambda: len(served.server.queue._items) >= 2)
        edit = {"prompt": "blue", "images": [{"image_url": data_url(picture(8, 8))}], **QUICK}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(served.http.post, EDITS, json=edit)
            until(lambda: len(served.server.queue) == 1)
            held.free.set()
            assert answer.result(60).status_code == 200
        until(lambda: len(held.batches) >= 3)
    assert [bool(own[0].images) for own in held.batches[:3]] == [False, True, False]
    assert ended(served.client, batch)[0].status == "completed"
