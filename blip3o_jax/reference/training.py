"""The joint training step in PyTorch: the losses for given codes, latents and noise, and the step
of AdamW."""

import numpy as np
import torch
import torch.nn.functional as F

from blip3o_jax.reference.modules import Reference
from blip3o_jax.text import targets


def joint_loss(
    ref: Reference, rows, start, codes, x0, noise, sigma
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, velocity error), as train.losses.joint_loss without dropped conditions.

    rows [B,T] token ids, padded on the right, the image's codes open; start [B], where `<S0>`
    stands; codes [B,n]; x0 and noise [B,C,Y,X]; sigma [B].
    """
    vocab, n = ref.config.vocab, codes.shape[1]
    rows, starts = rows.clone(), start.tolist()
    for row, at, ids in zip(rows, starts, codes, strict=True):
        row[at + 1 : at + 1 + n] = vocab.image_start_token_id + ids
    states = ref.ar.model(
        rows, attention_mask=(rows != vocab.pad_token_id).long()
    ).last_hidden_state
    labels = torch.where(
        torch.from_numpy(np.asarray(targets(rows.numpy(), start.numpy(), vocab))), rows, -100
    )
    ce = F.cross_entropy(
        (states @ ref.ar.lm_head.weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    hidden = torch.stack([row[at : at + n + 1] for row, at in zip(states, starts, strict=True)])
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1 - level) * x0 + level * noise
    velocity = ref.sana(
        noisy, encoder_hidden_states=ref.connector(hidden), timestep=1000 * sigma, return_dict=False
    )[0]
    return ce, (velocity - (noise - x0)).pow(2).mean()
