"""Reference values for SigLIP and TA-Tok: transformers' own modules, composed in torch.

Running this file writes the fixture.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

# 37 pixels hold 7 patches of 5, and two rows and columns that nobody reads; pooled by 2 the grid is
# 3, and a row and column are left over.
ENCODER = {
    "hidden_size": 20,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 37,
    "patch_size": 5,
}
DECODER = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_patches": 16,
}
GRID, CODES, DIM = 7, 64, 16
ACT = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attn_implementation": "eager"}


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_linear = nn.Linear(ENCODER["hidden_size"], DIM)
        self.out_linear = nn.Linear(DIM, DIM)
        self.regularizer = nn.Module()
        self.regularizer.embedding = nn.Embedding(CODES, DIM)
        self.regularizer.embedding_proj = nn.Linear(DIM, DIM)


class TaTok(nn.Module):
    """TA-Tok put together from the specification (§2.3)."""

    def __init__(self):
        super().__init__()
        width = ENCODER["hidden_size"]
        self.encoder = SiglipVisionModel(SiglipVisionConfig(**ENCODER, **ACT))
        self.decoder = Siglip2VisionModel(
            Siglip2VisionConfig(**DECODER, **ACT, num_channels=DIM, patch_size=1)
        )
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.decode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)
        )
        self.bottleneck = Bottleneck()
        self.scale_layer = nn.Module()
        self.scale_layer.register_buffer("shift", torch.full((1, 3, 1, 1), 0.5))
        self.scale_layer.register_buffer("scale", torch.full((1, 3, 1, 1), 0.5))

    def hidden_states(self, pixels):
        return self.encoder(pixels, output_hidden_states=True).hidden_states

    def codebook(self):
        regularizer = self.bottleneck.regularizer
        return F.normalize(regularizer.embedding_proj(regularizer.embedding.weight), dim=-1)

    def encode(self, pixels, pool_scale):
        x = self.hidden_states(pixels)[-2]
        square = x.transpose(1, 2).reshape(len(x), -1, GRID, GRID)
        x = F.avg_pool2d(square, pool_scale, pool_scale).flatten(2).transpose(1, 2)
        features = self.encode_task_layer(x)
        z = F.normalize(self.bottleneck.in_linear(features), dim=-1)
        return features, z, z @ self.codebook().T

    def decode(self, ids):
        side, x = (
            int(ids.shape[1] ** 0.5),
            self.bottleneck.out_linear(F.embedding(ids, self.codebook())),
        )
        mask, shapes = torch.ones_like(ids), torch.tensor([[side, side]] * len(ids))
        vit = self.decoder(
            pixel_values=x, pixel_attention_mask=mask, spatial_shapes=shapes
        ).last_hidden_state
        return vit, self.decode_task_layer(vit)


def randomize(module, generator) -> None:
    """Every parameter is drawn: matrices keep the scale of their input, norm weights lie around 1,
    biases and the rest around 0."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            table = name.endswith(("position_embedding.weight", "regularizer.embedding.weight"))
            p.data = noise * (1.0 if table else p[0].numel() ** -0.5)
        else:
            p.data = noise * 0.3 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def published(name: str) -> str:
    """Names of transformers 5 -> names in the published file: its decoder has a level more, its
    encoder has none."""
    if name.startswith("decoder.") and not name.startswith("decoder.vision_model."):
        return name.replace("decoder.", "decoder.vision_model.", 1)
    return name.replace("encoder.vision_model.", "encoder.", 1)


@torch.no_grad()
def make() -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(2)
    model = TaTok().eval()
    randomize(model, generator)
    pixels = (
        torch.rand(2, 3, ENCODER["image_size"], ENCODER["image_size"], generator=generator) * 2 - 1
    )
    states = model.hidden_states(pixels)
    out = {f"weights/{published(name)}": value for name, value in model.state_dict().items()}
    out |= {
        "images": pixels.permute(0, 2, 3, 1),
        "hidden_2": states[-2],
        "hidden_3": states[-1],
        "codebook": model.codebook(),
    }
    for pool_scale in (1, 2):
        features, z, cosines = model.encode(pixels, pool_scale)
        best = cosines.topk(2, dim=-1).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-4, "a tie: ids would depend on rounding"
        ids = cosines.argmax(dim=-1)
        vit, decoded = model.decode(ids)
        named = {
            "features": features,
            "z": z,
            "cosines": cosines,
            "ids": ids,
            "vit": vit,
            "decoded": decoded,
        }
        out |= {f"pool_{pool_scale}/{key}": value for key, value in named.items()}
    out["ids_16"] = torch.randint(CODES, (2, DECODER["num_patches"]), generator=generator)
    out["decoded_16"] = model.decode(out["ids_16"])[1]
    return {name: np.ascontiguousarray(value.numpy()) for name, value in out.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parents[1] / "fixtures/ta_tok.npz", **make())
