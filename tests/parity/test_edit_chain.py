"""Editing, from source images and prompt ids to pixels and gradients, for every way in which a
model takes its sources: this package against transformers + diffusers + the specification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from against_torch import TOLERANCE, close, close_gradients, first, last
from reading import load

from blip3o_jax.config import replace
from blip3o_jax.convert.published import published_rules
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.convert.rules import to_torch
from blip3o_jax.models.blip3o import EDITING_PARTS, Blip3o
from blip3o_jax.pixels import to_unit, tokenizer_view
from blip3o_jax.presets import preset
from blip3o_jax.sample import condition, flow, generate
from blip3o_jax.text import left_pad, targets
from blip3o_jax.train import losses
from blip3o_jax.train.config import JointConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
STEPS, ROWS = 4, 4
TOKENS = {"use_und_image_vae": True}
NOISE = {"use_und_image_vae_as_noise": True}
POSITIONS = {"sana.condition_positions": True, "sana.interpolation_scale": 2.0}
VARIANTS = {
    "ids": {"max_sources": 2},
    "tokens": TOKENS | {"max_sources": 2},
    "positions": TOKENS | {"max_sources": 2} | POSITIONS,
    "noise": NOISE,
    "both": TOKENS | NOISE,
    "only_noise": TOKENS | NOISE | {"only_use_und_image_vae_as_noise": True},
    "channels": {"use_und_image_vae_as_channels": True, "sana.in_channels": 8},
    "features": TOKENS | NOISE | {"use_tar_siglip_features": True},
}
# Other weights than PUBLISHED's heads draw: with those a key of the linear attention was 4e-7,
# which rounding put on either side of the ReLU, and one gradient was off by 1.6e-3.
HEADS = {"sana.num_attention_heads": 2, "sana.attention_head_dim": 16}
# Instructions of four rows, the second of text to image.
WORDS = ("make the left heart blue", "a red heart", "remove it", "move the star to the top")
NULLS = (None, None, "source", "nothing")


def edit_config(variant):
    """tiny.PUBLISHED of a variant, with the embedded model's vocabulary, whose tokenizer there
    is."""
    vocab = preset("emoji_64").vocab
    sizes = {"qwen3.vocab_size": vocab.size, "ta_tok.codebook_size": vocab.num_image_tokens}
    changes = {"max_sources": 1, "vocab": dataclasses.asdict(vocab)} | VARIANTS[variant]
    return replace(tiny.PUBLISHED, max_prompt_tokens=60, **sizes, **HEADS, **changes)


@dataclasses.dataclass
class Case:
    """Both sides of one variant, and the same inputs for them."""

    model: Blip3o
    params: dict
    ref: object
    counts: np.ndarray  # [B] source images
    images: np.ndarray  # uint8 [B,N,H,W,3]
    sources: list  # theirs, editing.Source
    prompts: list  # rows of ids whose source images are open
    noise: np.ndarray  # [B,Y,X,C]

    def program(self, function, **options):
        return jax.jit(functools.partial(function, self.model), **options)

    @functools.cached_property
    def encoded(self):
        exists = np.arange(self.images.shape[1]) < self.counts[:, None]
        return self.program(generate.encode_sources)(self.params, self.images, exists)

    @functools.cached_property
    def written(self):
        """(ids, valid) left-padded and open, and our tokens and states after them, greedily."""
        length, pad = max(map(len, self.prompts)) + 2, self.model.config.vocab.pad_token_id
        ids, valid = left_pad(self.prompts, length, pad)
        greedy = {"top_k": 0, "top_p": jnp.float32(1), "temperature": jnp.float32(0)}
        keys = jnp.zeros((ROWS, 3), jnp.uint32)
        write = self.program(generate.write_tokens, static_argnames="top_k")
        return ids, valid, write(self.params, ids, valid, keys, self.encoded[0], **greedy)

    @functools.cached_property
    def states(self):
        """Theirs, of `written`."""
        from blip3o_jax.reference import editing, pipeline

        ids, valid, _ = self.written
        start = torch.full((ROWS,), ids.shape[1] - 1)
        ids = torch.from_numpy(ids).long()
        with torch.no_grad():
            ids, embeddings = editing.embed(self.ref, ids, start, self.sources)
        return ids, *pipeline.greedy_tokens(
            self.ref, ids, torch.from_numpy(valid), embeddings=embeddings
        )


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    from blip3o_jax.reference import editing, modules

    torch.set_num_threads(2)
    cfg, rng = edit_config(request.param), np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("edits") / request.param
    random_checkpoint(folder, cfg)
    read, params = load(folder)
    assert replace(read, name=cfg.name) == cfg
    ref = modules.load(folder)
    # Images, of which some rows have fewer.
    counts = np.array([cfg.max_sources, 0, 1, 1])
    size, side = cfg.image_size, cfg.sana.sample_size
    images = rng.integers(0, 256, (ROWS, cfg.max_sources, size, size, 3), np.uint8)
    sources = []
    for row, count in zip(images, counts, strict=True):
        unit = to_unit(row[:count])
        view = tokenizer_view(unit, cfg.ta_tok.encoder.image_size)
        if count:
            sources.append(editing.encode_source(ref, first(unit), first(view)))
        else:
            like = sources[0]
            sources.append(editing.Source(like.prompt[:0], like.latents[:0]))
    text, n = tiny.text(cfg.max_prompt_tokens), cfg.ta_tok.num_tokens
    prompts = [
        text.encode_edit(words, np.zeros((count, n), int)) if count else text.encode_prompt(words)
        for words, count in zip(WORDS, counts, strict=True)
    ]
    noise = rng.standard_normal((ROWS, side, side, 4)).astype(np.float32)
    return Case(Blip3o(cfg), params, ref, counts, images, sources, prompts, noise)


def test_prompt_ids_tokens_and_states(case):
    """The sources' codes are where the tokenizer's template has their places; greedy tokens are
    identical, and the states of rows of different length agree."""
    ids, _, ours = case.written
    written, tokens, states = case.states
    text, prompts = tiny.text(60), []
    for words, open_ids, source in zip(WORDS, case.prompts, case.sources, strict=True):
        codes = source.prompt.numpy()
        plain = case.model.config.use_tar_siglip_features or not len(codes)
        prompts.append(open_ids if plain else text.encode_edit(words, codes))
    expected, _ = left_pad(prompts, ids.shape[1], case.model.config.vocab.pad_token_id)
    np.testing.assert_array_equal(written, expected)
    start = jnp.full(ROWS, ids.shape[1] - 1)
    args = case.params, ids, start, case.encoded[0]
    np.testing.assert_array_equal(case.program(generate.write_sources)(*args)[0], expected)
    np.testing.assert_array_equal(ours["tokens"], tokens)
    close(ours["hidden"], states)


def test_condition_and_velocity_of_mixed_rows(case):
    """One batch of rows with two, one and no source, against each row alone; and for condition
    tokens against diffusers' own mask."""
    from blip3o_jax.reference import editing

    *_, states = case.states
    (_, sources), hidden = case.encoded, case.written[2]["hidden"]
    given = case.program(condition.build)(case.params, hidden, sources)
    t = np.array([900.0, 600.0, 333.0, 1000.0], np.float32)
    velocity = case.program(condition.velocity)(case.params, case.noise, t, given)
    x, time = first(case.noise), torch.from_numpy(t)
    with torch.no_grad():
        alone = list(map(functools.partial(editing.condition, case.ref), states, case.sources))
        inputs = x.split(1), time.split(1), states, case.sources
        rows = [editing.velocity(case.ref, *row) for row in zip(*inputs, strict=True)]
    for ours, theirs in zip(given.tokens, alone, strict=True):
        close(ours[: theirs.shape[1]], theirs[0])
    for ours, theirs in zip(velocity, rows, strict=True):
        close(ours, theirs[0].movedim(0, -1))
    if given.mask is None or given.reference is not None:
        return
    width = given.tokens.shape[1]
    mask = torch.tensor([[i < row.shape[1] for i in range(width)] for row in alone])
    np.testing.assert_array_equal(given.mask, mask)
    padded = [
        torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1]), value=3) for row in alone
    ]
    with torch.no_grad():
        close(velocity, last(case.ref.velocity(x, time, torch.cat(padded), mask)))


