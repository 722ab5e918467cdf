"""The composition: connector, slice of hidden states, and the parts' parameters."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.checkpoints import config_of
from blip3o_jax.config import replace
from blip3o_jax.convert.rules import to_jax, to_torch
from blip3o_jax.convert.sana import connector_rules
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import PARTS, Blip3o, Connector, condition_slice
from blip3o_jax.models.sana import grid_positions
from blip3o_jax.presets import PRESETS, preset

DOCS = Path(__file__).resolve().parents[2] / "docs"


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_connector_is_that_of_pytorch():
    with np.load(Path(__file__).parents[1] / "fixtures" / "sana.npz") as file:
        arrays = {
            name.removeprefix("connector/"): file[name]
            for name in file.files
            if name.startswith("connector/")
        }
    tensors = {
        name.removeprefix("weights/"): array
        for name, array in arrays.items()
        if name.startswith("weights/")
    }
    states, expected = arrays["states"], arrays["condition"]
    connector = Connector(expected.shape[-1])
    abstract = jax.eval_shape(connector.init, jax.random.key(0), states)["params"]
    params = to_jax(connector_rules(), tensors, abstract)
    back = to_torch(connector_rules(), params)
    assert {name: tensor.tobytes() for name, tensor in back.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }
    actual = connector.apply({"params": params}, states)
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_connector_starts_at_the_scale_of_captions_even_for_no_condition():
    """docs/proofs.md C8, at half its width."""
    connector = Connector(1152)
    states = jnp.concatenate(
        [jnp.zeros((1, 1, 1024)), jax.random.normal(jax.random.key(1), (1, 1, 1024))]
    )
    params = connector.init(jax.random.key(0), states)
    np.testing.assert_allclose(params["params"]["norm"]["scale"], 2.3452, atol=1e-4)
    nothing, something = np.sqrt(np.mean(np.square(connector.apply(params, states)), axis=(1, 2)))
    assert 2.25 < nothing < 2.34
    np.testing.assert_allclose(something, 2.345, atol=2e-3)


@pytest.mark.parametrize(("width", "expected"), [(1024, 7_674_624), (2048, 10_033_920)])
def test_connector_size(width, expected):
    assert (
        size(
            jax.eval_shape(Connector(2304).init, jax.random.key(0), jnp.zeros((1, 1, width)))[
                "params"
            ]
        )
        == expected
    )


def test_the_condition_starts_at_s0_of_each_row():
    hidden = jnp.arange(2 * 9 * 3, dtype=jnp.bfloat16).reshape(2, 9, 3)
    condition = condition_slice(hidden, jnp.array([1, 4]), 5)
    np.testing.assert_array_equal(condition, jnp.stack([hidden[0, 1:6], hidden[1, 4:9]]))
    assert condition.dtype == hidden.dtype
    np.testing.assert_array_equal(condition_slice(hidden, jnp.full(2, 9 - 5), 5), hidden[:, 4:])


def test_a_condition_beyond_the_row_is_not_a_number():
    condition = np.asarray(condition_slice(jnp.ones((1, 6, 2)), jnp.array([3]), 5))
    np.testing.assert_array_equal(np.isnan(condition[0, :, 0]), [False, False, False, True, True])


def test_the_parts_are_plain_dicts_with_the_parameters_of_the_paper():
    whole = Blip3o(preset("blip3o_next_3b")).abstract()
    assert set(whole) == set(PARTS)
    assert {part: size(tree) for part, tree in whole.items() if part != "ta_tok"} == {
        "qwen3": 1_854_256_128,
        "sana": 1_604_641_952,
        "dc_ae": 312_250_275,
        "diffusion_connector": 10_033_920,
    }
    assert all(
        type(key) is jax.tree_util.DictKey
        for path, _ in jax.tree.leaves_with_path(whole)
        for key in path
    )


def test_the_mid_preset_is_about_100_m_and_100_m():
    sizes = {part: size(tree) for part, tree in Blip3o(preset("mid_128")).abstract().items()}
    assert (sizes["qwen3"], sizes["sana"]) == (99_945_472, 103_005_536)
    config = preset("mid_128")
    assert (config.image_size, config.ta_tok.num_tokens, config.sana.sample_size) == (128, 256, 16)


def test_the_pages_name_the_counts_of_the_models_that_they_measure():
    sizes = {part: size(tree) for part, tree in Blip3o(config_of("emoji_64")).abstract().items()}
    assert (sizes["sana"], sum(sizes.values())) == (4_135_504, 9_941_980)
    text = " ".join((DOCS / "emoji.md").read_text().split())
    assert "9.9 M parameters" in text
    assert f"their SANA has {sizes['sana']:,} parameters" in text
    assert "# 100 M + 103 M parameters" in (DOCS / "speed.md").read_text()


def test_a_part_does_not_depend_on_the_others():
    model, name = Blip3o(preset("emoji_64")), "diffusion_connector"
    alone = jax.jit(lambda key: model.init(key, (name,)))(jax.random.key(0))
    assert tuple(alone) == (name,)
    among = jax.jit(lambda key: model.init(key, PARTS)[name])(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, alone[name], among)
    other = model.abstract(("sana",))
    assert tuple(other) == ("sana",)
    assert jax.tree.map(lambda leaf: leaf.shape, other["sana"]) == jax.tree.map(
        lambda leaf: leaf.shape, model.abstract()["sana"]
    )


def test_an_unknown_part_is_refused():
    with pytest.raises(InputError, match="Unknown part 'sanna'; did you mean 'sana'"):
        Blip3o(preset("emoji_64")).init(jax.random.key(0), ("sanna",))


def test_every_preset_and_dtype_has_f32_parameters():
    for name in PRESETS:
        model = dataclasses.replace(Blip3o(preset(name)), dtype=jnp.bfloat16, remat="full")
        assert {leaf.dtype for leaf in jax.tree.leaves(model.abstract())} == {jnp.dtype("float32")}


def test_condition_positions_start_cross_attention_where_the_query_is():
    config = replace(preset("emoji_64"), **{"sana.num_layers": 1})
    params = Blip3o(config).init(jax.random.key(0), ("sana",))["sana"]
    cross = params["transformer_blocks"]["attn2"]
    np.testing.assert_array_equal(cross["to_k"]["kernel"], cross["to_q"]["kernel"])
    off = replace(config, **{"sana.condition_positions": False})
    condition = jnp.ones((1, 65, config.sana.caption_channels))
    places = grid_positions(config.sana, 8, 8).reshape(64, -1)
    encoded, plain = (
        Blip3o(c).sana.apply({"params": params}, condition, method="encode_condition")
        for c in (config, off)
    )
    np.testing.assert_allclose(encoded[0, 1:] - plain[0, 1:], places, atol=1e-5)
    np.testing.assert_array_equal(encoded[0, 0], plain[0, 0])
    with pytest.raises(ValueError, match="square"):
        Blip3o(config).sana.apply({"params": params}, condition[:, :60], method="encode_condition")
