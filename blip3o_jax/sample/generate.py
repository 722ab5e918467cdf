"""Text to image as pure functions of (params, inputs, keys): tokens -> latents -> pixels
(docs/model.md §1.1, paper section 2), and each step of it by itself. `programs` compiles them.

n is the number of image tokens, P the length of a prompt. Hidden states [B,n+1,D] are Qwen3's at
`<S0>` and at the image tokens; `params` are those of all parts of the model.
"""

import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.models.blip3o import Blip3o, Params, condition_slice, write_codes
from blip3o_jax.parallel.activations import row_by_row
from blip3o_jax.pixels import to_uint8, to_unit, to_zero_one, tokenizer_view
from blip3o_jax.sample import condition, decode, flow, stochastic
from blip3o_jax.sample.condition import Guidance, Sources
from blip3o_jax.sample.flow import Scalar

LARGE = 512  # pixels of a side from which on images go through the autoencoder one by one


def sample_key(seed: int, prompt: str, index: int) -> tuple[int, int, int]:
    """What the randomness of one image depends on and nothing else: (seed, hash of the prompt,
    index), each an uint32. Seeds that GRPO counts up begin again after 2^32 - 1."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return seed & 0xFFFFFFFF, int.from_bytes(digest[:4], "little"), index


def fold_keys(numbers: Array) -> Array:
    """uint32 [B,3] from `sample_key` -> B PRNG keys."""

    def fold(row):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(row[0]), row[1]), row[2])

    return jax.vmap(fold)(numbers)


def write_tokens(
    model: Blip3o,
    params: Params,
    prompt: Array,
    valid: Array,
    key_numbers: Array,
    source_codes: Array | None = None,
    *,
    top_k: int,
    top_p: Scalar,
    temperature: Scalar,
) -> dict[str, Array]:
    """prompt int32 [B/G,P] left-padded, valid bool [B/G,P], key_numbers uint32 [B,3] -> {"hidden"
    [B,n+1,D], "tokens" int32 [B,n], "logprobs" f32 [B,n], "rounds" int32 [B]}, see
    `decode.generate_tokens`, each image drawn with its own key, G of each prompt. An edit's prompt
    is given the `source_codes` of its images, or their features, as `encode_sources` makes them;
    the codes of the first are what the edit's tokens are first guessed to be."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(fold_keys(key_numbers), 0)
    vocab, n = model.config.vocab, model.config.ta_tok.num_tokens
    given = drafts = None
    if source_codes is not None:
        if not model.config.use_tar_siglip_features:
            drafts = source_codes[:, :n]
        start = jnp.full(len(prompt), prompt.shape[1] - 1)
        prompt, given = write_sources(model, params, prompt, start, source_codes)
    decoding = top_k, top_p, temperature, given, drafts
    return decode.generate_tokens(
        model.qwen3, params["qwen3"], vocab, n, prompt, valid, keys, *decoding
    )


def encode_codes(model: Blip3o, params: Params, images: Array, key: Array | None = None) -> Array:
    """Images uint8 [B,H,W,3], resized to the tokenizer's resolution -> their codes int32 [B,n],
    sampled if there is a key."""
    view = tokenizer_view(to_unit(images), model.config.ta_tok.encoder.image_size)
    return model.apply(params, "ta_tok", view, key=key, method="encode")


def encode_latents(model: Blip3o, params: Params, images: Array) -> Array:
    """Images uint8 [B,H,W,3] -> latents f32 [B,Y,X,C], scaled as SANA takes them."""

    def encode(images: Array) -> Array:
        latents = model.apply(params, "dc_ae", to_unit(images), method="encode_scaled")
        return latents.astype(jnp.float32)

    return _images(encode, images, images.shape[1])


def encode_sources(
    model: Blip3o, params: Params, images: Array, exists: Array, latents: Array | None = None
) -> tuple[Array, Sources | None]:
    """Source images uint8 [B,N,H,W,3], of which `exists` [B,N] says which there are -> their codes
    int32 [B,N*n], or with `use_tar_siglip_features` what becomes the codes, f32 [B,N*n,D]; and
    their latents [B,N,Y,X,C], or those given, if the model looks at them."""
    flat = images.reshape(-1, *images.shape[2:])
    if model.config.use_tar_siglip_features:
        view = tokenizer_view(to_unit(flat), model.config.ta_tok.encoder.image_size)
        codes = model.apply(params, "ta_tok", view, method="pooled").astype(jnp.float32)
        codes = codes.reshape(len(images), -1, codes.shape[-1])
    else:
        codes = encode_codes(model, params, flat).reshape(len(images), -1)
    if not model.config.reads_source_latents:
        return codes, None
    if latents is None:
        latents = encode_latents(model, params, flat)
        latents = latents.reshape(*exists.shape, *latents.shape[1:])
    return codes, Sources(latents, exists)


