"""The losses of the stages: pure functions (model, section of the config, params, batch, key) ->
(loss, metrics). All sums are f32.

A batch holds `images` uint8 [B,H,W,3], and for a tokenizer that learns words `patches` int [B,h,w],
the class of the word that names each patch; for joint `tokens` int32 [B,T], the templated prompt
and image, padded on the right, with the codes open, and `start` [B], the position of `<S0>`. `view`
uint8 [B,h,w,3] may be what the tokenizer sees instead of `images`; from a cache, `codes` int32
[B,n] and `latents` [B,Y,X,C] replace both, and no image is encoded. For pretrain_ar there are no
images, but `tokens` and `positions` int32 [B,T] and `weights` f32 [B,T].

Batches that hold edits have `num_sources` int32 [B], 0 for a row of text to image, and `sources`
uint8 [B,N,H,W,3], whose codes are open in the row before `start`; from a cache, `source_codes`
int32 [B,N,n] and `source_latents` [B,N,Y,X,C].

`*_draws` gives what a loss draws and divides by, row by row. It belongs to the whole batch, so that
micro-batches give the same gradient; what a batch brings itself is kept. A micro-batch has its own
deviation that `latent_noise` is measured in, its own `code_entropy` and its own draws of
`stochastic_codes`.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.errors import require
from blip3o_jax.models.blip3o import Blip3o, condition_slice, write_codes
from blip3o_jax.models.ta_tok import Quantized
from blip3o_jax.parallel.activations import piecewise
from blip3o_jax.pixels import to_unit, tokenizer_view
from blip3o_jax.sample import condition, flow, generate
from blip3o_jax.text import causal_positions, targets
from blip3o_jax.train import sections

Batch = dict[str, jax.Array]
LossAndMetrics = tuple[jax.Array, dict[str, jax.Array]]


def autoencoder_draws(
    model: Blip3o, cfg: sections.AutoencoderConfig, batch: Batch, key: jax.Array
) -> Batch:
    """`noise` on the latents."""
    return {"noise": jax.random.normal(key, latents_shape(model, batch))}


def autoencoder_loss(
    model: Blip3o, cfg: sections.AutoencoderConfig, params: dict, batch: Batch, key: jax.Array
) -> LossAndMetrics:
    """Mean absolute and squared error of the reconstruction. Noise on the latents hides small
    errors of the sampler."""
    batch = autoencoder_draws(model, cfg, batch, key) | batch
    params = {"params": params["dc_ae"]}
    images = to_unit(batch["images"])
    latents = model.dc_ae.apply(params, images, method="encode")
    std = jax.lax.stop_gradient(jnp.std(latents))
    noisy = latents + cfg.latent_noise * std * batch["noise"]
    decoded = model.dc_ae.apply(params, noisy, method="decode").astype(jnp.float32)
    error = decoded - images
    l2 = jnp.mean(jnp.square(error))
    loss = jnp.mean(jnp.abs(error)) + l2
    return loss, {"loss": loss, "psnr": -10.0 * jnp.log10(l2 / 4.0), "latent_std": std}


def tokenizer_loss(
    model: Blip3o, cfg: sections.TokenizerConfig, params: dict, batch: Batch, key: jax.Array | None
) -> LossAndMetrics:
    """What brings the codes to the images, SimVQ's commitment, and the distance of the decoder's
    features from the teacher's."""
    view = tokenizer_view(to_unit(batch["images"]), model.config.ta_tok.encoder.image_size)
    _, decoded, quantized = model.ta_tok.apply({"params": params["ta_tok"]}, view)
    distance = jnp.square(quantized.z - jax.lax.stop_gradient(quantized.codes))
    commitment = jnp.mean(jnp.sum(distance, axis=-1))
    if cfg.teacher == "words":
        codes, features, metrics = words_loss(model, batch["patches"], decoded, quantized)
    else:
        teacher = teacher_features(model, cfg, params, batch["images"])
        codes, features, metrics = features_loss(model, cfg, teacher, decoded, quantized)
    loss = codes + cfg.commitment * commitment + features
    return loss, {"loss": loss, "features": features, **metrics}


