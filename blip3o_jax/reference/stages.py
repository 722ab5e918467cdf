"""convert/stages.py in PyTorch: the same stages for the same inputs."""

import numpy as np
import torch

from blip3o_jax.reference import pipeline
from blip3o_jax.reference.modules import Reference
from blip3o_jax.verify.stages import GUIDANCE, NUM_STEPS, TIMESTEP


@torch.no_grad()
def stage_outputs(ref: Reference, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As convert.stages.stage_outputs, for the same inputs; pictures and latents with channels
    last."""
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    prompt, valid = given["prompt"].long(), given["valid"]
    noise = given["noise"].movedim(-1, 1)
    scale, found = ref.config.dc_ae.scaling_factor, {}
    found["hidden"] = ref.ar.model(prompt[:1]).last_hidden_state
    found["logits"] = found["hidden"] @ ref.ar.lm_head.weight.T
    found["condition"] = ref.connector(given["states"])
    t = torch.full((1,), TIMESTEP)
    found["velocity"] = ref.sana(
        noise[:1], encoder_hidden_states=found["condition"], timestep=t, return_dict=False
    )[0].movedim(1, -1)
    found["latents"] = scale * ref.vae.encode(given["images"].movedim(-1, 1), return_dict=False)[
        0
    ].movedim(1, -1)
    found["picture"] = ref.vae.decode(noise[:1] / scale, return_dict=False)[0].movedim(1, -1)
    found["codes"] = ref.ta_tok.encode(given["view"].movedim(-1, 1))
    found["tokens"], states = pipeline.greedy_tokens(ref, prompt, valid)
    latents = pipeline.denoise(ref, states, noise, NUM_STEPS, GUIDANCE)
    found["pixels"] = pipeline.decode(ref, latents).movedim(1, -1)
    return {name: value.numpy() for name, value in found.items()}
