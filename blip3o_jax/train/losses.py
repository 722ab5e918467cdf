"""The losses of the stages, pure functions (model, run config, params, batch, key) -> (loss, metrics). All sums are f32.

A batch holds `images` uint8 [B,H,W,3]; the tokenizer's also `patches` int [B,h,w], the class of the word that names each patch; the
joint stage's `tokens` int32 [B,T], templated prompt and image right-padded, with the image's codes still open, and `start` [B], where
`<S0>` stands. For the joint stage, `view` uint8 [B,h,w,3] may be what the tokenizer sees instead of `images`, and from a cache `codes`
int32 [B,n] and `latents` [B,Y,X,C] take the place of both, so that no image is encoded. The practice stage's rows have no image:
`tokens` and `positions` int32 [B,T] and `weights` f32 [B,T].
"""

import jax
import jax.numpy as jnp

from blip3o_jax import flow
from blip3o_jax.models.blip3o import Blip3o, condition_slice, write_codes
from blip3o_jax.text import targets
from blip3o_jax.train.config import TrainConfig


def to_unit(images):
    """uint8 [B,H,W,3] -> f32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def tokenizer_view(images, size: int):
    """f32 [B,H,W,3] -> [B,size,size,3]: the same frame at the tokenizer's resolution (bicubic, antialiased; S6.4)."""
    if images.shape[1] == size:
        return images
    resized = jax.image.resize(images, (images.shape[0], size, size, 3), "cubic", antialias=True)
    return jnp.clip(resized, -1.0, 1.0)


def autoencoder_loss(model: Blip3o, cfg: TrainConfig, params, batch, key):
    """Mean absolute + squared error of the reconstruction, with noise on the latents so that small errors of the sampler do not show."""
    images = to_unit(batch["images"])
    latents = model.dc_ae.apply({"params": params["dc_ae"]}, images, method="encode")
    std = jax.lax.stop_gradient(jnp.std(latents))
    noisy = latents + cfg.loss.latent_noise * std * jax.random.normal(key, latents.shape)
    error = model.dc_ae.apply({"params": params["dc_ae"]}, noisy, method="decode").astype(jnp.float32) - images
    l2 = jnp.mean(jnp.square(error))
    loss = jnp.mean(jnp.abs(error)) + l2
    return loss, {"loss": loss, "psnr": -10.0 * jnp.log10(l2 / 4.0), "latent_std": std}


def tokenizer_loss(model: Blip3o, cfg: TrainConfig, params, batch, key):
    """Code k is taught to be word k: cross-entropy of softmax(cosine / temperature) against the word that names each patch, SimVQ's
    commitment, and the decoder's features against the words' vectors. So tokens of things, colours and grounds stay apart, and a pair
    of thing and colour that was never seen is still a sequence of known tokens.
    """
    words = batch["patches"].reshape(batch["patches"].shape[0], -1)
    teacher = word_vectors(model)
    view = tokenizer_view(to_unit(batch["images"]), model.config.ta_tok.encoder.image_size)
    _, decoded, quantized = model.ta_tok.apply({"params": params["ta_tok"]}, view)
    logits = quantized.cosines / model.config.ta_tok.stochastic_temperature
    naming = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, words[..., None], axis=-1)[..., 0])
    commitment = jnp.mean(jnp.sum(jnp.square(quantized.z - jax.lax.stop_gradient(quantized.codes)), axis=-1))
    features = jnp.mean(jnp.square(decoded.astype(jnp.float32) - teacher[words]))
    loss = naming + 0.25 * commitment + features
    read = jnp.argmax(jnp.einsum("btd,wd->btw", decoded, teacher), axis=-1)
    accuracy, read_accuracy = jnp.mean(quantized.ids == words), jnp.mean(read == words)
    return loss, {"loss": loss, "naming": naming, "features": features, "accuracy": accuracy, "decoded_accuracy": read_accuracy}


def word_vectors(model: Blip3o):
    """The features that the tokenizer's decoder aims at, [codes, D] of unit variance: fixed, as TA-Tok's teacher is."""
    shape = model.config.ta_tok.codebook_size, model.config.ta_tok.encoder.hidden_size
    return jax.random.normal(jax.random.key(0), shape)


