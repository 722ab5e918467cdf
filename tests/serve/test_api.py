"""The images API as the official client calls it, and that its images are those of `generate`."""

import base64
import functools
import hashlib
import io
import re
import threading

import numpy as np
import openai
import pytest
from editing import picture

pytest.importorskip("starlette")  # of the extra [test] too
import jax
from PIL import Image
from serving import FEW, QUICK, data_url, pixels, png

from blip3o_jax.origin import encode_image, origin
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import EditSettings, Settings


def of(sample, pipeline, kind="png"):
    """The file that `generate` writes of a sample."""
    facts = origin(sample) | {"checkpoint": pipeline.identity}
    facts |= {"settings": vars(sample.request.settings)}
    return encode_image(sample.image, facts, kind)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_inference_steps": 5, "guidance_scale": 3, "shift": 3.0},
        {"temperature": 0.5, "top_p": 0.5, "num_inference_steps": 1},
    ],
)
def test_an_image_is_the_file_that_generate_writes(settings, served, plain):
    body = {"num_inference_steps": 2} | settings
    answer = served.client.images.generate(prompt="a cat", n=3, extra_body={"seed": 7, **body})
    requests = [Request("a cat", seed=7, index=i, settings=Settings(**body)) for i in range(3)]
    expected = [of(sample, plain) for sample in plain.run(requests)]
    assert [base64.b64decode(image.b64_json) for image in answer.data] == expected
    assert (answer.output_format, answer.size, answer.background) == ("png", "16x16", "opaque")
    text = len(plain.text.encode_prompt("a cat"))
    each = plain.model.config.ta_tok.num_tokens
    used = answer.usage
    assert (used.input_tokens, used.output_tokens) == (text, 3 * each)
    assert used.total_tokens == text + 3 * each
    assert used.input_tokens_details.text_tokens == text


@pytest.mark.parametrize(
    "scales", [{}, {"guidance_scale": 2}, {"guidance_scale": 2, "image_guidance_scale": 3.5}]
)
def test_an_edit_is_that_of_python_in_its_source_s_size(scales, served, plain):
    source = picture(20, 30)
    answer = served.client.images.edit(
        image=png(source), prompt="make it blue", extra_body={"seed": 5, **QUICK, **scales}
    )
    settings = EditSettings(**QUICK, **scales)
    (sample,) = plain.run([Request("make it blue", (source,), seed=5, settings=settings)])
    assert base64.b64decode(answer.data[0].b64_json) == of(sample, plain)
    assert answer.size == "30x20"
    codes = plain.model.config.ta_tok.num_tokens
    assert answer.usage.input_tokens_details.image_tokens == codes
    # A JSON body, and a form with a list of images, ask for the same.
    body = {"prompt": "make it blue", "images": [{"image_url": data_url(source)}], "seed": 5}
    other = served.http.post("/v1/images/edits", json=body | QUICK | scales).json()
    assert other["data"][0]["b64_json"] == answer.data[0].b64_json
    several = served.client.images.edit(
        image=[png(source)], prompt="make it blue", extra_body={"seed": 5, **QUICK, **scales}
    )
    assert several.data[0].b64_json == answer.data[0].b64_json


def test_a_mask_keeps_the_source_s_own_pixels_where_it_is_opaque(served, plain):
    source = picture(20, 30)
    alpha = np.full((20, 30), 255, np.uint8)
    alpha[:, 15:] = 0
    mask = np.dstack([source, alpha])
    how = {"prompt": "make it blue", "extra_body": {"seed": 5, **QUICK}}
    answer = served.client.images.edit(image=png(source), mask=png(mask), **how).data[0]
    made = pixels(answer)
    whole = pixels(served.client.images.edit(image=png(source), **how).data[0])
    np.testing.assert_array_equal(made[:, :15], source[:, :15])
    np.testing.assert_array_equal(made[:, 15:], whole[:, 15:])
    assert (whole[:, :15] != source[:, :15]).any()
    # It is the file of the same request in Python, which names the mask.
    settings = EditSettings(**QUICK)
    request = Request("make it blue", (source,), seed=5, settings=settings, within=alpha)
    (sample,) = plain.run([request])
    assert base64.b64decode(answer.b64_json) == of(sample, plain)
    digest = hashlib.sha256(alpha.tobytes()).hexdigest()
    assert origin(sample)["within"] == {"sha256": digest}


@pytest.mark.parametrize(("kind", "compression"), [("jpeg", None), ("webp", None), ("webp", 40)])
def test_an_image_is_encoded_as_it_is_asked_for(kind, compression, served, plain):
    asked = {} if compression is None else {"output_compression": compression}
    answer = served.client.images.generate(
        prompt="a cat", output_format=kind, extra_body={**QUICK, **asked}
    )
    data = base64.b64decode(answer.data[0].b64_json)
    (sample,) = plain.run([Request("a cat", settings=Settings(**QUICK))])
    if compression is None:
        assert data == of(sample, plain, kind)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == kind.upper()
        difference = np.abs(np.asarray(image).astype(int) - sample.image)
    assert (difference.max() == 0) == ((kind, compression) == ("webp", None))
    assert answer.output_format == kind


