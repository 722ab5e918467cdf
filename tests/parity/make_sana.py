"""Reference values of diffusers' SanaTransformer2DModel, BLIP3o's connector and the flow-matching
scheduler, at tiny sizes.

Running this file writes tests/fixtures/sana.npz.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from diffusers.models.normalization import RMSNorm

SIZES = {
    "in_channels": 4,
    "out_channels": 6,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 6,
}
# The second has the first's weights but for the query and key norms.
VARIANTS = {
    "normed": {"qk_norm": "rms_norm_across_heads"},
    "positioned": {"qk_norm": None, "interpolation_scale": 2.0},
}
GRIDS = {"normed": (4, 8), "positioned": (8, 3)}
# Layers whose results are made so small that the epsilon of the norm behind them matters.
SMALL = (
    "attn1.to_k.weight",
    "caption_projection.linear_2.weight",
    "caption_projection.linear_2.bias",
)
SMALL_IN_CONNECTOR = ("2.weight", "2.bias")
STATES = 10  # width of the connector's input


def _randomise(model, generator, small):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "table" in name:
            values *= 0.5
        elif parameter.ndim > 1:
            values *= parameter[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        else:
            values *= 0.3
        if name.endswith(small):
            values *= 0.005
        parameter.data.copy_(values)


def _sana(generator):
    arrays, weights = {}, None
    for variant, fields in VARIANTS.items():
        model = SanaTransformer2DModel(**SIZES, **fields)
        if weights is None:
            _randomise(model, generator, SMALL)
            weights = model.state_dict()
        else:
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
        latents = torch.randn((2, SIZES["in_channels"], *GRIDS[variant]), generator=generator)
        condition = torch.randn((2, 5, SIZES["caption_channels"]), generator=generator)
        t = torch.tensor([1000.0, 33.3333])
        velocity = model(latents, encoder_hidden_states=condition, timestep=t).sample
        encoded = model.caption_norm(model.caption_projection(condition))
        arrays |= {
            f"{variant}/latents": latents.movedim(1, -1),
            f"{variant}/velocity": velocity.movedim(1, -1),
        }
        arrays |= {
            f"{variant}/t": t,
            f"{variant}/condition": condition,
            f"{variant}/encoded": encoded,
        }
    return arrays | {f"weights/{name}": value for name, value in weights.items()}


def _connector(generator):
    width = SIZES["caption_channels"]
    layers = (
        torch.nn.Linear(STATES, width),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Linear(width, width),
        RMSNorm(width, eps=1e-5),
    )
    model = torch.nn.Sequential(*layers)
    _randomise(model, generator, SMALL_IN_CONNECTOR)
    model[3].weight.data += 1  # a norm named by a number
    states = torch.randn((2, 3, STATES), generator=generator)
    states[1, 0] = 0  # a dropped condition
    arrays = {f"connector/weights/{name}": value for name, value in model.state_dict().items()}
    return arrays | {"connector/states": states, "connector/condition": model(states)}


def _flow(generator):
    velocities = torch.randn((5, 2, 2, 3, 4), generator=generator)
    noise = torch.randn((2, 2, 3, 4), generator=generator)
    arrays = {"flow/velocities": velocities, "flow/noise": noise}
    for shift in (1, 3):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
        table = {"training_sigmas": scheduler.sigmas, "training_timesteps": scheduler.timesteps}
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 30, 30))
        table |= {"sigmas": scheduler.sigmas, "timesteps": scheduler.timesteps}
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
        x = noise
        for t, velocity in zip(scheduler.timesteps, velocities, strict=True):
            x = scheduler.step(velocity, t, x).prev_sample
        arrays |= {
            f"flow/shift{shift}/{name}": value for name, value in (table | {"sampled": x}).items()
        }
    scheduler = FlowMatchEulerDiscreteScheduler()
    noisy = scheduler.scale_noise(velocities[0], torch.tensor([875.0, 3.0]), noise)
    return arrays | {"flow/noisy": noisy}


@torch.no_grad()
def make() -> dict[str, np.ndarray]:
    """Weights by torch name; inputs and outputs by variant, latents channels last."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    arrays = _sana(generator) | _connector(generator) | _flow(generator)
    return {name: value.contiguous().numpy() for name, value in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parents[1] / "fixtures" / "sana.npz", **make())
