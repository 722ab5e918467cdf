"""Text to image as pure functions of (params, inputs, keys): tokens -> latents -> pixels
(docs/model.md §1.1, paper section 2).

`sampler` compiles them.
"""

import hashlib

import jax
import jax.numpy as jnp

from blip3o_jax.models.blip3o import Blip3o, condition_slice, write_codes
from blip3o_jax.pixels import to_uint8, to_unit, to_zero_one, tokenizer_view
from blip3o_jax.sample import decode, flow
from blip3o_jax.text import causal_positions


def sample_key(seed: int, prompt: str, index: int) -> tuple[int, int, int]:
    """What the randomness of one image depends on and nothing else: (seed, hash of the prompt,
    index), each an uint32."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return seed & 0xFFFFFFFF, int.from_bytes(digest[:4], "little"), index


def fold_keys(numbers):
    """uint32 [B,3] from `sample_key` -> B PRNG keys."""

    def fold(row):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(row[0]), row[1]), row[2])

    return jax.vmap(fold)(numbers)


def denoise(model: Blip3o, params, hidden, noise, num_inference_steps: int, guidance_scale, shift):
    """Hidden states at `<S0>` and the image tokens [B,n+1,D], noise f32 [B,Y,X,C] -> latents f32
    [B,Y,X,C].

    Connector, caption projection and the keys and values of the cross-attentions are computed once.
    The guidance's unconditional half is hidden states of zeros, before the connector (§5.2): equal
    tokens, of which a cross-attention makes the same for every pixel unless they have positions. A
    guidance_scale of None leaves that half out.
    """

    def connected(hidden):
        return model.connector.apply({"params": params["diffusion_connector"]}, hidden)

    def sana(*inputs, method):
        return model.sana.apply({"params": params["sana"]}, *inputs, method=method)

    without = None
    if guidance_scale is not None and model.config.sana.condition_positions:
        hidden = flow.pairs(jnp.zeros_like(hidden), hidden)
    elif guidance_scale is not None:
        without = sana(
            connected(jnp.zeros_like(hidden, shape=(1, 1, hidden.shape[-1]))),
            method="without_condition",
        )
    keys_values = sana(connected(hidden), method="keys_values")

    def velocity(x, t):
        return sana(x, t, keys_values, without, method="step")

    return flow.euler_sample(
        velocity, noise, flow.sigmas(num_inference_steps, shift), guidance_scale
    )


def pixels(model: Blip3o, params, latents):
    """Latents [B,Y,X,C] -> f32 [B,H,W,3] in [0,1]."""
    images = model.dc_ae.apply({"params": params["dc_ae"]}, latents, method="decode_scaled")
    return to_zero_one(images)


def pictures(model: Blip3o, params, latents):
    """`pixels` as uint8 [B,H,W,3]."""
    images = model.dc_ae.apply({"params": params["dc_ae"]}, latents, method="decode_scaled")
    return to_uint8(images)


def draw_latents(
    model: Blip3o, params, hidden, key_numbers, *, num_inference_steps: int, guidance_scale, shift
):
    """`denoise` from the noise of each image's own key: hidden states [B,n+1,D], key_numbers uint32
    [B,3] -> f32 [B,Y,X,C]."""
    side, channels = model.config.sana.sample_size, model.config.sana.in_channels
    noise = jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, 1), (side, side, channels))
    )(fold_keys(key_numbers))
    return denoise(model, params, hidden, noise, num_inference_steps, guidance_scale, shift)


def write_tokens(
    model: Blip3o, params, prompt, valid, key_numbers, *, top_k: int, top_p, temperature
):
    """prompt int32 [B,P] left-padded, valid bool [B,P], key_numbers uint32 [B,3] -> {"hidden"
    [B,n+1,D], "tokens" int32 [B,n], "logprobs" f32 [B,n]}, see `decode.generate_tokens`, each image
    drawn with its own key."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(fold_keys(key_numbers), 0)
    vocab, n = model.config.vocab, model.config.ta_tok.num_tokens
    return decode.generate_tokens(
        model.qwen3, params["qwen3"], vocab, n, prompt, valid, keys, top_k, top_p, temperature
    )


def read_tokens(model: Blip3o, params, images, tokens, start):
    """`write_tokens` with true tokens: pictures uint8 [B,H,W,3] go through the tokenizer, and the
    transformer only reads them.

    tokens int32 [B,T] and start [B] are training rows with the codes open. -> hidden states
    [B,n+1,D].
    """
    config = model.config
    view = tokenizer_view(to_unit(images), config.ta_tok.encoder.image_size)
    codes = model.ta_tok.apply({"params": params["ta_tok"]}, view, method="encode")
    tokens = write_codes(tokens, start, codes, config.vocab.image_start_token_id)
    valid = tokens != config.vocab.pad_token_id
    hidden, _ = model.qwen3.apply(
        {"params": params["qwen3"]}, tokens, causal_positions(tokens), valid
    )
    return condition_slice(hidden, start, config.num_condition_tokens)