def cross_entropy(model: Blip3o, params, hidden, labels, weights, chunk: int):
    """Sum of weighted next-token losses and of right answers; hidden [B,T,D], labels and weights [B,T].

    Logits exist for `chunk` rows at a time (0: all) and are computed again for the gradient: at a vocabulary of 217,210 they are the
    largest array of the step.
    """

    def rows(hidden, labels, weights):
        logits = model.qwen3.apply({"params": params["qwen3"]}, hidden, method="logits")
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        loss = (jax.nn.logsumexp(logits, axis=-1) - picked) * weights
        return jnp.sum(loss), jnp.sum((jnp.argmax(logits, axis=-1) == labels) * weights)

    if not chunk or chunk >= hidden.shape[0]:
        return rows(hidden, labels, weights)
    parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (hidden, labels, weights))
    losses, hits = jax.lax.map(jax.checkpoint(lambda part: rows(*part)), parts)
    return jnp.sum(losses), jnp.sum(hits)


def practice_loss(model: Blip3o, cfg: TrainConfig, params, batch, key):
    """Weighted cross-entropy of the transformer over given rows; `accuracy` counts by the same weights."""
    tokens = batch["tokens"]
    valid = tokens != model.config.vocab.pad_token_id
    hidden, _ = model.qwen3.apply({"params": params["qwen3"]}, tokens, batch["positions"], valid)
    weights = batch["weights"][:, 1:]
    loss, hits = cross_entropy(model, params, hidden[:, :-1], tokens[:, 1:], weights, cfg.loss.ce_chunk)
    total = jnp.sum(weights)
    return loss / total, {"loss": loss / total, "accuracy": hits / total}


def encode_codes(model: Blip3o, params, batch, key=None):
    """Codes int32 [B,n] of a batch's `view`, or of its `images` at the tokenizer's resolution; sampled if there is a key."""
    view = tokenizer_view(to_unit(batch.get("view", batch["images"])), model.config.ta_tok.encoder.image_size)
    return model.ta_tok.apply({"params": params["ta_tok"]}, view, key=key, method="encode")


def encode_latents(model: Blip3o, params, images):
    """uint8 [B,H,W,3] -> latents f32 [B,Y,X,C], scaled as SANA takes them."""
    return model.dc_ae.apply({"params": params["dc_ae"]}, to_unit(images), method="encode_scaled").astype(jnp.float32)


def joint_loss(model: Blip3o, cfg: TrainConfig, params, batch, key):
    """Cross-entropy over all text and image tokens + velocity error of the diffusion part, 1:1 (S1.3, S5, S6)."""
    config, vocab = model.config, model.config.vocab
    code_key, drop_key, time_key, noise_key = jax.random.split(key, 4)
    frozen = jax.lax.stop_gradient(params)
    if "codes" in batch:
        codes = batch["codes"]
    else:
        codes = encode_codes(model, frozen, batch, code_key if cfg.loss.stochastic_codes else None)

    tokens = write_codes(batch["tokens"], batch["start"], codes, vocab.image_start_token_id)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.qwen3.apply({"params": params["qwen3"]}, tokens, positions, tokens != vocab.pad_token_id)
    weights = targets(tokens, batch["start"], vocab)[:, 1:].astype(jnp.float32)
    ce_sum, hits = cross_entropy(model, params, hidden[:, :-1], tokens[:, 1:], weights, cfg.loss.ce_chunk)
    ce, accuracy = ce_sum / jnp.sum(weights), hits / jnp.sum(weights)

    condition = condition_slice(hidden, batch["start"], config.num_condition_tokens, last=cfg.loss.last_slice)
    condition = flow.drop_condition(drop_key, condition, cfg.loss.condition_dropout)
    condition = model.connector.apply({"params": params["diffusion_connector"]}, condition)
    latents = batch["latents"] if "latents" in batch else encode_latents(model, frozen, batch["images"])
    x0 = latents.astype(jnp.float32)  # a cache may hold bfloat16
    t, sigma = flow.sample_timesteps(time_key, len(x0))
    noise = jax.random.normal(noise_key, x0.shape)
    velocity = model.sana.apply({"params": params["sana"]}, flow.add_noise(x0, noise, sigma), t, condition)
    mse = jnp.mean(flow.flow_loss(velocity, x0, noise))
    loss = ce + cfg.loss.flow_weight * mse
    return loss, {"loss": loss, "ce": ce, "accuracy": accuracy, "flow": mse, "latent_std": jnp.std(x0)}
