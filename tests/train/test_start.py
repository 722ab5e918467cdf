"""How an editing run starts from a checkpoint that may not edit yet."""

import jax
import numpy as np
import pytest
import tiny

from blip3o_jax import checkpoints
from blip3o_jax.config import replace
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.jobs.train import with_editing_parts
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.train import start

# The ways of `edit_3b`.
EDITING = {"max_sources": 1, "use_und_image_vae": True, "use_und_image_vae_as_noise": True}
CONNECTOR = "und_image_vae_connector"


@pytest.mark.parametrize("edits", [False, True])
def test_what_editing_adds_is_fresh_unless_the_checkpoint_has_it(edits, tmp_path):
    config = replace(tiny.PUBLISHED, **EDITING)
    random_checkpoint(tmp_path / "other", config if edits else tiny.PUBLISHED)
    cfg = with_editing_parts(
        tiny.config(init=str(tmp_path / "other"), model={**tiny.TEXT_ONLY, **EDITING})
    )
    assert (CONNECTOR in cfg.init) == edits
    model = Blip3o(config)
    parts = ("sana", CONNECTOR)
    params = start.initial_params(cfg, model, checkpoints.load_part, make_mesh({"data": 8}), parts)
    # SANA is loaded as it is: a source beside the latents needs no more channels.
    there = checkpoints.open(tmp_path / "other").load(parts if edits else ("sana",))
    for part, tree in there.items():
        assert jax.tree.all(jax.tree.map(np.array_equal, params[part], tree))
    fresh = np.all(np.asarray(params[CONNECTOR]["norm"]["scale"]) == np.float32(5.5**0.5))
    assert fresh == (not edits)