def write_sources(
    model: Blip3o, params: Params, tokens: Array, start: Array, codes: Array
) -> tuple[Array, tuple[Array, Array] | None]:
    """tokens [B,T] and `<S0>`'s place [B], with what `encode_sources` makes for a prompt ->
    (tokens with the codes, or as they are beside the embeddings `given` to Qwen3 in their place).
    """
    image_start = model.config.vocab.image_start_token_id
    if not model.config.use_tar_siglip_features:
        return write_source_codes(tokens, start, codes, image_start), None
    places, order = _source_places(tokens, start, codes.shape[1], image_start)
    embeddings = model.apply(params, "tar_siglip_features_connector", codes)
    return tokens, (jnp.take_along_axis(embeddings, order[..., None], axis=1), places)


def write_source_codes(tokens: Array, start: Array, codes: Array, image_start: int) -> Array:
    """tokens [B,T] with the codes [B,N*n] of source images, in order, at the places before `<S0>`,
    which is at `start` [B], that hold an image token."""
    places, order = _source_places(tokens, start, codes.shape[1], image_start)
    ids = image_start + jnp.take_along_axis(codes, order, axis=1)
    return jnp.where(places, ids, tokens)


def _source_places(
    tokens: Array, start: Array, count: int, image_start: int
) -> tuple[Array, Array]:
    """Where tokens [B,T] are of a source image, and which of its `count` each one is."""
    places = (tokens >= image_start) & (jnp.arange(tokens.shape[1]) < start[:, None])
    return places, jnp.clip(jnp.cumsum(places, axis=1) - 1, 0, count - 1)


def read_tokens(model: Blip3o, params: Params, images: Array, tokens: Array, start: Array) -> Array:
    """`write_tokens` with true tokens: images uint8 [B,H,W,3] go through the tokenizer, and the
    transformer only reads them -> hidden states [B,n+1,D].

    tokens int32 [B,T] and start [B] are training rows with the codes open.
    """
    codes = encode_codes(model, params, images)
    tokens = write_codes(tokens, start, codes, model.config.vocab.image_start_token_id)
    hidden = model.read_rows(params, tokens)
    return condition_slice(hidden, start, model.config.num_condition_tokens)


def denoise(
    model: Blip3o,
    params: Params,
    hidden: Array,
    noise: Array,
    num_inference_steps: int,
    guidance: Guidance | Scalar | None,
    shift: Scalar,
    sources: Sources | None = None,
) -> Array:
    """Hidden states [B,n+1,D], noise f32 [B,Y,X,C] -> latents f32 [B,Y,X,C]; a number is the
    guidance of the text."""
    schedule = flow.sigmas(num_inference_steps, shift)
    velocity = _velocity(model, params, hidden, guidance, sources)
    return flow.integrate(velocity, noise, schedule)[0]


def denoise_between(
    model: Blip3o,
    params: Params,
    hidden: Array,
    latents: Array,
    sources: Sources | None,
    levels: Array,
    begin: Array,
    end: Array,
    *,
    guidance_scale: Guidance | Scalar | None,
    shift: Scalar,
) -> tuple[Array, Array]:
    """`denoise` from step `begin` to step `end`: latents at the one -> those at the other, and what
    they say of the final ones, see `flow.clean_estimate`. The `levels` are `flow.levels`, so that
    one program does for any number of steps, and for any part of them."""
    schedule = flow.shifted(levels, shift)
    velocity = _velocity(model, params, hidden, guidance_scale, sources)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        direction = velocity(carry[0], schedule[i], schedule[i + 1])
        return flow.euler(carry[0], direction, schedule[i], schedule[i + 1], i)[0], direction

    # Traced bounds are a loop of any length.
    carry = latents.astype(jnp.float32), jnp.zeros(latents.shape, jnp.float32)
    latents, direction = jax.lax.fori_loop(begin, end, body, carry)
    return latents, flow.clean_estimate(latents, direction, schedule[end])


def trajectory(
    model: Blip3o,
    params: Params,
    hidden: Array,
    noise: Array,
    num_inference_steps: int,
    guidance: Guidance | Scalar | None,
    shift: Scalar,
    sources: Sources | None = None,
) -> dict[str, Array]:
    """`denoise`, every step of it, all f32: "sigmas" [steps+1], "latents" [steps+1,B,Y,X,C] from
    the noise to `denoise`'s result, the guided "velocities" [steps,B,Y,X,C] between them, and
    "estimates" [steps,B,Y,X,C] of the final latents, see `flow.clean_estimate`. `frames` shows the
    latents and the estimates."""
    schedule = flow.sigmas(num_inference_steps, shift)
    velocity = _velocity(model, params, hidden, guidance, sources)

    def step(x: Array, velocity: Array, *levels: Array) -> tuple[Array, tuple[Array, Array]]:
        return flow.euler(x, velocity, *levels)[0], (x, velocity)

    last, (latents, velocities) = flow.integrate(velocity, noise, schedule, step)
    estimates = flow.clean_estimate(latents, velocities, schedule[:-1, None, None, None, None])
    latents = jnp.concatenate([latents, last[None]])
    steps = {"latents": latents, "velocities": velocities, "estimates": estimates}
    return {"sigmas": schedule, **steps}