def features_loss(
    model: Blip3o,
    cfg: sections.TokenizerConfig,
    teacher: jax.Array,
    decoded: jax.Array,
    quantized: Quantized,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(what brings the codes to the images, how far the decoder is from its teacher, metrics): the
    squared distances of the codes from what they are chosen for, which is SimVQ's codebook loss,
    with `code_entropy`; and of the decoder's first features from the teacher's."""
    # The decoder has as many features as the encoder, of which the teacher may have fewer.
    own = decoded[..., : teacher.shape[-1]].astype(jnp.float32)
    features = jnp.mean(jnp.square(own - teacher))
    # The codes: near what they are chosen for, and all in use.
    distance = jnp.square(jax.lax.stop_gradient(quantized.z) - quantized.codes)
    codes = codebook = jnp.mean(jnp.sum(distance, axis=-1))
    if cfg.entropy:
        scores = quantized.cosines / model.config.ta_tok.stochastic_temperature
        codes += cfg.entropy * code_entropy(scores)
    # How many codes the batch uses: few tell that the codebook has collapsed.
    used = jnp.zeros(model.config.ta_tok.codebook_size).at[quantized.ids.ravel()].set(1.0)
    return codes, features, {"codebook": codebook, "codes_used": jnp.sum(used)}


def code_entropy(scores: jax.Array) -> jax.Array:
    """Of the choice of codes by softmax(scores [B,n,V]): a token's entropy, on average, less that
    of the mean choice. Small when tokens are sure and all codes are in use (arXiv 2310.05737)."""
    log_probs = jax.nn.log_softmax(scores)
    own = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))
    mean = jnp.mean(jnp.exp(log_probs), axis=(0, 1))
    return own + jnp.sum(mean * jnp.log(mean + 1e-9))


def teacher_features(
    model: Blip3o, cfg: sections.TokenizerConfig, params: dict, images: jax.Array
) -> jax.Array:
    """What the tokenizer's decoder aims at, f32 [B,n,C], of images uint8 [B,H,W,3]: the latents
    that the diffusion part learns, resized to the grid of tokens, or the encoder's states with mean
    0 and variance 1."""
    ta_tok = model.config.ta_tok
    if cfg.teacher == "latents":
        latents = generate.encode_latents(model, params, images)
        shape = len(latents), ta_tok.grid, ta_tok.grid, latents.shape[-1]
        grid = jax.image.resize(latents, shape, "linear", antialias=True)
        features = grid.reshape(shape[0], ta_tok.num_tokens, shape[-1])
    else:
        view = tokenizer_view(to_unit(images), ta_tok.encoder.image_size)
        states = model.apply(params, "ta_tok", view, method="pooled")
        features = jax.nn.standardize(states.astype(jnp.float32))
    return jax.lax.stop_gradient(features)


def words_loss(
    model: Blip3o, patches: jax.Array, decoded: jax.Array, quantized: Quantized
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """As `features_loss`, of words: cross-entropy of softmax(cosine / temperature) against the word
    that names each patch, so that code k is word k, and the distance from the words' vectors.

    Tokens of things, colours and grounds stay apart, and a pair of thing and colour that was never
    seen is still a sequence of known tokens.
    """
    words = patches.reshape(len(patches), -1)
    teacher = word_vectors(model)
    logits = quantized.cosines / model.config.ta_tok.stochastic_temperature
    right = jnp.take_along_axis(logits, words[..., None], axis=-1)[..., 0]
    naming = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - right)
    features = jnp.mean(jnp.square(decoded.astype(jnp.float32) - teacher[words]))

    # Right words by code, and by what the decoder makes of it.
    read = jnp.argmax(jnp.einsum("btd,wd->btw", decoded, teacher), axis=-1)
    metrics = {
        "naming": naming,
        "accuracy": jnp.mean(quantized.ids == words),
        "decoded_accuracy": jnp.mean(read == words),
    }
    return naming, features, metrics


def word_vectors(model: Blip3o) -> jax.Array:
    """The features that the tokenizer's decoder aims at, [codes, D] of unit variance: fixed, as
    TA-Tok's teacher is."""
    shape = model.config.ta_tok.codebook_size, model.config.ta_tok.encoder.hidden_size
    return jax.random.normal(jax.random.key(0), shape)


def pretrain_ar_draws(
    model: Blip3o, cfg: sections.PretrainArConfig, batch: Batch, key: jax.Array | None
) -> Batch:
    """`targets` [B]: the sum of the weights per row, on average."""
    rows = len(batch["tokens"])
    return {"targets": jnp.full(rows, jnp.sum(batch["weights"][:, 1:]) / rows)}


def pretrain_ar_loss(
    model: Blip3o, cfg: sections.PretrainArConfig, params: dict, batch: Batch, key: jax.Array | None
) -> LossAndMetrics:
    """Weighted cross-entropy of the transformer over given rows; `accuracy` has the same
    weights."""
    batch = pretrain_ar_draws(model, cfg, batch, key) | batch
    tokens = batch["tokens"]
    valid = tokens != model.config.vocab.pad_token_id
    hidden, _ = model.qwen3.apply({"params": params["qwen3"]}, tokens, batch["positions"], valid)
    losses, hits = cross_entropy(model, params, hidden[:, :-1], tokens[:, 1:], cfg.ce_chunk)
    weights = batch["weights"][:, 1:]
    loss, accuracy = (jnp.sum(x * weights) / jnp.sum(batch["targets"]) for x in (losses, hits))
    return loss, {"loss": loss, "accuracy": accuracy}


def joint_draws(model: Blip3o, cfg: sections.JointConfig, batch: Batch, key: jax.Array) -> Batch:
    """`dropped` [B], the rows without a condition, and of those `source_dropped` [B], the ones
    without their source image either, as guidance compares with both; `sigma` [B] and `noise` of
    the diffusion part; `targets` [B,2], the text and image targets per row, on average; with
    `last_slice` also `longest` [B], the tokens of the batch's longest row."""
    rows = len(batch["tokens"])
    _, drop_key, time_key, noise_key = jax.random.split(key, 4)
    counts = jnp.sum(_targets(model, batch), axis=(1, 2)) / rows
    draws = {
        "dropped": jax.random.bernoulli(drop_key, cfg.condition_dropout, (rows,)),
        "sigma": flow.sample_timesteps(time_key, rows)[1],
        "noise": jax.random.normal(noise_key, latents_shape(model, batch)),
        "targets": jnp.broadcast_to(counts, (rows, 2)),
    }
    if cfg.last_slice:
        # The length of the longest row, to which PyTorch pads the others.
        columns = jnp.arange(1, batch["tokens"].shape[1] + 1)
        longest = jnp.max(columns * (batch["tokens"] != model.config.vocab.pad_token_id))
        draws["longest"] = jnp.full(rows, longest)
    if model.config.max_sources:
        share = jax.random.bernoulli(jax.random.fold_in(drop_key, 1), cfg.source_dropout, (rows,))
        draws["source_dropped"] = draws["dropped"] & share
    return draws


def joint_loss(
    model: Blip3o, cfg: sections.JointConfig, params: dict, batch: Batch, key: jax.Array
) -> LossAndMetrics:
    """Cross-entropy over all text and image tokens + velocity error of the diffusion part, 1:1
    (docs/model.md §1.3, §5, §6)."""
    batch = joint_draws(model, cfg, batch, key) | batch
    codes_key = jax.random.split(key, 4)[0] if cfg.stochastic_codes else None
    tokens, hidden, sources = read_captions(model, params, batch, codes_key, cfg.last_slice)
    losses, hits = cross_entropy(model, params, hidden[:, :-1], tokens[:, 1:], cfg.ce_chunk)
    weights = _targets(model, batch)
    counts = jnp.sum(batch["targets"], axis=0)
    ce = jnp.sum(losses * weights) / jnp.sum(counts)
    text, image = jnp.sum(hits * weights, axis=(1, 2)) / counts

    # Its hidden states condition the diffusion part, which predicts the velocity.
    count = model.config.num_condition_tokens
    start = batch["longest"] - count if cfg.last_slice else batch["start"]
    states = condition_slice(hidden, start, count)
    states = flow.drop_condition(states, batch["dropped"])
    given = condition.build(model, params, states, sources, batch.get("source_dropped"))
    x0 = latents_of(model, jax.lax.stop_gradient(params), batch)
    sigma, noise = batch["sigma"], batch["noise"]
    noisy, t = flow.add_noise(x0, noise, sigma), flow.NUM_TRAIN_TIMESTEPS * sigma
    velocity = condition.velocity(model, params, noisy, t, given)
    mse = jnp.mean(flow.flow_loss(velocity, x0, noise))

    loss = ce + cfg.flow_weight * mse
    accuracies = {"accuracy_text": text, "accuracy_image": image}
    return loss, {"loss": loss, "ce": ce, **accuracies, "flow": mse, "latent_std": jnp.std(x0)}


def read_captions(
    model: Blip3o,
    params: dict,
    batch: Batch,
    codes_key: jax.Array | None = None,
    zero_padding: bool = False,
) -> tuple[jax.Array, jax.Array, condition.Sources | None]:
    """The transformer over the rows of a batch of captions: (tokens [B,T] with all codes, hidden
    states [B,T,D], the source images); `codes_key` samples the codes, `zero_padding` is
    `zeros_at_padding`."""
    vocab, frozen = model.config.vocab, jax.lax.stop_gradient(params)
    # The codes of the image are written into the rows behind <S0>.
    codes = batch["codes"] if "codes" in batch else encode_codes(model, frozen, batch, codes_key)
    tokens = write_codes(batch["tokens"], batch["start"], codes, vocab.image_start_token_id)

    # So are those of its source images, before it.
    source_codes, sources = encode_sources(model, frozen, batch)
    embeddings = None
    if source_codes is not None:
        tokens, embeddings = generate.write_sources(
            model, params, tokens, batch["start"], source_codes
        )
    valid = tokens != vocab.pad_token_id
    if zero_padding:
        embeddings = zeros_at_padding(valid, embeddings)
    inputs = tokens, causal_positions(tokens), valid
    hidden, _ = model.qwen3.apply({"params": params["qwen3"]}, *inputs, given=embeddings)
    return tokens, hidden, sources


def latents_of(model: Blip3o, params: dict, batch: Batch) -> jax.Array:
    """The latents f32 [B,Y,X,C] of a batch's images, or those that a cache holds, perhaps in
    bfloat16."""
    cached = batch.get("latents")
    latents = generate.encode_latents(model, params, batch["images"]) if cached is None else cached
    return latents.astype(jnp.float32)


def zeros_at_padding(
    valid: jax.Array, given: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, jax.Array]:
    """What is `given` to Qwen3 in place of embeddings, and zeros outside `valid` [B,T], which is
    what PyTorch pads with (docs/model.md §6.6 no. 1)."""
    values, places = given or (jnp.zeros((1, 1, 1)), jnp.zeros_like(valid))
    return jnp.where(valid[..., None], values, 0), places | ~valid


def cross_entropy(
    model: Blip3o, params: dict, hidden: jax.Array, labels: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Next-token losses and right answers, f32 [B,T] each; hidden [B,T,D], labels [B,T].

    Logits exist for at most `chunk` rows at a time (0: all) and are recomputed for the gradient:
    with a vocabulary of 217,210 they are the largest array of the step.
    """

    def of_rows(hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.qwen3.apply({"params": params["qwen3"]}, hidden, method="logits")
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        return jax.nn.logsumexp(logits, axis=-1) - picked, hits

    # The fewest equal pieces of at most `chunk` rows.
    rows = len(hidden)
    count = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= (chunk or rows))
    if count == 1:
        return of_rows(hidden, labels)
    return piecewise(jax.checkpoint(lambda piece: of_rows(*piece)), (hidden, labels), count)


def encode_codes(
    model: Blip3o, params: dict, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
    """Codes int32 [B,n] of a batch's `view`, or of its `images` at the tokenizer's resolution;
    sampled if there is a key."""
    return generate.encode_codes(model, params, batch.get("view", batch["images"]), key)


def encode_sources(
    model: Blip3o, params: dict, batch: Batch
) -> tuple[jax.Array | None, condition.Sources | None]:
    """As `generate.encode_sources`, of a batch's source images or of what a cache holds of them;
    None where the batch has none."""
    if "num_sources" not in batch:
        return None, None
    count = model.config.max_sources
    exists = jnp.arange(count) < batch["num_sources"][:, None]
    if "source_codes" not in batch:
        return generate.encode_sources(model, params, batch["sources"], exists)
    cached = "use_tar_siglip_features needs the source images, and a cache holds their codes"
    require(not model.config.use_tar_siglip_features, f"{cached}; train without data.cache.")
    codes = batch["source_codes"].reshape(len(exists), -1)
    latents = batch["source_latents"].astype(jnp.float32)
    return codes, condition.Sources(latents, exists) if model.config.reads_source_latents else None


def latents_shape(model: Blip3o, batch: Batch) -> tuple[int, ...]:
    """Of the latents of a batch's images."""
    if "latents" in batch:
        return batch["latents"].shape
    rows, height = batch["images"].shape[:2]
    side = height // model.config.dc_ae.factor
    return rows, side, side, model.config.dc_ae.latent_channels


def _targets(model: Blip3o, batch: Batch) -> jax.Array:
    """Weights of the next tokens in the cross-entropy, f32 [2,B,T-1]: of text, and of the image
    behind `<S0>`."""
    tokens, start = batch["tokens"], batch["start"][:, None]
    columns = jnp.arange(1, tokens.shape[1])
    image = (columns > start) & (columns <= start + model.config.ta_tok.num_tokens)
    text = targets(tokens, batch["start"], model.config.vocab)[:, 1:] & ~image
    return jnp.stack([text, image]).astype(jnp.float32)
