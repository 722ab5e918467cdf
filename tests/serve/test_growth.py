"""What a server keeps of calls that were answered, refused or left: nothing."""

import collections
import gc

import jax
import numpy as np
import pytest
from editing import picture

pytest.importorskip("starlette")  # of the extra [test] too
from serving import QUICK, data_url, until

from blip3o_jax.pipeline import Row
from blip3o_jax.request import Request, Sample
from blip3o_jax.serve.bodies import Asked
from blip3o_jax.serve.queue import Call, Done, Item, Step

RECORDS = (Asked, Call, Done, Item, Request, Row, Sample, Step)


def kept(served) -> dict[str, int]:
    """Live arrays of devices, records of calls, and lines of metrics."""
    gc.collect()
    counts = collections.Counter(type(x).__name__ for x in gc.get_objects() if type(x) in RECORDS)
    lines = len(served.http.get("/metrics").text.splitlines())
    return counts | {"arrays": len(jax.live_arrays()), "metrics": lines}


def test_a_server_keeps_nothing_of_calls_that_are_over(served):
    source = picture(20, 30)
    mask = np.dstack([source, np.full((20, 30), 255, np.uint8)])
    edit = {"prompt": "blue", "images": [{"image_url": data_url(source)}], **QUICK}
    edit |= {"mask": {"image_url": data_url(mask)}}
    stream = {"prompt": "a cat", "stream": True, "partial_images": 2, "num_inference_steps": 4}

    def round_of_calls(number: int) -> None:
        for path, body, status in (
            ("generations", {"prompt": f"{number} cats", "n": 3, "seed": number, **QUICK}, 200),
            ("edits", edit | {"seed": number}, 200),
            ("generations", stream | {"seed": number}, 200),
            ("generations", {"prompt": ""}, 400),
        ):
            assert served.http.post(f"/v1/images/{path}", json=body).status_code == status
        with served.http.stream("POST", "/v1/images/edits", json=edit | stream) as left:
            next(left.iter_bytes())
        until(lambda: not (served.server.open_calls or served.server.worker.now))

    for number in range(3):
        round_of_calls(number)
    served.http.get("/metrics")  # counts itself
    before = kept(served)
    assert before["arrays"] > 0
    for number in range(3, 9):
        round_of_calls(number)
    # A thread may hold the last call until it is asked again.
    until(lambda: kept(served) == before, 20)
