"""Reference values of diffusers' AutoencoderDC at tiny sizes: run this file to write
tests/fixtures/dc_ae_<variant>.npz."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC

RES, VIT = "ResBlock", "EfficientViTBlock"
# Both halves have the same block types, widths and scales, as DcAeConfig has.
VARIANTS = {
    "published": {  # 8x12 pixels: linear attention on 4x6 latents, diffusers' quadratic form on 2x3
        "shared": {
            "block_types": (RES, VIT, VIT),
            "block_out_channels": (8, 16, 16),
            "qkv_multiscales": ((), (5,), (5,)),
        },
        "encoder_layers_per_block": (1, 1, 2),
        "decoder_layers_per_block": (2, 1, 1),
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
    },
    "shuffled": {
        "shared": {
            "block_types": (RES,) * 4,
            "block_out_channels": (4, 8, 16, 16),
            "qkv_multiscales": ((),) * 4,
        },
        "encoder_layers_per_block": (0, 1, 1, 1),
        "decoder_layers_per_block": (0, 1, 2, 2),
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
    },
}
IMAGE_SIZES = {"published": (8, 12), "shuffled": (16, 24)}
# The layers before a norm are so small that its epsilon matters.
BEFORE_NORM = ("conv2.weight", "to_out.weight", "conv_point.weight")


def _randomise(model, generator):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values *= parameter[0].numel() ** -0.5 * (0.01 if name.endswith(BEFORE_NORM) else 1)
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        else:
            values *= 0.3
        parameter.data.copy_(values)


@torch.no_grad()
def make(variant: str) -> dict[str, np.ndarray]:
    """Weights by torch name, and images, latents and reconstructions, channels last."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    fields = dict(VARIANTS[variant])
    shared = fields.pop("shared")
    halves = {
        f"{half}_{name}": value for name, value in shared.items() for half in ("encoder", "decoder")
    }
    model = AutoencoderDC(latent_channels=4, attention_head_dim=8, **halves, **fields)
    _randomise(model, generator)
    images = torch.rand((2, 3, *IMAGE_SIZES[variant]), generator=generator) * 2 - 1
    latents = model.encode(images).latent
    noise = torch.randn(latents.shape, generator=generator)
    values = {
        "images": images,
        "latents": latents,
        "decoder_latents": noise,
        "decoded": model.decode(noise).sample,
    }
    values = {name: value.movedim(1, -1) for name, value in values.items()}
    weights = {f"weights/{name}": value for name, value in model.state_dict().items()}
    return {name: value.contiguous().numpy() for name, value in (weights | values).items()}


if __name__ == "__main__":
    for variant in VARIANTS:
        np.savez_compressed(
            Path(__file__).parents[1] / "fixtures" / f"dc_ae_{variant}.npz", **make(variant)
        )
