"""The OpenAPI document, held against what the server does, and the examples of docs/serve.md."""

import collections
import json
import shlex
import shutil
import subprocess
import warnings

import pytest
from editing import picture
from test_docs import ROOT, blocks

pytest.importorskip("schemathesis")  # of the extra [test] too
pytest.importorskip("starlette")
import schemathesis
from hypothesis import given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from serving import get, png

from blip3o_jax.serve.bodies import GENERATIONS

PAGE = (ROOT / "docs" / "serve.md").read_text()


def examples(language: str, url: str) -> list[str]:
    """The page's blocks of a language, for a server at this URL."""
    texts = [text for kind, text in blocks(PAGE) if kind == language]
    assert all(text.count("http://127.0.0.1:8000") == 1 for text in texts)
    return [text.replace("http://127.0.0.1:8000", url) for text in texts]


CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_document_describes_what_the_server_does(mode, served):
    """Requests that it allows are served or refused as it says, and what it forbids is refused."""
    schema = schemathesis.openapi.from_dict(json.loads(get(f"{served.url}/openapi.json")))
    schema.config.base_url = served.url
    checks = [*CHECKS, negative_data_rejection]
    is_allowed = mode is schemathesis.GenerationMode.POSITIVE
    seen = collections.Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        is_image = "images" in operation.label
        most = 40 if is_image or operation.query else 2
        # What has no fields forbids nothing.
        if not (is_allowed or operation.body or operation.query):
            continue

        @seed(0)
        @settings(max_examples=most, deadline=None, database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            # What is asked for is tested elsewhere; a thousand steps would test patience.
            steps = case.body.get("num_inference_steps") if isinstance(case.body, dict) else 0
            if is_allowed and steps:
                case.body["num_inference_steps"] = min(3, steps)
            answer = case.call_and_validate(checks=checks)
            seen[case.operation.label, answer.status_code] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a strategy that is slow or filters much
            check()
    images = f"POST {GENERATIONS}"
    assert seen[images, 200 if is_allowed else 400] > 5
    assert {status for _, status in seen} <= {200, 400, 404, 409, 415}


def test_the_page_s_python_runs(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"custom_id": "a", "method": "POST", "url": GENERATIONS, "body": {"prompt": "a cat"}}
    (tmp_path / "lines.jsonl").write_text(json.dumps(row))
    calls, batch = examples("python", served.url)
    exec(compile(calls, "serve.md", "exec"), {})
    kinds = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    exec(compile(batch, "serve.md", "exec"), {})
    assert capsys.readouterr().out.startswith("BatchRequestCounts(")


@pytest.mark.skipif(not shutil.which("node"), reason="there is no Node")
def test_the_page_s_javascript_runs(served, tmp_path):
    (script,) = examples("javascript", served.url)
    (tmp_path / "example.mjs").write_text(script)
    done = subprocess.run(
        ["node", "example.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    length, tokens = map(int, done.stdout.split())
    assert length > 100
    assert tokens > 4


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_the_page_s_curl_gets_an_image_and_an_edit(served, tmp_path):
    (tmp_path / "hearts.png").write_bytes(png(picture(20, 30)))
    lines = [line for line in PAGE.splitlines() if line.startswith("curl ")]
    sizes = []
    for line in lines:
        command = shlex.split(line.replace("http://127.0.0.1:8000", served.url))
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        sizes.append(json.loads(done.stdout)["size"])
    assert sizes == ["16x16", "30x20"]
