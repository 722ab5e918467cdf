"""The stages of the benchmark in PyTorch, twice: as the original does them, and done well."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from blip3o_jax.bench.stages import GUIDANCE, LEARNING_RATE, WEIGHT_DECAY, Workload
from blip3o_jax.pixels import to_unit
from blip3o_jax.reference import modules, pipeline
from blip3o_jax.reference.stages import channels_last
from blip3o_jax.reference.training import joint_loss


def gemm_flops_per_second(size: int, timed: Callable[[Callable], float]) -> float:
    """Of one f32 product of square matrices; `timed` gives the seconds of a call."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / timed(lambda: torch.mm(a, b))


def stages(work: Workload, folder: Path, threads: int) -> dict[str, dict[str, Callable[[], dict]]]:
    """{"original" | "well": {stage: function that gives its results as numpy arrays, channels
    last}}.

    The original: after the tokens a second forward over the finished row for their states; logits
    of the whole vocabulary; the connector in every denoising step; TA-Tok's encoder to its end and
    its decoder, whose features nobody looks at; AdamW's default loop. Well: states kept while
    decoding, image logits only, the connector once, no more of TA-Tok than the codes need,
    inference mode, fused AdamW. Both: scaled-dot-product attention, transformers' growing cache,
    dropout off.
    """
    torch.set_num_threads(threads)
    ref = modules.load(folder)
    for module in (ref.ar, ref.connector, ref.sana, ref.vae, ref.ta_tok):
        module.requires_grad_(False)
    return {"original": _stages(work, ref, well=False), "well": _stages(work, ref, well=True)}


def _stages(work: Workload, ref: modules.Reference, well: bool) -> dict[str, Callable[[], dict]]:
    prompt, valid = torch.tensor(work.prompt).long(), torch.tensor(work.valid)
    states, noise = torch.tensor(work.states), _channels_first(work.noise)

    # "Well": logits of image tokens only, states kept, the connector once.
    def write():
        codes, states = pipeline.greedy_tokens(ref, prompt, valid, image_range_only=well)
        return codes, states if well else pipeline.forward_states(ref, prompt, valid, codes)

    def denoise(states):
        return pipeline.denoise(ref, states, noise, work.num_inference_steps, GUIDANCE, not well)

    def whole():
        codes, states = write()
        return {"tokens": codes, "pixels": pipeline.decode(ref, denoise(states))}

    stages = {
        "decode": lambda: dict(zip(("tokens", "hidden"), write(), strict=True)),
        "denoise": lambda: {"latents": denoise(states)},
        "autoencoder": lambda: {"pixels": pipeline.decode(ref, noise)},
        "text_to_image": whole,
    }
    inferring = {name: _inferring(run, well) for name, run in stages.items()}
    return inferring | {"train_step": _training(work, ref, well)}


def _inferring(run: Callable[[], dict], well: bool) -> Callable[[], dict]:
    def stage():
        with torch.inference_mode() if well else torch.no_grad():
            return {name: channels_last(value) for name, value in run().items()}

    return stage


def _channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).movedim(-1, 1).contiguous()


def _training(work: Workload, ref: modules.Reference, well: bool) -> Callable[[], dict]:
    rows, start = torch.tensor(work.tokens).long(), torch.tensor(work.start)
    images = torch.tensor(to_unit(work.images)).movedim(-1, 1)
    noise, sigma = _channels_first(work.training_noise), torch.tensor(work.sigma)
    training: dict = {}

    # Modules of its own, so that the other side's steps do not move these weights.
    def begin():
        parts = [copy.deepcopy(part) for part in (ref.ar, ref.connector, ref.sana)]
        named = [item for part in parts for item in part.requires_grad_(True).named_parameters()]
        # Weight decay spares vectors and modulation tables, as ours does.
        decays = [p.ndim > 1 and "scale_shift_table" not in name for name, p in named]
        groups = []
        for on in (True, False):
            group = [p for (_, p), decay in zip(named, decays, strict=True) if decay is on]
            groups.append({"params": group, "weight_decay": WEIGHT_DECAY * on})
        training["ref"] = modules.Reference(ref.config, *parts, ref.vae, ref.ta_tok)
        training["parameters"] = [p for _, p in named]
        training["optimizer"] = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, fused=well or None
        )

    def step():
        if not training:
            begin()
        own, optimizer = training["ref"], training["optimizer"]
        with torch.no_grad():
            codes = own.ta_tok.encode(_view(work, images), only_needed=well)
            if not well:
                own.ta_tok.decode(codes)
            x0 = own.encode(images)
        ce, flow = joint_loss(own, rows, start, codes, x0, noise, sigma)
        (ce + flow).backward()
        torch.nn.utils.clip_grad_norm_(training["parameters"], 1.0)
        optimizer.step()
        # now, so that gradients are not in memory while the others run
        optimizer.zero_grad()
        return {"ce": ce.detach().numpy(), "flow": flow.detach().numpy()}

    return step


def _view(work: Workload, images: torch.Tensor) -> torch.Tensor:
    size = work.config.ta_tok.encoder.image_size
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return resized.clamp(-1, 1)
