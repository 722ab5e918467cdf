"""The losses of the stages, pure functions (model, run config, params, batch, key) -> (loss,
metrics). All sums are f32.

A batch holds `images` uint8 [B,H,W,3]; the tokenizer's also `patches` int [B,h,w], the class of the
word that names each patch; the joint stage's `tokens` int32 [B,T], templated prompt and image
right-padded, with the image's codes still open, and `start` [B], where `<S0>` stands. For the joint
stage, `view` uint8 [B,h,w,3] may be what the tokenizer sees instead of `images`, and from a cache
`codes` int32 [B,n] and `latents` [B,Y,X,C] take the place of both, so that no image is encoded. The
practice stage's rows have no image: `tokens` and `positions` int32 [B,T] and `weights` f32 [B,T].

What a loss draws, and what it divides by, is a matter of the whole batch: `whole_batch` puts both
beside the rows, so that micro-batches of them together give the same gradient. Two things are a
micro-batch's own: the deviation that `loss.latent_noise` is measured in, and the draws of
`loss.stochastic_codes`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from blip3o_jax.models.blip3o import Blip3o, condition_slice, write_codes
from blip3o_jax.parallel.batches import batch_shards
from blip3o_jax.parallel.mesh import BATCH
from blip3o_jax.pixels import to_unit, tokenizer_view
from blip3o_jax.sample import flow
from blip3o_jax.text import causal_positions, targets
from blip3o_jax.train.config import TrainConfig


def whole_batch(model: Blip3o, cfg: TrainConfig, batch, key):
    """The batch with what its stage draws for each row, and how many targets a row has on average,
    [B] each of text and image tokens."""
    rows = len(jax.tree.leaves(batch)[0])
    if cfg.stage == "practice":
        return batch | {"targets": jnp.full(rows, jnp.sum(batch["weights"][:, 1:]) / rows)}
    if cfg.stage == "tokenizer":
        return batch
    if "latents" in batch:
        latents = batch["latents"].shape
    else:
        side = batch["images"].shape[1] // model.config.dc_ae.factor
        latents = rows, side, side, model.config.dc_ae.latent_channels
    if cfg.stage == "autoencoder":
        return batch | {"noise": jax.random.normal(key, latents)}
    _, drop_key, time_key, noise_key = jax.random.split(key, 4)
    counts = jnp.sum(_targets(model, batch), axis=(1, 2)) / rows
    return batch | {
        "dropped": jax.random.bernoulli(drop_key, cfg.loss.condition_dropout, (rows,)),
        "sigma": flow.sample_timesteps(time_key, rows)[1],
        "noise": jax.random.normal(noise_key, latents),
        "targets": jnp.broadcast_to(counts, (rows, 2)),
    }


def _targets(model: Blip3o, batch):
    """Weights of the next tokens in the cross-entropy, f32 [2,B,T-1]: of text, and of the image
    behind `<S0>`."""
    tokens, start, n = batch["tokens"], batch["start"][:, None], model.config.ta_tok.num_tokens
    columns = jnp.arange(1, tokens.shape[1])
    image = (columns > start) & (columns <= start + n)
    text = targets(tokens, batch["start"], model.config.vocab)[:, 1:] & ~image
    return jnp.stack([text, image]).astype(jnp.float32)


def autoencoder_loss(model: Blip3o, cfg: TrainConfig, params, batch, key):
    """Mean absolute + squared error of the reconstruction, with noise on the latents so that small
    errors of the sampler do not show."""
    batch = whole_batch(model, cfg, batch, key) | batch
    images = to_unit(batch["images"])
    latents = model.dc_ae.apply({"params": params["dc_ae"]}, images, method="encode")
    std = jax.lax.stop_gradient(jnp.std(latents))
    noisy = latents + cfg.loss.latent_noise * std * batch["noise"]
    error = (
        model.dc_ae.apply({"params": params["dc_ae"]}, noisy, method="decode").astype(jnp.float32)
        - images
    )
    l2 = jnp.mean(jnp.square(error))
    loss = jnp.mean(jnp.abs(error)) + l2
    return loss, {"loss": loss, "psnr": -10.0 * jnp.log10(l2 / 4.0), "latent_std": std}


def tokenizer_loss(model: Blip3o, cfg: TrainConfig, params, batch, key):
    """Code k is taught to be word k: cross-entropy of softmax(cosine / temperature) against the
    word that names each patch, SimVQ's commitment, and the decoder's features against the words'
    vectors. So tokens of things, colours and grounds stay apart, and a pair of thing and colour
    that was never seen is still a sequence of known tokens."""
    words = batch["patches"].reshape(batch["patches"].shape[0], -1)
    teacher = word_vectors(model)
    view = tokenizer_view(to_unit(batch["images"]), model.config.ta_tok.encoder.image_size)
    _, decoded, quantized = model.ta_tok.apply({"params": params["ta_tok"]}, view)
    logits = quantized.cosines / model.config.ta_tok.stochastic_temperature
    naming = jnp.mean(
        jax.nn.logsumexp(logits, axis=-1)
        - jnp.take_along_axis(logits, words[..., None], axis=-1)[..., 0]
    )
    commitment = jnp.mean(
        jnp.sum(jnp.square(quantized.z - jax.lax.stop_gradient(quantized.codes)), axis=-1)
    )
    features = jnp.mean(jnp.square(decoded.astype(jnp.float32) - teacher[words]))
    loss = naming + 0.25 * commitment + features
    read = jnp.argmax(jnp.einsum("btd,wd->btw", decoded, teacher), axis=-1)
    accuracy, read_accuracy = jnp.mean(quantized.ids == words), jnp.mean(read == words)
    return loss, {
        "loss": loss,
        "naming": naming,
        "features": features,
        "accuracy": accuracy,
        "decoded_accuracy": read_accuracy,
    }


def word_vectors(model: Blip3o):
    """The features that the tokenizer's decoder aims at, [codes, D] of unit variance: fixed, as
    TA-Tok's teacher is."""
    shape = model.config.ta_tok.codebook_size, model.config.ta_tok.encoder.hidden_size
    return jax.random.normal(jax.random.key(0), shape)


