"""What a server of a model of few steps offers: its own steps, and one scale from 1 on."""

import dataclasses

import pytest
from editing import CHANNELS, picture

pytest.importorskip("starlette")  # of the extra [test] too
from serving import data_url
from tiny import SMALL

from blip3o_jax.config import replace
from blip3o_jax.presets import preset
from blip3o_jax.sample.settings import EditSettings, Settings, defaults
from blip3o_jax.serve import openapi
from blip3o_jax.serve.bodies import EDITS, GENERATIONS, FieldError, Offer, read_body

CONFIG = replace(preset("emoji_64"), **{**SMALL, **CHANNELS, "sana.few_steps": 3})
IMAGES = [{"image_url": data_url(picture(8, 8))}]


def offer(config) -> Offer:
    settings = {"settings": defaults(config), "edit_settings": defaults(config, EditSettings)}
    return Offer(("m",), config, ("png",), **settings, is_server=True)


def asked(url: str, **fields):
    fields |= {"images": IMAGES} if url == EDITS else {}
    (request,) = read_body(url, {"prompt": "a cat", **fields}, "", offer(CONFIG)).requests
    return request.settings


def test_a_body_that_says_nothing_gets_the_models_few_steps():
    assert asked(GENERATIONS) == Settings(num_inference_steps=3)
    assert asked(EDITS) == EditSettings(num_inference_steps=3)
    assert asked(GENERATIONS, num_inference_steps=30) == Settings()
    both = {"guidance_scale": 2.0, "image_guidance_scale": 2.0}
    assert asked(EDITS, **both) == EditSettings(num_inference_steps=3, **both)


@pytest.mark.parametrize(
    ("url", "fields", "sentence"),
    [
        (GENERATIONS, {"guidance_scale": 0.5}, "a guidance_scale from 1 on, not 0.5"),
        (EDITS, {"guidance_scale": 2}, "2.0 and image_guidance_scale 1.0 must be equal"),
        (EDITS, {"image_guidance_scale": 2}, "1.0 and image_guidance_scale 2.0 must be equal"),
    ],
)
def test_a_scale_that_it_does_not_know_is_refused_as_the_field_that_it_is(url, fields, sentence):
    with pytest.raises(FieldError, match=sentence) as caught:
        asked(url, **fields)
    assert caught.value.param == "guidance_scale"


@pytest.mark.parametrize(("few_steps", "least"), [(3, 1), (0, 0)])
def test_the_document_says_from_where_on_scales_are(few_steps, least):
    config = replace(CONFIG, **{"sana.few_steps": few_steps})
    paths = openapi.document(offer(config))["paths"]
    for url, names in ((GENERATIONS, ["guidance_scale"]), (EDITS, openapi.SCALES)):
        content = paths[url]["post"]["requestBody"]["content"]["application/json"]
        for name in names:
            assert content["schema"]["properties"][name]["minimum"] == least


def test_a_form_reads_the_defaults_with_the_model(served):
    (model,) = served.http.get("/v1/models").json()["data"]
    both = {"generate": Settings(), "edit": EditSettings()}
    assert model["defaults"] == {name: dataclasses.asdict(own) for name, own in both.items()}
    assert model["few_steps"] == 0
    assert served.http.get(f"/v1/models/{model['id']}").json() == model
