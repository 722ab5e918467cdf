"""The stages of the benchmark in PyTorch, three times: as the original does them, done well, and
compiled."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from blip3o_jax.bench.stages import GUIDANCE, GUIDED_STEPS, LEARNING_RATE, WEIGHT_DECAY, Workload
from blip3o_jax.pixels import to_unit
from blip3o_jax.reference import modules, pipeline
from blip3o_jax.reference.compiled import check_compiler, compiled, compiled_reference, writer
from blip3o_jax.reference.stages import channels_last
from blip3o_jax.reference.training import joint_loss, losses


def gemm_flops_per_second(size: int, timed: Callable[[Callable], float]) -> float:
    """Of one f32 product of square matrices; `timed` gives the seconds of a call."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / timed(lambda: torch.mm(a, b))


def stages(work: Workload, folder: Path, threads: int) -> dict[str, dict[str, Callable[[], dict]]]:
    """{"original" | "well" | "compiled": {stage: function that gives its results as numpy arrays,
    channels last}}.

    The original: after the tokens a second forward over the finished row for their states; logits
    of the whole vocabulary; the connector in every denoising step; TA-Tok's encoder to its end and
    its decoder, whose features nobody looks at; AdamW's default loop. Well: states kept while
    decoding, image logits only, the connector once, no more of TA-Tok than the codes need,
    inference mode, fused AdamW. Both: scaled-dot-product attention, transformers' growing cache,
    dropout off. Compiled: well, with `reference.compiled`.

    A checkpoint of few steps is sampled in guided steps, since PyTorch has no other way.
    """
    check_compiler()
    torch.set_num_threads(threads)
    ref = modules.load(folder, spans=False)
    for module in (ref.ar, ref.connector, ref.sana, ref.vae, ref.ta_tok):
        module.requires_grad_(False)
    trained: dict = {}  # of both that do well, so that there is one copy of it
    fast = compiled_reference(ref)
    training = _training(work, ref, well=True, trained=trained)
    compiled_training = _training(work, fast, well=True, trained=trained, compute=compiled(losses))
    write = functools.partial(pipeline.greedy_tokens, ref)
    return {
        "original": _sampling(work, ref, _original_writer(ref), well=False)
        | {"train_step": _training(work, ref, well=False, trained={})},
        "well": _sampling(work, ref, write, well=True) | {"train_step": training},
        "compiled": _sampling(work, fast, writer(ref), well=True)
        | {"train_step": compiled_training},
    }


def _original_writer(ref: modules.Reference) -> Callable:
    def write(prompt: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, _ = pipeline.greedy_tokens(ref, prompt, valid, image_range_only=False)
        return codes, pipeline.forward_states(ref, prompt, valid, codes)

    return write


def _sampling(
    work: Workload, ref: modules.Reference, write: Callable, well: bool
) -> dict[str, Callable[[], dict]]:
    """`write` gives codes and states of a prompt; "well" has the connector once."""
    prompt = torch.tensor(work.prompt).long(), torch.tensor(work.valid)
    states, noise = torch.tensor(work.states), _channels_first(work.noise)

    def denoise(states, steps):
        return pipeline.denoise(ref, states, noise, steps, GUIDANCE, not well)

    def whole(steps):
        codes, states = write(*prompt)
        return {"tokens": codes, "pixels": pipeline.decode(ref, denoise(states, steps))}

    stages = {
        "decode": lambda: dict(zip(("tokens", "hidden"), write(*prompt), strict=True)),
        "denoise": lambda: {"latents": denoise(states, work.num_inference_steps)},
        "autoencoder": lambda: {"pixels": pipeline.decode(ref, noise)},
        "text_to_image": lambda: whole(work.num_inference_steps),
        "few_steps_denoise": lambda: {"latents": denoise(states, GUIDED_STEPS)},
        "few_steps_text_to_image": lambda: whole(GUIDED_STEPS),
    }
    return {name: _inferring(run, well) for name, run in stages.items()}


def _inferring(run: Callable[[], dict], well: bool) -> Callable[[], dict]:
    def stage():
        with torch.inference_mode() if well else torch.no_grad():
            return {name: channels_last(value) for name, value in run().items()}

    return stage


def _channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).movedim(-1, 1).contiguous()


def _training(
    work: Workload, ref: modules.Reference, well: bool, trained: dict, compute: Callable = losses
) -> Callable[[], dict]:
    """A step of the weights and the optimizer in `trained`, which the first one puts there, or back
    to where they began; who shares them then goes on from each other's steps."""
    rows, start = torch.tensor(work.tokens).long(), torch.tensor(work.start)
    images = torch.tensor(to_unit(work.images)).movedim(-1, 1)
    noise, sigma = _channels_first(work.training_noise), torch.tensor(work.sigma)
    has_begun = False

    # Modules of its own, so that the other side's steps do not move these weights.
    def begin():
        given = ref.ar, ref.connector, ref.sana
        if trained:
            for part, first in zip(trained["parts"], given, strict=True):
                part.load_state_dict(first.state_dict())
            trained["optimizer"].state.clear()
            return
        parts = [copy.deepcopy(part) for part in given]
        named = [item for part in parts for item in part.requires_grad_(True).named_parameters()]
        # Weight decay spares vectors and modulation tables, as ours does.
        decays = [p.ndim > 1 and "scale_shift_table" not in name for name, p in named]
        groups = []
        for on in (True, False):
            group = [p for (_, p), decay in zip(named, decays, strict=True) if decay is on]
            groups.append({"params": group, "weight_decay": WEIGHT_DECAY * on})
        trained["parts"] = parts
        trained["parameters"] = [p for _, p in named]
        trained["optimizer"] = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, fused=well or None
        )

    def step():
        nonlocal has_begun
        if not has_begun:
            begin()
            has_begun = True
        own = modules.Reference(ref.config, *trained["parts"], ref.vae, ref.ta_tok)
        with torch.no_grad():
            codes = ref.codes(_view(work, images), only_needed=well)
            if not well:
                ref.ta_tok.decode(codes)
            x0 = ref.encode(images)
        ce, flow = joint_loss(own, rows, start, codes, x0, noise, sigma, compute=compute)
        (ce + flow).backward()
        torch.nn.utils.clip_grad_norm_(trained["parameters"], 1.0)
        trained["optimizer"].step()
        # now, so that gradients are not in memory while the others run
        trained["optimizer"].zero_grad()
        return {"ce": ce.detach().numpy(), "flow": flow.detach().numpy()}

    return step


def _view(work: Workload, images: torch.Tensor) -> torch.Tensor:
    size = work.config.ta_tok.encoder.image_size
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return resized.clamp(-1, 1)
