"""Editing in PyTorch, each row alone, so that rows without a source need neither masks nor zeros
(docs/model.md §1.2)."""

import itertools
from dataclasses import dataclass

import torch

from blip3o_jax.reference import pipeline
from blip3o_jax.reference.modules import Reference


@dataclass
class Source:
    """The source images of one row, encoded; there may be none."""

    prompt: torch.Tensor  # codes [N,n], or with use_tar_siglip_features SigLIP's features [N,n,D]
    latents: torch.Tensor  # [N,C,Y,X], scaled


@torch.no_grad()
def encode_source(ref: Reference, images: torch.Tensor, view: torch.Tensor) -> Source:
    """Images [N,3,H,W] in [-1,1], and as the tokenizer sees them."""
    features = ref.config.use_tar_siglip_features
    return Source((ref.ta_tok.pooled if features else ref.ta_tok.encode)(view), ref.encode(images))


def embed(
    ref: Reference, tokens: torch.Tensor, start: torch.Tensor, sources: list[Source]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B,T] whose image tokens before `start` [B] are open -> (rows with the codes of the
    sources, embeddings [B,T,D], of which SigLIP's features may have made some)."""
    tokens, first = tokens.clone(), ref.config.vocab.image_start_token_id
    places = [(row[:at] >= first).nonzero()[:, 0] for row, at in zip(tokens, start, strict=True)]
    if not ref.config.use_tar_siglip_features:
        for row, at, source in zip(tokens, places, sources, strict=True):
            row[at] = first + source.prompt.flatten()
        return tokens, ref.ar.model.embed_tokens(tokens)
    embeddings = ref.ar.model.embed_tokens(tokens)
    for i, (at, source) in enumerate(zip(places, sources, strict=True)):
        embeddings[i, at] = ref.siglip_connector(source.prompt.flatten(0, 1))
    return tokens, embeddings


def condition(
    ref: Reference, states: torch.Tensor, source: Source, dropped: bool = False
) -> torch.Tensor:
    """States [n+1,D] of one row -> its condition tokens [1,S,caption]: the source's are behind the
    others, row by row of its latents; zeros when it is `dropped`."""
    own = ref.connector(states[None])
    if not ref.config.reference_tokens:
        return own
    pixels = source.latents.flatten(2).transpose(1, 2).flatten(0, 1)
    extra = ref.vae_connector(pixels)[None]
    return torch.cat([own, torch.zeros_like(extra) if dropped else extra], dim=1)


def velocity(
    ref: Reference,
    x: torch.Tensor,
    t: torch.Tensor,
    states: torch.Tensor,
    source: Source,
    null: str | None = None,
) -> torch.Tensor:
    """Of one row [1,C,Y,X]: with its whole condition, or a null of sample.condition.NULLS."""
    cfg, side = ref.config, x.shape[3]
    given = condition(ref, 0 * states if null else states, source, null in ("nothing", "original"))
    reference = source.latents[:1]
    if null == "nothing" or not len(reference):
        return ref.velocity(x, t, given)
    if cfg.use_und_image_vae_as_channels:
        return ref.velocity(torch.cat([x, reference], dim=1), t, given)
    if cfg.use_und_image_vae_as_noise:
        return ref.velocity(torch.cat([x, reference], dim=3), t, given)[..., :side]
    return ref.velocity(x, t, given)


@torch.no_grad()
def denoise(
    ref: Reference,
    states: torch.Tensor,
    sources: list[Source],
    noise: torch.Tensor,
    num_steps: int,
    text: float,
    image: float,
) -> torch.Tensor:
    """states [B,n+1,D], noise [B,C,Y,X] -> latents: Euler, guided on two scales by three forwards
    of each row; a model of few steps guides by itself on one, which both are."""
    schedule = torch.from_numpy(pipeline.sigmas(num_steps))
    rows = []
    for row, source, x in zip(states, sources, noise.split(1), strict=True):
        for sigma, following in itertools.pairwise(schedule):
            inputs = x, 1000 * sigma[None], row, source
            if ref.config.sana.few_steps:
                with pipeline.step_of(ref, sigma, following, text):
                    x = x + (following - sigma) * velocity(ref, *inputs)
                continue
            nothing, with_image, whole = (
                velocity(ref, *inputs, null) for null in ("nothing", "source", None)
            )
            guided = nothing + image * (with_image - nothing) + text * (whole - with_image)
            x = x + (following - sigma) * guided
        rows.append(x)
    return torch.cat(rows)


@torch.no_grad()
def denoise_original(
    ref: Reference,
    states: torch.Tensor,
    source: Source,
    noise: torch.Tensor,
    num_steps: int,
    guidance: float,
) -> torch.Tensor:
    """One row as the original does it: two rows at once, the one without condition keeping the
    reference; guidance and Euler go over the wide grid, whose right half is put back each time."""
    side, x = noise.shape[3], noise
    both = [condition(ref, 0 * states, source, dropped=True), condition(ref, states, source)]
    given = torch.cat(both)
    for sigma, following in itertools.pairwise(torch.from_numpy(pipeline.sigmas(num_steps))):
        wide = torch.cat([x, source.latents], dim=3) if ref.config.use_und_image_vae_as_noise else x
        t = (1000 * sigma).expand(2)
        without, with_ = ref.velocity(torch.cat([wide, wide]), t, given).chunk(2)
        wide = wide + (following - sigma) * (without + guidance * (with_ - without))
        x = wide[..., :side]
    return x
