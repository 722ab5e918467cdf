"""verify/stages.py in PyTorch: the same stages for the same inputs."""

import numpy as np
import torch

from blip3o_jax.reference import editing, pipeline
from blip3o_jax.reference.modules import Reference
from blip3o_jax.verify.stages import GUIDANCE, NUM_STEPS, TIMESTEP, edit_guidance


@torch.no_grad()
def stage_outputs(ref: Reference, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As verify.stages.stage_outputs; pictures and latents with channels last."""
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    prompt, valid = given["prompt"].long(), given["valid"]
    noise, images, view = (given[name].movedim(-1, 1) for name in ("noise", "images", "view"))
    # Each network on its own inputs, then the whole way.
    hidden = ref.ar.model(prompt[:1]).last_hidden_state
    condition = ref.connector(given["states"])
    tokens, states = pipeline.greedy_tokens(ref, prompt, valid)
    denoise = pipeline.denoise_few if ref.config.sana.few_steps else pipeline.denoise
    latents = denoise(ref, states, noise, NUM_STEPS, GUIDANCE)
    outputs = {
        "hidden": hidden,
        "logits": hidden @ ref.ar.lm_head.weight.T,
        "condition": condition,
        "velocity": ref.velocity(noise[:1], torch.full((1,), TIMESTEP), condition),
        "latents": ref.encode(images),
        "picture": ref.decode(noise[:1]),
        "codes": ref.ta_tok.encode(view),
        "tokens": tokens,
        "pixels": pipeline.decode(ref, latents),
    }
    if ref.config.max_sources:
        outputs |= edit_outputs(ref, given)
    return {name: channels_last(value) for name, value in outputs.items()}


@torch.no_grad()
def edit_outputs(ref: Reference, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As verify.stages.edit_outputs."""
    latents = given["source_latents"][0].movedim(-1, 1)
    ids = given["source_ids"][0].unflatten(0, (len(latents), -1))
    ids = ids if ids.is_floating_point() else ids.long()
    source, prompt = editing.Source(ids, latents), given["edit_prompt"].long()
    _, embeddings = editing.embed(ref, prompt, torch.tensor([prompt.shape[1] - 1]), [source])
    states, noise = given["states"], given["noise"][:1].movedim(-1, 1)
    time, scales = torch.full((1,), TIMESTEP), edit_guidance(ref.config)
    outputs = {
        "edit_hidden": ref.ar.model(inputs_embeds=embeddings).last_hidden_state,
        "edit_condition": editing.condition(ref, states[0], source),
        "edit_velocity": editing.velocity(ref, noise, time, states[0], source),
        "edit_guided": editing.denoise(ref, states, [source], noise, NUM_STEPS, *scales),
    }
    if ref.config.use_tar_siglip_features:
        outputs["features"] = ref.ta_tok.pooled(given["view"].movedim(-1, 1))
    return outputs


def channels_last(x: torch.Tensor) -> np.ndarray:
    """A result as numpy; [B,C,Y,X] becomes [B,Y,X,C]."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).numpy()