def path(
    model: Blip3o,
    params: Params,
    hidden: Array,
    key_numbers: Array,
    sources: Sources | None = None,
    *,
    num_inference_steps: int,
    sampler: str,
    noise_level: Scalar,
) -> dict[str, Array]:
    """`draw_latents` without guidance by the stochastic steps of `sampler` (sample.stochastic), the
    noise of every step from the image's own key -> {"latents" [steps+1,B,Y,X,C] from the noise on,
    "logprobs" [steps,B]}, f32."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(fold_keys(key_numbers), 2)
    step = stochastic.step(sampler, noise_level, keys)
    mean = _velocity(model, params, hidden, None, sources)
    noise, schedule = first_noise(model, key_numbers), flow.sigmas(num_inference_steps)
    # A stochastic step is of the velocity where it begins.
    last, kept = flow.integrate(lambda x, sigma, _: mean(x, sigma, sigma), noise, schedule, step)
    return kept | {"latents": jnp.concatenate([kept["latents"], last[None]])}


def _velocity(
    model: Blip3o,
    params: Params,
    hidden: Array,
    guidance: Guidance | Scalar | None,
    sources: Sources | None,
) -> flow.Velocity:
    """The model's velocity, guided; ValueError for a guidance that a model of few steps does not
    know."""
    if not isinstance(guidance, Guidance):
        guidance = condition.guidance(guidance)
    if model.config.sana.few_steps:
        if guidance.nulls not in ((), ("nothing",)) or guidance.renorm_min is not None:
            raise ValueError(f"a model of few steps guides by one scale, not by {guidance}")
        function = condition.velocity_function(model, params, hidden, (), sources)
        return flow.mean_velocity(function, *guidance.scales)
    function = condition.velocity_function(model, params, hidden, guidance.nulls, sources)
    return flow.guided_velocity(function, guidance.scales, guidance.renorm_min)


def first_noise(model: Blip3o, key_numbers: Array) -> Array:
    """The noise f32 [B,Y,X,C] that the images with these keys, uint32 [B,3], begin with."""
    side, channels = model.config.sana.sample_size, model.config.dc_ae.latent_channels

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, 1), (side, side, channels))

    return jax.vmap(draw)(fold_keys(key_numbers))


def draw_latents(
    model: Blip3o,
    params: Params,
    hidden: Array,
    key_numbers: Array,
    sources: Sources | None = None,
    *,
    num_inference_steps: int,
    guidance_scale: Guidance | Scalar | None,
    shift: Scalar,
) -> Array:
    """`denoise` from the noise of each image's own key: hidden states [B,n+1,D], key_numbers uint32
    [B,3] -> f32 [B,Y,X,C]."""
    noise = first_noise(model, key_numbers)
    return denoise(
        model, params, hidden, noise, num_inference_steps, guidance_scale, shift, sources
    )


def pixels(model: Blip3o, params: Params, latents: Array) -> Array:
    """Latents [B,Y,X,C], final or of any step -> f32 [B,H,W,3] in [0,1]."""
    return _decoded(model, params, latents, to_zero_one)


def pictures(model: Blip3o, params: Params, latents: Array) -> Array:
    """`pixels` as uint8 [B,H,W,3]."""
    return _decoded(model, params, latents, to_uint8)


def _decoded(model: Blip3o, params: Params, latents: Array, finish: Callable) -> Array:
    def decode(latents: Array) -> Array:
        return finish(model.apply(params, "dc_ae", latents, method="decode_scaled"))

    return _images(decode, latents, latents.shape[1] * model.config.dc_ae.factor)


def _images(function: Callable[[Array], Array], x: Array, side: int) -> Array:
    """function(x) of the autoencoder, of images of `side` pixels: large ones one by one on each
    device. One keeps it busy, and all at once would need more memory than everything else."""
    return row_by_row(function, x) if side >= LARGE else function(x)


def frames(model: Blip3o, params: Params, latents: Array) -> Array:
    """`pictures` of latents [steps,B,Y,X,C], as in a `trajectory`, one step at a time -> uint8
    [steps,B,H,W,3]."""
    return jax.lax.map(functools.partial(pictures, model, params), latents)
