"""Text to image in PyTorch, twice: as the original does it, and as PyTorch does it well."""

import contextlib
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from transformers import DynamicCache

from blip3o_jax.reference.modules import Reference


def prompt_positions(valid: torch.Tensor) -> torch.Tensor:
    """valid [B,P] -> positions that padding on the left does not shift."""
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


@torch.no_grad()
def greedy_tokens(
    ref: Reference,
    prompt: torch.Tensor,
    valid: torch.Tensor,
    image_range_only: bool = True,
    embeddings: torch.Tensor | None = None,
):
    """prompt [B,P] padded on the left -> (codes [B,n], states [B,n+1,D]): cached decoding that
    keeps its hidden states.

    `image_range_only` computes logits of the image tokens alone; otherwise of the whole vocabulary,
    as the original does, of which the largest image token is taken. `embeddings`
    [B,P,D] are the prompt's, if not those of its tokens.
    """
    vocab, n = ref.config.vocab, ref.config.ta_tok.num_tokens
    first, last = vocab.image_start_token_id, vocab.image_start_token_id + vocab.num_image_tokens
    head = ref.ar.lm_head.weight[first:last] if image_range_only else ref.ar.lm_head.weight
    forward = functools.partial(
        ref.ar.model, cache=DynamicCache(config=ref.ar.config), use_cache=True
    )
    # The prompt at once, then token by token.
    mask, lengths = valid.long(), valid.sum(dim=1)
    given = {"input_ids": prompt} if embeddings is None else {"inputs_embeds": embeddings}
    out = forward(**given, attention_mask=mask, position_ids=prompt_positions(valid))
    states, codes = [out.last_hidden_state[:, -1]], []
    for i in range(n):
        logits = states[-1] @ head.T
        logits = logits if image_range_only else logits[:, first:last]
        codes.append(logits.float().argmax(dim=-1))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        fed, places = (first + codes[-1])[:, None], (lengths + i)[:, None]
        out = forward(fed, attention_mask=mask, position_ids=places)
        states.append(out.last_hidden_state[:, -1])
    return torch.stack(codes, dim=1), torch.stack(states, dim=1)


@torch.no_grad()
def forward_states(
    ref: Reference, prompt: torch.Tensor, valid: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """The original's second forward over finished rows -> states [B,n+1,D] from `<S0>` on."""
    rows = torch.cat([prompt, codes + ref.config.vocab.image_start_token_id], dim=1)
    mask = torch.cat([valid, torch.ones_like(codes, dtype=torch.bool)], dim=1)
    out = ref.ar.model(rows, attention_mask=mask.long(), position_ids=prompt_positions(mask))
    return out.last_hidden_state[:, prompt.shape[1] - 1 :]


def sigmas(num_steps: int) -> np.ndarray:
    """The noise levels of FlowMatchEulerDiscreteScheduler without a shift, and 0."""
    return np.append(np.linspace(1, 1 / num_steps, num_steps), 0.0).astype(np.float32)


@contextlib.contextmanager
def step_of(
    ref: Reference, sigma: torch.Tensor, following: torch.Tensor, guidance: float
) -> Iterator[None]:
    """Within it SANA gives the mean velocity of this step, guided at all levels (docs/model.md
    §5.4)."""
    embed = ref.sana.span_embed
    here, embed.span = embed.span, torch.tensor([[sigma - following, 1 - 1 / guidance, 0.0, 1.0]])
    try:
        yield
    finally:
        embed.span = here


@torch.no_grad()
def denoise(
    ref: Reference,
    states: torch.Tensor,
    noise: torch.Tensor,
    num_steps: int,
    guidance: float,
    connector_each_step: bool = False,
):
    """states [B,n+1,D], noise [B,C,Y,X] -> latents: Euler, the unconditional half first."""
    x, both = noise.float(), torch.cat([torch.zeros_like(states), states])
    condition = None if connector_each_step else ref.connector(both)
    for sigma, following in itertools.pairwise(torch.from_numpy(sigmas(num_steps))):
        given = ref.connector(both) if connector_each_step else condition
        t = torch.full((2 * len(x),), float(1000 * sigma), dtype=torch.float32)
        velocity = ref.velocity(torch.cat([x, x]).to(states.dtype), t, given).float()
        without, with_ = velocity.chunk(2)
        x = x + (following - sigma) * (without + guidance * (with_ - without))
    return x


@torch.no_grad()
def denoise_few(
    ref: Reference, states: torch.Tensor, noise: torch.Tensor, num_steps: int, guidance: float
) -> torch.Tensor:
    """As `denoise`, of a model of few steps, which guides by itself: one forward a step."""
    x, condition = noise.float(), ref.connector(states)
    for sigma, following in itertools.pairwise(torch.from_numpy(sigmas(num_steps))):
        with step_of(ref, sigma, following, guidance):
            mean = ref.velocity(x.to(states.dtype), (1000 * sigma).expand(len(x)), condition)
        x = x + (following - sigma) * mean.float()
    return x


@torch.no_grad()
def decode(ref: Reference, latents: torch.Tensor) -> torch.Tensor:
    """latents [B,C,Y,X] -> pixels [B,3,H,W] in [0,1]."""
    return (ref.decode(latents).float() / 2 + 0.5).clamp(0, 1)
