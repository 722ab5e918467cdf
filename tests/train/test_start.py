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


def test_a_source_among_the_channels_may_come_and_go(tmp_path, caplog):
    """It changes nothing at first; what was learned of it is left out, which is said."""
    ways = {"max_sources": 1, "use_und_image_vae_as_channels": True, "sana.in_channels": 8}
    plain, among = tiny.PUBLISHED, replace(tiny.PUBLISHED, **ways)
    for here, there in ((plain, among), (among, plain)):
        folder = str(tmp_path / f"{there.sana.in_channels}")
        random_checkpoint(folder, there)
        cfg, mesh = tiny.config(init={"sana": folder}), make_mesh({"data": 8})
        params = start.initial_params(cfg, Blip3o(here), checkpoints.load_part, mesh, ("sana",))
        ours = np.asarray(params["sana"]["patch_embed"]["kernel"])
        theirs = np.asarray(
            checkpoints.open(folder).load(("sana",))["sana"]["patch_embed"]["kernel"]
        )
        assert (len(ours), len(theirs)) == (here.sana.in_channels, there.sana.in_channels)
        np.testing.assert_array_equal(ours[:4], theirs[:4])
        assert not ours[4:].any()
        said = f"{folder} sees a source among its channels" in caplog.text
        assert said == (here is plain)
