"""Settings are numbers from which images can come; anything else is one sentence."""

import dataclasses
import math

import numpy as np
import pytest

from blip3o_jax.errors import InputError
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import EditSettings, Settings

HUGE = 10**400  # no float


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, HUGE, -HUGE, -1, "1", True, None, [1], 1e30]
)
@pytest.mark.parametrize("option", dataclasses.fields(EditSettings), ids=lambda field: field.name)
def test_what_is_no_number_of_use_is_refused_by_name(option, value):
    if option.name == "reference_quirks":
        value = "true" if value is True else value
    with pytest.raises(InputError) as error:
        EditSettings(**{option.name: value})
    assert str(error.value).startswith(f"{option.name} is ")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is a number from 1 to 1000, not 0."),
        (
            {"num_inference_steps": 1001},
            "num_inference_steps is a number from 1 to 1000, not 1001.",
        ),
        ({"num_inference_steps": 2.0}, "num_inference_steps is a whole number, not 2.0."),
        ({"top_k": 2**31}, "top_k is a number from 1 to 2147483647, not 2147483648."),
        ({"top_k": HUGE}, "top_k is a number from 1 to 2147483647, not such a long one."),
        ({"top_p": 0}, "top_p is a number from 0.001 to 1, not 0."),
        ({"shift": 1e-320}, "shift is a number from 0.001 to 1000, not 1e-320."),
        ({"temperature": 1e-40}, "temperature is 0 or at least 0.001, not 1e-40."),
    ],
)
def test_the_limits_are_said(values, sentence):
    with pytest.raises(InputError) as error:
        Settings(**values)
    assert str(error.value) == sentence


def test_the_limits_themselves_and_numbers_of_numpy_are_taken():
    least = Settings(1, 0, 1, 0.001, 0.0, 0.001)
    most = Settings(1000, 1000, 2**31 - 1, 1, 1000, 1000)
    assert (least.temperature, most.top_k) == (0.0, 2**31 - 1)
    assert Settings(np.int64(4), np.float32(3)) == Settings(4, 3.0)


@pytest.mark.parametrize("levels", [-1, 256, math.inf, math.nan, HUGE, "16"])
def test_a_change_that_no_pixel_has_is_refused(levels):
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(InputError, match="keep_unchanged is a number from 0 to 255, not"):
        Request("blue", (image,), keep_unchanged=levels)
