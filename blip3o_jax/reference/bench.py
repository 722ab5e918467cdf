"""The stages of workload.py in PyTorch, twice: as the original does them, and as PyTorch does them
well."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from blip3o_jax.bench.stages import GUIDANCE, LEARNING_RATE, WEIGHT_DECAY, Workload
from blip3o_jax.pixels import to_unit
from blip3o_jax.reference import modules, pipeline
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
    states, noise = torch.tensor(work.states), torch.tensor(work.noise).movedim(-1, 1).contiguous()

    # "Well": logits of image tokens only, states kept, the connector once.
    def write():
        codes, kept = pipeline.greedy_tokens(ref, prompt, valid, image_range_only=well)
        return codes, kept if well else pipeline.forward_states(ref, prompt, valid, codes)

    def denoise(states):
        return pipeline.denoise(
            ref, states, noise, work.num_inference_steps, GUIDANCE, connector_each_step=not well
        )

    def whole():
        codes, states = write()
        return {"tokens": codes, "pixels": pipeline.decode(ref, denoise(states))}

    found = {
        "decode": lambda: dict(zip(("tokens", "hidden"), write(), strict=True)),
        "denoise": lambda: {"latents": denoise(states)},
        "autoencoder": lambda: {"pixels": pipeline.decode(ref, noise)},
        "text_to_image": whole,
    }
    mode = torch.inference_mode if well else torch.no_grad
    return {name: _given(run, mode) for name, run in found.items()} | {
        "train_step": _training(work, ref, well)
    }


def _given(run: Callable[[], dict], mode) -> Callable[[], dict]:
    def stage():
        with mode():
            found = run()
        return {name: (x.movedim(1, -1) if x.ndim == 4 else x).numpy() for name, x in found.items()}

    return stage


def _training(work: Workload, ref: modules.Reference, well: bool) -> Callable[[], dict]:
    rows, start = torch.tensor(work.tokens).long(), torch.tensor(work.start)
    images = torch.tensor(to_unit(work.images)).movedim(-1, 1)
    noise, sigma = (
        torch.tensor(work.training_noise).movedim(-1, 1).contiguous(),
        torch.tensor(work.sigma),
    )
    kept: dict = {}

    def begin():
        """Modules of one's own, so that the other side's steps do not move these weights."""
        own = modules.Reference(
            ref.config,
            *(copy.deepcopy(part) for part in (ref.ar, ref.connector, ref.sana)),
            ref.vae,
            ref.ta_tok,
        )
        # Weight decay spares vectors and modulation tables, as ours does.
        named = [
            item
            for part in (own.ar, own.connector, own.sana)
            for item in part.requires_grad_(True).named_parameters()
        ]
        decays = [p.ndim > 1 and "scale_shift_table" not in name for name, p in named]
        groups = [
            {
                "params": [p for (_, p), decay in zip(named, decays, strict=True) if decay is on],
                "weight_decay": WEIGHT_DECAY * on,
            }
            for on in (True, False)
        ]
        kept["ref"], kept["parameters"] = own, [p for _, p in named]
        kept["optimizer"] = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, fused=well or None
        )

    def step():
        if not kept:
            begin()
        own, scale = kept["ref"], work.config.dc_ae.scaling_factor
        with torch.no_grad():
            codes = own.ta_tok.encode(_view(work, images), only_needed=well)
            if not well:
                own.ta_tok.decode(codes)
            x0 = own.vae.encode(images, return_dict=False)[0] * scale
        ce, flow = joint_loss(own, rows, start, codes, x0, noise, sigma)
        (ce + flow).backward()
        torch.nn.utils.clip_grad_norm_(kept["parameters"], 1.0)
        kept["optimizer"].step()
        # now, so that gradients are not in memory while the others run
        kept["optimizer"].zero_grad()
        return {"ce": ce.detach().numpy(), "flow": flow.detach().numpy()}

    return step


def _view(work: Workload, images: torch.Tensor) -> torch.Tensor:
    size = work.config.ta_tok.encoder.image_size
    if images.shape[-1] == size:
        return images
    return torch.nn.functional.interpolate(
        images, (size, size), mode="bicubic", antialias=True
    ).clamp(-1, 1)