def test_no_request_compiles_anything(served):
    """Of any length, number, kind, scale or number of steps, also where somebody watches."""
    compiled = []

    def listen(name, seconds, **_):
        if "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        source = png(picture(9, 14))
        for prompt in ("a", "a cat on " + "a hill and " * 4):
            for n, steps, scale in ((1, 1, 1), (2, 3, 2.5), (3, 7, 1)):
                more = {"num_inference_steps": steps, "guidance_scale": scale, "top_p": 0.7}
                served.client.images.generate(prompt=prompt, n=n, extra_body=more)
                for image_scale in (1, scale, 4):
                    more |= {"image_guidance_scale": image_scale, "shift": 2}
                    served.client.images.edit(image=source, prompt=prompt, n=n, extra_body=more)
        streamed = {"stream": True, "partial_images": 2, "extra_body": {"num_inference_steps": 6}}
        list(served.client.images.generate(prompt="a", **streamed))
        list(served.client.images.edit(image=source, prompt="a", **streamed))
        assert compiled == []
        # The listener hears a compilation.
        jax.jit(lambda x: x * 41.5 + len(prompt))(np.ones(3))
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_gives_partial_images_and_then_the_same_bytes(n, served, plain):
    how = {"prompt": "a cat", "n": n, "extra_body": {"seed": 3, "num_inference_steps": 6}}
    whole = served.client.images.generate(**how)
    events = list(served.client.images.generate(stream=True, partial_images=2, **how))
    for index in range(n):
        own = [event for event in events if event.image_index == index]
        kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
        assert [event.type for event in own] == kinds
        assert [event.partial_image_index for event in own[:2]] == [0, 1]
        assert own[2].b64_json == whole.data[index].b64_json
        assert (own[2].size, own[2].usage.output_tokens) == ("16x16", 4)
        # Each is nearer to the end than the one before, whose noise is not all gone.
        last = pixels(own[2]).astype(int)
        off = [np.abs(pixels(event) - last).mean() for event in own[:2]]
        assert off[0] > off[1] > 0


def test_the_partial_image_is_what_the_sampler_thinks_of_its_end(served, plain):
    """After step 3 of 6, as `generate.trajectory` computes it."""
    from blip3o_jax.sample import generate, programs

    (event, _) = served.client.images.generate(
        prompt="a cat",
        stream=True,
        partial_images=1,
        extra_body={"seed": 3, "num_inference_steps": 6},
    )
    model, params = plain.model, plain.params
    ids, valid = plain.text.encode_prompts(["a cat"], 32)
    keys = np.array([generate.sample_key(3, "a cat", 0)], np.uint32)
    decoding = {"top_k": 1200, "top_p": 0.95, "temperature": 1.0}
    run = programs.programs(model)
    hidden = run.write_tokens(params, ids, valid, keys, **decoding)["hidden"]
    noise = jax.jit(functools.partial(generate.first_noise, model))(keys)
    walk = jax.jit(functools.partial(generate.trajectory, model), static_argnums=3)
    steps = walk(params, hidden, noise, 6, Settings().guidance_scale, 1.0)
    expected = np.asarray(run.pictures(params, steps["estimates"][2]))[0]
    assert np.abs(pixels(event).astype(int) - expected).max() <= 1


def test_an_edit_is_streamed_in_its_source_s_size_and_under_its_mask(served):
    source = picture(20, 30)
    mask = np.dstack([source, np.full((20, 30), 255, np.uint8)])
    mask[5:, 5:, 3] = 0
    events = list(
        served.client.images.edit(
            image=png(source),
            mask=png(mask),
            prompt="make it blue",
            stream=True,
            partial_images=1,
            extra_body={"num_inference_steps": 4},
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    for event in events:
        np.testing.assert_array_equal(pixels(event)[:5], source[:5])
        assert (pixels(event)[5:, 5:] != source[5:, 5:]).any()


def test_a_stream_says_the_step_in_comments(served):
    body = {"prompt": "a cat", "stream": True, "num_inference_steps": 3}
    text = served.http.post("/v1/images/generations", json=body).text
    assert re.findall(r"^: step (.*)$", text, re.M) == [f"{i}/3 of image 0" for i in (1, 2, 3)]


def test_models_are_listed_under_the_name_that_bodies_may_have(served, pipeline):
    (model,) = served.client.models.list()
    assert model.id == pipeline.identity
    assert served.client.models.retrieve(model.id).checkpoint == pipeline.identity
    for name in (model.id, model.id.partition("@")[0]):
        served.client.images.generate(prompt="a cat", model=name, **FEW)
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-image-1'"):
        served.client.models.retrieve("gpt-image-1")


def test_metrics_count_what_was_done(served):
    def value(line):
        text = served.http.get("/metrics").text
        (found,) = re.findall(rf"^{re.escape(line)} (\S+)$", text, re.M) or ["0"]
        return float(found)

    images = 'blip3o_images_total{kind="generation"}'
    answers = 'blip3o_responses_total{method="POST",route="/v1/images/generations",status="200"}'
    waits = 'blip3o_seconds_count{stage="queue"}'
    before = [value(line) for line in (images, answers, waits)]
    served.client.images.generate(prompt="a cat", n=2, **FEW)
    after = [value(line) for line in (images, answers, waits)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1, 2]
    assert value("blip3o_ready") == 1


def test_requests_of_many_clients_at_once_are_the_same_images(served, plain):
    results, errors = {}, []

    def ask(number):
        try:
            how = {"extra_body": {"seed": number, **QUICK}}
            (image,) = served.client.images.generate(prompt=f"{number} cats", **how).data
            results[number] = base64.b64decode(image.b64_json)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    settings = Settings(**QUICK)
    requests = [Request(f"{n} cats", seed=n, settings=settings) for n in range(12)]
    assert results == {s.request.seed: of(s, plain) for s in plain.run(requests)}