def test_guidance_and_pixels(case):
    """Two scales are three forwards a step."""
    from blip3o_jax.reference import editing, pipeline

    *_, states = case.states
    (_, sources), hidden = case.encoded, case.written[2]["hidden"]
    guidance = condition.guidance(3.0, image=1.5)
    denoise = case.program(generate.denoise, static_argnums=3)
    latents = denoise(case.params, hidden, case.noise, STEPS, guidance, 1.0, sources)
    inputs = case.ref, states, case.sources, first(case.noise), STEPS
    expected = editing.denoise(*inputs, text=3.0, image=1.5)
    close(latents, last(expected))
    pixels = case.program(generate.pixels)(case.params, latents)
    close(pixels, last(pipeline.decode(case.ref, expected)))


def test_renormalised_guidance():
    """BAGEL's formula, global, of each sample by itself."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((3, 3, 4, 4, 2)).astype(np.float32)
    rows[2, 0] *= 30  # a sample that is longer than the others, and shortened most
    for least in (0.0, 0.4, 0.8):
        ours = flow.guided(jnp.asarray(rows), (1.5, 4.0), least)
        for sample, result in zip(torch.from_numpy(rows), ours, strict=True):
            nothing, source, whole = sample
            guided = nothing + 1.5 * (source - nothing) + 4.0 * (whole - source)
            scale = (torch.norm(whole) / (torch.norm(guided) + 1e-8)).clamp(min=least, max=1.0)
            close(result, guided * scale)
            assert scale < 1


def test_the_originals_guidance(case):
    """One scale, over the whole wide grid, whose reference its null keeps."""
    from blip3o_jax.reference import editing

    if case.model.config.use_und_image_vae_as_channels:  # which the original has not
        return
    *_, states = case.states
    (_, sources), hidden = case.encoded, case.written[2]["hidden"]
    guidance = condition.guidance(2.0, image=1.5, quirks=True)
    denoise = case.program(generate.denoise, static_argnums=3)
    latents = denoise(case.params, hidden, case.noise, STEPS, guidance, 1.0, sources)
    for row in np.flatnonzero(case.counts):
        noise = first(case.noise[row][None])
        inputs = case.ref, states[row], case.sources[row], noise, STEPS, 2.0
        close(latents[row][None], last(editing.denoise_original(*inputs)))


def parts_trained(model):
    names = ("qwen3", "diffusion_connector", "sana", *EDITING_PARTS)
    return [name for name in names if name in model.abstract()]


def test_losses_and_gradients(case):
    """With a row whose text is dropped, and one without its source too; the gradient of every
    trained parameter."""
    from blip3o_jax.reference.training import joint_loss

    model, cfg, ref = case.model, case.model.config, case.ref
    rng, n = np.random.default_rng(5), cfg.ta_tok.num_tokens
    length = max(map(len, case.prompts)) + n + 6
    text = tiny.text(cfg.max_prompt_tokens)
    tokens, start = text.training_rows(case.prompts, np.zeros((ROWS, n), int), length)
    size = cfg.image_size
    sigma = np.array([0.9, 0.5, 0.25, 0.7], np.float32)
    batch = {
        "images": rng.integers(0, 256, (ROWS, size, size, 3), np.uint8),
        "tokens": tokens,
        "start": start,
        "sources": case.images,
        "num_sources": case.counts.astype(np.int32),
        "dropped": np.array([null is not None for null in NULLS]),
        "source_dropped": np.array([null == "nothing" for null in NULLS]),
        "sigma": sigma,
        "noise": case.noise,
    }
    trained = {part: case.params[part] for part in parts_trained(model)}
    joint = JointConfig(trainable_sana="all")

    def loss(trained, batch):
        return losses.joint_loss(model, joint, case.params | trained, batch, jax.random.key(0))

    (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, batch)

    # Their side, on the same noise. All tokens count but padding and the sources' places.
    counted = np.zeros(tokens.shape, bool)
    for row, prompt, count in zip(counted, case.prompts, case.counts, strict=True):
        ends = len(prompt) + n + len(text.ids("<im_end><|im_end|>\n"))
        row[:ends] = True
        row[: len(prompt)] = np.array(prompt) < cfg.vocab.image_start_token_id
        assert row[: len(prompt)].sum() == len(prompt) - count * n
    np.testing.assert_array_equal(targets(tokens, start, cfg.vocab), counted)
    unit = to_unit(batch["images"])
    with torch.no_grad():
        codes = ref.ta_tok.encode(first(tokenizer_view(unit, cfg.ta_tok.encoder.image_size)))
        x0 = ref.encode(first(unit))
    modules = {
        "": ref.ar,
        "model.diffusion_connector.": ref.connector,
        "model.sana.": ref.sana,
        "model.und_image_vae_connector.": ref.vae_connector,
        "model.tar_siglip_features_connector.": ref.siglip_connector,
    }
    ce, flow = joint_loss(
        ref,
        torch.from_numpy(tokens).long(),
        torch.from_numpy(start),
        codes,
        x0,
        first(case.noise),
        torch.from_numpy(sigma),
        case.sources,
        NULLS,
    )
    (ce + flow).backward()
    np.testing.assert_allclose(metrics["ce"], ce.item(), rtol=TOLERANCE)
    np.testing.assert_allclose(metrics["flow"], flow.item(), rtol=TOLERANCE)
    theirs = {}
    for prefix, module in modules.items():
        for name, p in module.named_parameters() if module else ():
            theirs[prefix + name] = torch.zeros_like(p) if p.grad is None else p.grad
    rules = [r for r in published_rules(cfg) if r.path.split("/")[0] in trained]
    ours = to_torch(rules, grads)
    assert set(ours) == set(theirs) - {"lm_head.weight"}
    for part in ("model.layers.", "model.embed_tokens.", "model.norm.", *list(modules)[1:]):
        names = [name for name in ours if name.startswith(part)]
        largest = close_gradients(ours, theirs, names)
        unused = "und_image_vae" in part and not cfg.reference_tokens
        assert (largest > 0) == (bool(names) and not unused)
    # The channels of the reference have gradients of their own.
    assert np.abs(ours["model.sana.patch_embed.proj.weight"]).max(axis=(0, 2, 3)).min() > 0
