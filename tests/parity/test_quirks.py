"""`--reference-quirks` over rows of different lengths, against transformers and diffusers put
together as the original does: zeros pad the rows to the longest, whose last states condition."""

import jax
import numpy as np
import pytest
from against_torch import TOLERANCE, close_gradients
from tiny import PUBLISHED

from blip3o_jax.convert.published import published_rules
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.convert.rules import to_torch
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.train import losses
from blip3o_jax.train.config import JointConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
TRAINED = ("qwen3", "diffusion_connector", "sana")
# Prompts of these lengths, and columns of padding behind the longest row.
LENGTHS, BEYOND = (4, 9, 6), 5


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model, params, reference, a batch as from a cache)."""
    from blip3o_jax.reference import modules

    folder = tmp_path_factory.mktemp("quirks") / "tiny"
    params = random_checkpoint(folder, PUBLISHED)
    cfg, vocab, n = PUBLISHED, PUBLISHED.vocab, PUBLISHED.ta_tok.num_tokens
    rng, rows = np.random.default_rng(7), len(LENGTHS)
    start = np.array(LENGTHS, np.int32)
    tokens = np.full((rows, max(LENGTHS) + n + 4 + BEYOND), vocab.pad_token_id, np.int32)
    for row, at in zip(tokens, start, strict=True):
        row[:at] = rng.integers(10, 20, at)
        row[at] = vocab.scale_start_token_id
        row[at + 1 : at + 1 + n] = vocab.image_start_token_id
        row[at + 1 + n : at + 4 + n] = (vocab.image_end_tag_id, vocab.eos_token_id, 11)
    side, channels = cfg.sana.sample_size, cfg.dc_ae.latent_channels
    latents = rng.standard_normal((2, rows, side, side, channels)).astype(np.float32)
    batch = {
        "tokens": tokens,
        "start": start,
        "codes": rng.integers(0, vocab.num_image_tokens, (rows, n)).astype(np.int32),
        "latents": latents[0],
        "noise": latents[1],
        "sigma": np.array([0.9, 0.4, 0.6], np.float32),
        "dropped": np.zeros(rows, bool),
    }
    return Blip3o(cfg), params, modules.load(folder), batch


def ours(case, batch, **changes):
    """(metrics, gradients by torch name) of the joint loss."""
    model, params, _, _ = case
    joint = JointConfig(trainable_sana="all", **changes)

    def loss(trained, batch):
        return losses.joint_loss(model, joint, params | trained, batch, jax.random.key(0))

    trained = {part: params[part] for part in TRAINED}
    (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, batch)
    rules = [rule for rule in published_rules(model.config) if rule.part in TRAINED]
    return metrics, to_torch(rules, grads)


def theirs(case, last_slice):
    """The same of PyTorch's modules."""
    from blip3o_jax.reference.training import joint_loss

    _, _, ref, batch = case
    modules = {"": ref.ar, "model.diffusion_connector.": ref.connector, "model.sana.": ref.sana}
    for module in modules.values():
        module.zero_grad()
    torch_batch = {key: torch.from_numpy(np.array(x)) for key, x in batch.items()}
    rows, codes = torch_batch["tokens"].long(), torch_batch["codes"].long()
    x0, noise = (torch_batch[key].movedim(-1, 1) for key in ("latents", "noise"))
    inputs = rows, torch_batch["start"], codes, x0, noise, torch_batch["sigma"]
    ce, flow = joint_loss(ref, *inputs, last_slice=last_slice)
    (ce + flow).backward()
    pairs = ((p + name, x) for p, m in modules.items() for name, x in m.named_parameters())
    return ce.item(), flow.item(), {name: x.grad.numpy().copy() for name, x in pairs}


@pytest.mark.parametrize("last_slice", [False, True])
def test_losses_and_gradients_over_ragged_rows(case, last_slice):
    metrics, gradients = ours(case, case[3], last_slice=last_slice)
    ce, flow, expected = theirs(case, last_slice)
    np.testing.assert_allclose(metrics["ce"], ce, rtol=TOLERANCE)
    np.testing.assert_allclose(metrics["flow"], flow, rtol=TOLERANCE)
    assert set(gradients) == set(expected) - {"lm_head.weight"}
    for part in (
        "model.layers.",
        "model.embed_tokens.",
        "model.diffusion_connector.",
        "model.sana.",
    ):
        names = [name for name in gradients if name.startswith(part)]
        assert close_gradients(gradients, expected, names) > 0


def test_the_quirk_is_one_and_depends_on_no_row_length(case):
    """The velocity error differs from the right one by more than rounding; more padding than the
    longest row needs changes nothing."""
    batch = case[3]
    right, quirk = (theirs(case, last_slice)[1] for last_slice in (False, True))
    assert abs(right - quirk) > 1e-3
    wide = np.pad(batch["tokens"], [(0, 0), (0, 7)], constant_values=PUBLISHED.vocab.pad_token_id)
    metrics, gradients = ours(case, batch | {"tokens": wide}, last_slice=True)
    np.testing.assert_allclose(metrics["flow"], quirk, rtol=TOLERANCE)
    # Padding has no embedding there, so that its token has no gradient from it.
    pad = gradients["model.embed_tokens.weight"][PUBLISHED.vocab.pad_token_id]
    expected = theirs(case, True)[2]["model.embed_tokens.weight"][PUBLISHED.vocab.pad_token_id]
    np.testing.assert_allclose(pad, expected, atol=1e-6)
