"""The losses of the joint training step in PyTorch, for given codes, latents and noise."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from blip3o_jax.reference import editing
from blip3o_jax.reference.editing import Source
from blip3o_jax.reference.modules import Reference
from blip3o_jax.text import targets


def joint_loss(
    ref: Reference,
    rows,
    start,
    codes,
    x0,
    noise,
    sigma,
    sources: list[Source] | None = None,
    nulls: Sequence[str | None] = (),
    last_slice: bool = False,
    compute: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, velocity error), as train.losses.joint_loss.

    rows [B,T] token ids, padded on the right, the image's codes open; start [B], where `<S0>`
    stands; codes [B,n]; x0 and noise [B,C,Y,X]; sigma [B]. Rows of an editing model have sources,
    and of each a null, None where the condition is not dropped. `compute` is `losses`, perhaps
    compiled.
    """
    vocab, n = ref.config.vocab, codes.shape[1]
    rows, starts = rows.clone(), start.tolist()
    for row, at, ids in zip(rows, starts, codes, strict=True):
        row[at + 1 : at + 1 + n] = vocab.image_start_token_id + ids
    # Next tokens: the image's and what follows it.
    mask = (rows != vocab.pad_token_id).long()
    if last_slice:
        longest = int(mask.sum(1).max())
        rows, mask = rows[:, :longest], mask[:, :longest]
        starts = [longest - n - 1] * len(rows)
    if sources is None:
        embeddings = ref.ar.model.embed_tokens(rows)
    else:
        rows, embeddings = editing.embed(ref, rows, start, sources)
    if last_slice:
        embeddings = embeddings * mask[..., None]
    counted = torch.from_numpy(np.asarray(targets(rows.numpy(), start.numpy(), vocab)))
    labels = torch.where(counted, rows, -100)[:, 1:]
    # The velocity of the noisy latents, given the states of the image's tokens.
    if sources is None:
        velocity = functools.partial(_velocity, ref)
    else:

        def velocity(noisy, times, hidden):
            inputs = noisy.split(1), times.split(1), hidden, sources, nulls
            rows = zip(*inputs, strict=True)
            return torch.cat([editing.velocity(ref, *row) for row in rows])

    places = torch.tensor(starts)[:, None] + torch.arange(n + 1)
    compute = compute or losses
    return compute(ref, embeddings, mask, labels, places, x0, noise, sigma, velocity)


def losses(
    ref: Reference, embeddings, mask, labels, places, x0, noise, sigma, velocity: Callable
) -> tuple[torch.Tensor, torch.Tensor]:
    """`joint_loss` of rows embedded as [B,T,D]; labels [B,T-1] are -100 where none counts, `places`
    [B,n+1] those of the states that `velocity` is given."""
    states = ref.ar.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    logits = (states @ ref.ar.lm_head.weight.T)[:, :-1]
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    hidden = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1 - level) * x0 + level * noise
    return ce, (velocity(noisy, 1000 * sigma, hidden) - (noise - x0)).pow(2).mean()


def _velocity(ref: Reference, noisy, times, hidden) -> torch.Tensor:
    """Of text to image."""
    return ref.velocity(noisy, times, ref.connector(hidden))