def cross_entropy(model: Blip3o, params, hidden, labels, chunk: int):
    """Next-token losses and right answers, f32 [B,T] each; hidden [B,T,D], labels [B,T].

    Logits exist for at most `chunk` rows at a time (0: all) and are computed again for the
    gradient: at a vocabulary of 217,210 they are the largest array of the step.
    """

    def rows(hidden, labels):
        logits = model.qwen3.apply({"params": params["qwen3"]}, hidden, method="logits")
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, (
            jnp.argmax(logits, axis=-1) == labels
        ).astype(jnp.float32)

    count = next(
        n
        for n in range(1, len(hidden) + 1)
        if len(hidden) % n == 0 and (not chunk or len(hidden) // n <= chunk)
    )
    if count == 1:
        return rows(hidden, labels)
    parts = jax.lax.map(
        jax.checkpoint(lambda part: rows(*part)), interleaved((hidden, labels), count)
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(labels.shape), parts)


def interleaved(tree, count: int):
    """Arrays [B,...] -> [count,B/count,...]: piece i has rows i, i + count, ..., so that every
    device of a batch that is cut in runs has rows of each piece."""
    mesh = jax.sharding.get_abstract_mesh()

    def pieces(x):
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return (
            x
            if mesh.empty or x.shape[1] % batch_shards(mesh)
            else jax.lax.with_sharding_constraint(x, PartitionSpec(None, *BATCH))
        )

    return jax.tree.map(pieces, tree)


def practice_loss(model: Blip3o, cfg: TrainConfig, params, batch, key):
    """Weighted cross-entropy of the transformer over given rows; `accuracy` counts by the same
    weights."""
    batch = whole_batch(model, cfg, batch, key) | batch
    tokens = batch["tokens"]
    valid = tokens != model.config.vocab.pad_token_id
    hidden, _ = model.qwen3.apply({"params": params["qwen3"]}, tokens, batch["positions"], valid)
    weights = batch["weights"][:, 1:]
    losses, hits = cross_entropy(model, params, hidden[:, :-1], tokens[:, 1:], cfg.loss.ce_chunk)
    loss, accuracy = (jnp.sum(x * weights) / jnp.sum(batch["targets"]) for x in (losses, hits))
    return loss, {"loss": loss, "accuracy": accuracy}


def encode_codes(model: Blip3o, params, batch, key=None):
    """Codes int32 [B,n] of a batch's `view`, or of its `images` at the tokenizer's resolution;
    sampled if there is a key."""
    view = tokenizer_view(
        to_unit(batch.get("view", batch["images"])), model.config.ta_tok.encoder.image_size
    )
    return model.ta_tok.apply({"params": params["ta_tok"]}, view, key=key, method="encode")


def encode_latents(model: Blip3o, params, images):
    """uint8 [B,H,W,3] -> latents f32 [B,Y,X,C], scaled as SANA takes them."""
    return model.dc_ae.apply(
        {"params": params["dc_ae"]}, to_unit(images), method="encode_scaled"
    ).astype(jnp.float32)


def joint_loss(model: Blip3o, cfg: TrainConfig, params, batch, key):
    """Cross-entropy over all text and image tokens + velocity error of the diffusion part, 1:1
    (§1.3, §5, §6)."""
    batch = whole_batch(model, cfg, batch, key) | batch
    config, vocab = model.config, model.config.vocab
    frozen = jax.lax.stop_gradient(params)
    if "codes" in batch:
        codes = batch["codes"]
    else:
        codes = encode_codes(
            model, frozen, batch, jax.random.split(key, 4)[0] if cfg.loss.stochastic_codes else None
        )

    tokens = write_codes(batch["tokens"], batch["start"], codes, vocab.image_start_token_id)
    valid = tokens != vocab.pad_token_id
    hidden, _ = model.qwen3.apply(
        {"params": params["qwen3"]}, tokens, causal_positions(tokens), valid
    )
    losses, hits = cross_entropy(model, params, hidden[:, :-1], tokens[:, 1:], cfg.loss.ce_chunk)
    weights, counts = _targets(model, batch), jnp.sum(batch["targets"], axis=0)
    ce = jnp.sum(losses * weights) / jnp.sum(counts)
    text, image = jnp.sum(hits * weights, axis=(1, 2)) / counts

    condition = condition_slice(
        hidden, batch["start"], config.num_condition_tokens, last=cfg.loss.last_slice
    )
    condition = flow.drop_condition(condition, batch["dropped"])
    condition = model.connector.apply({"params": params["diffusion_connector"]}, condition)
    latents = (
        batch["latents"] if "latents" in batch else encode_latents(model, frozen, batch["images"])
    )
    x0 = latents.astype(jnp.float32)  # a cache may hold bfloat16
    sigma, noise = batch["sigma"], batch["noise"]
    noisy, t = flow.add_noise(x0, noise, sigma), flow.NUM_TRAIN_TIMESTEPS * sigma
    velocity = model.sana.apply({"params": params["sana"]}, noisy, t, condition)
    mse = jnp.mean(flow.flow_loss(velocity, x0, noise))
    loss = ce + cfg.loss.flow_weight * mse
    accuracies = {"accuracy_text": text, "accuracy_image": image}
    return loss, {"loss": loss, "ce": ce, **accuracies, "flow": mse, "latent_std": jnp.std(x0)}
