"""Text to image as pure functions of (params, inputs, keys): tokens -> latents -> pixels, in one pass (spec S1.1, paper section 2)."""

import hashlib

import jax
import jax.numpy as jnp

from blip3o_jax import decode, flow
from blip3o_jax.models.blip3o import Blip3o, condition_slice, write_codes


def sample_key(seed: int, prompt: str, index: int) -> tuple[int, int, int]:
    """What the randomness of one image depends on and nothing else: (seed, hash of the prompt, index), each an uint32."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return seed & 0xFFFFFFFF, int.from_bytes(digest[:4], "little"), index


def fold_keys(numbers):
    """uint32 [B,3] from `sample_key` -> B PRNG keys."""

    def fold(row):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(row[0]), row[1]), row[2])

    return jax.vmap(fold)(numbers)


def denoise(model: Blip3o, params, hidden, noise, num_inference_steps: int, guidance_scale, shift):
    """Hidden states at `<S0>` and the image tokens [B,n+1,D], noise f32 [B,Y,X,C] -> latents f32 [B,Y,X,C].

    Connector, caption projection and the keys and values of the cross-attentions are computed once. The guidance's unconditional half
    is hidden states of zeros, before the connector (S5.2): equal tokens, of which a cross-attention makes the same for every pixel unless
    they have positions. A guidance_scale of None leaves that half out.
    """

    def connected(hidden):
        return model.connector.apply({"params": params["diffusion_connector"]}, hidden)

    def sana(*inputs, method):
        return model.sana.apply({"params": params["sana"]}, *inputs, method=method)

    without = None
    if guidance_scale is not None and model.config.sana.condition_positions:
        hidden = flow.pairs(jnp.zeros_like(hidden), hidden)
    elif guidance_scale is not None:
        without = sana(connected(jnp.zeros_like(hidden, shape=(1, 1, hidden.shape[-1]))), method="without_condition")
    keys_values = sana(connected(hidden), method="keys_values")

    def velocity(x, t):
        return sana(x, t, keys_values, without, method="step")

    return flow.euler_sample(velocity, noise, flow.sigmas(num_inference_steps, shift), guidance_scale)


def pixels(model: Blip3o, params, latents):
    """Latents [B,Y,X,C] -> f32 [B,H,W,3] in [0,1]."""
    images = model.dc_ae.apply({"params": params["dc_ae"]}, latents, method="decode_scaled")
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def render(model: Blip3o, params, hidden, keys, num_inference_steps: int, guidance_scale, shift):
    """`denoise` from each key's noise, then `pixels`: hidden states [B,n+1,D] and keys [B] -> f32 [B,H,W,3] in [0,1]."""
    side, channels = model.config.sana.sample_size, model.config.sana.in_channels
    noise = jax.vmap(lambda key: jax.random.normal(key, (side, side, channels)))(keys)
    return pixels(model, params, denoise(model, params, hidden, noise, num_inference_steps, guidance_scale, shift))


def text_to_image(
    model: Blip3o, params, prompt, valid, key_numbers, *, num_inference_steps: int, top_k: int, top_p, temperature, guidance_scale, shift
):
    """prompt int32 [B,P] left-padded, valid bool [B,P], key_numbers uint32 [B,3] -> {"images" uint8 [B,H,W,3], "tokens" int32 [B,n],
    "logprobs" f32 [B,n] as `decode.sample` gives them}.

    num_inference_steps and top_k are static; the rest may change without another compilation.
    """
    keys = fold_keys(key_numbers)
    token_keys, noise_keys = (jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i) for i in (0, 1))
    written = decode.generate_tokens(
        model.qwen3,
        params["qwen3"],
        model.config.vocab,
        model.config.ta_tok.num_tokens,
        prompt,
        valid,
        token_keys,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
    )
    images = render(model, params, written["hidden"], noise_keys, num_inference_steps, guidance_scale, shift)
    return {"images": jnp.round(images * 255).astype(jnp.uint8), "tokens": written["tokens"], "logprobs": written["logprobs"]}


def true_tokens_to_image(model: Blip3o, params, images, tokens, start, key_numbers, *, num_inference_steps: int, guidance_scale, shift):
    """The diffusion part's ceiling: pictures uint8 [B,H,W,3] go through the tokenizer, and the transformer only reads the tokens.

    tokens int32 [B,T] and start [B] are training rows with the codes open. -> uint8 [B,H,W,3].
    """
    config = model.config
    view = images.astype(jnp.float32) / 127.5 - 1
    codes = model.ta_tok.apply({"params": params["ta_tok"]}, view, method="encode")
    tokens = write_codes(tokens, start, codes, config.vocab.image_start_token_id)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.qwen3.apply({"params": params["qwen3"]}, tokens, positions, tokens != config.vocab.pad_token_id)
    condition = condition_slice(hidden, start, config.num_condition_tokens)
    noise_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(fold_keys(key_numbers), 1)
    made = render(model, params, condition, noise_keys, num_inference_steps, guidance_scale, shift)
    return jnp.round(made * 255).astype(jnp.uint8)
