"""A published checkpoint as transformers' and diffusers' own modules, and TA-Tok."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderDC, SanaTransformer2DModel
from diffusers.models.normalization import RMSNorm
from torch import nn

from blip3o_jax.config import Blip3oConfig, TaTokConfig, replace
from blip3o_jax.convert.config_json import OURS_OF_SANA, dc_ae_json, sana_json
from blip3o_jax.convert.published import TA_TOK, open_published, published_name
from blip3o_jax.errors import require
from blip3o_jax.models.sana import grid_positions
from blip3o_jax.models.sana_time import HERE, SPAN_SCALE

# Fields of our configs that transformers' classes have under the same name.
TRANSFORMER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION = (*TRANSFORMER, "image_size", "patch_size", "layer_norm_eps")
QWEN3 = (*TRANSFORMER, "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps")


def _fields(cfg: object, names: tuple[str, ...]) -> dict:
    return {name: getattr(cfg, name) for name in names}


class TaTok(nn.Module):
    """TA-Tok (docs/model.md §2.3) around transformers' SigLIP; pixels [B,3,H,W] in [-1,1]."""

    def __init__(self, cfg: TaTokConfig):
        super().__init__()
        self.cfg, enc = cfg, cfg.encoder
        width, dim = enc.hidden_size, cfg.bottleneck_dim
        # The two vision transformers.
        act = {"hidden_act": "gelu_pytorch_tanh"}
        self.encoder = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**_fields(enc, VISION), **act)
        )
        decoder = transformers.Siglip2VisionConfig(
            hidden_size=width,
            intermediate_size=cfg.decoder_intermediate_size,
            num_hidden_layers=cfg.decoder_depth,
            num_attention_heads=cfg.decoder_num_attention_heads,
            num_patches=cfg.decoder_num_patches,
            num_channels=dim,
            patch_size=1,
            layer_norm_eps=enc.layer_norm_eps,
            **act,
        )
        self.decoder = transformers.Siglip2VisionModel(decoder)
        # What surrounds them, under the names of the checkpoint.
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        into, out = nn.Linear(width, width), nn.Linear(width, width)
        self.decode_task_layer = nn.Sequential(into, nn.Tanh(), out)
        ends = {"in_linear": nn.Linear(width, dim), "out_linear": nn.Linear(dim, dim)}
        codes = {"embedding": nn.Embedding(cfg.codebook_size, dim)}
        codes["embedding_proj"] = nn.Linear(dim, dim)
        self.bottleneck = nn.ModuleDict({**ends, "regularizer": nn.ModuleDict(codes)})

    def codebook(self) -> torch.Tensor:
        """The codes [V,E], unit length."""
        regularizer = self.bottleneck.regularizer
        return F.normalize(regularizer.embedding_proj(regularizer.embedding.weight), dim=-1)

    def pooled(self, pixels: torch.Tensor, only_needed: bool = False) -> torch.Tensor:
        """SigLIP's features before the quantizer, one vector for each token [B,n,D].

        `only_needed` leaves out the encoder's layers and head behind the state that is quantised.
        """
        cfg, layers = self.cfg, self.cfg.num_encoder_layers
        if only_needed:
            x = self.encoder.embeddings(pixels)
            for layer in self.encoder.encoder.layers[:layers]:
                x = layer(x, None)
        else:
            x = self.encoder(pixels, output_hidden_states=True).hidden_states[layers]
        if cfg.pool_scale > 1:
            square = x.transpose(1, 2).reshape(len(x), -1, cfg.encoder.grid, cfg.encoder.grid)
            x = F.avg_pool2d(square, cfg.pool_scale, cfg.pool_scale).flatten(2).transpose(1, 2)
        return x

    def encode(self, pixels: torch.Tensor, only_needed: bool = False) -> torch.Tensor:
        """Nearest codes [B,n]; `only_needed` as in `pooled`."""
        x = self.pooled(pixels, only_needed)
        z = F.normalize(self.bottleneck.in_linear(self.encode_task_layer(x)), dim=-1)
        return (z @ self.codebook().T).argmax(dim=-1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes [B,n] -> features [B,n,D]: what the original computes whenever it encodes, and
        BLIP3o-NEXT never looks at."""
        side = math.isqrt(codes.shape[1])
        x = self.bottleneck.out_linear(F.embedding(codes, self.codebook()))
        shapes = torch.tensor([[side, side]] * len(codes))
        mask = torch.ones_like(codes)
        vit = self.decoder(pixel_values=x, pixel_attention_mask=mask, spatial_shapes=shapes)
        return self.decode_task_layer(vit.last_hidden_state)


@dataclass
class Reference:
    """The modules of one checkpoint, in evaluation mode, and what they give without wrapping."""

    config: Blip3oConfig
    ar: transformers.Qwen3ForCausalLM
    connector: nn.Sequential
    sana: SanaTransformer2DModel
    vae: AutoencoderDC
    ta_tok: TaTok
    vae_connector: nn.Sequential | None = None
    siglip_connector: nn.Sequential | None = None

    def velocity(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        condition: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """SANA's velocity [B,C,Y,X] at latents x and timesteps t [B] in (0, 1000]; the tokens of
        the condition outside `mask` [B,S] are not attended to. Channels that the latents leave open
        are those of a source, which is zeros."""
        missing = self.sana.config.in_channels - x.shape[1]
        return self.sana(
            F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x,
            encoder_hidden_states=condition,
            timestep=t,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B,3,H,W] in [-1,1] -> scaled latents [B,C,Y,X]."""
        return self.vae.encode(images, return_dict=False)[0] * self.config.dc_ae.scaling_factor

    def codes(self, view: torch.Tensor, only_needed: bool = False) -> torch.Tensor:
        """Images at the tokenizer's resolution -> their codes, see `TaTok.encode`."""
        return self.ta_tok.encode(view, only_needed)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of `encode`."""
        latents = (latents / self.config.dc_ae.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0]


def build(cfg: Blip3oConfig) -> Reference:
    """The modules of a configuration, with PyTorch's own initial weights."""
    q, width = cfg.qwen3, cfg.sana.caption_channels
    # The transformer: every field set, since its class has the defaults of another model.
    ar = transformers.Qwen3Config(
        **_fields(q, (*QWEN3, "tie_word_embeddings")),
        hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": q.rope_theta},
        max_position_embeddings=40960,
        attention_bias=False,
        use_sliding_window=False,
        max_window_layers=q.num_hidden_layers,
        pad_token_id=cfg.vocab.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    # SANA, with our positions on the condition and our spans where the preset has them.
    fields = sana_json(cfg.sana)
    for name in OURS_OF_SANA:
        fields.pop(name, None)
    sana = SanaTransformer2DModel.from_config(fields)
    if cfg.sana.few_steps:
        sana.span_embed = SpanEmbed(cfg.sana.hidden_size)
        sana.time_embed.emb.register_forward_hook(lambda _, __, e: e + sana.span_embed().to(e))
    if cfg.sana.condition_positions:
        sana.caption_norm.register_forward_hook(_add_positions(cfg))
    connector = _connector(cfg, q.hidden_size, width)
    vae = AutoencoderDC.from_config(dc_ae_json(cfg.dc_ae))
    modules = (transformers.Qwen3ForCausalLM(ar), connector, sana, vae, TaTok(cfg.ta_tok))
    reference = Reference(cfg, *(module.eval() for module in modules))
    # The connectors that only an editing model has.
    if cfg.use_und_image_vae:
        reference.vae_connector = _connector(cfg, cfg.dc_ae.latent_channels, width)
    if cfg.use_tar_siglip_features:
        vision = cfg.ta_tok.encoder.hidden_size
        reference.siglip_connector = _connector(cfg, vision, q.hidden_size)
    return reference


def _connector(cfg: Blip3oConfig, inputs: int, outputs: int) -> nn.Sequential:
    into, out = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)
    norm = RMSNorm(outputs, eps=cfg.connector_eps)
    return nn.Sequential(into, nn.GELU(approximate="tanh"), out, norm)


class SpanEmbed(nn.Module):
    """models.sana.SpanEmbed; who calls SANA sets `span` [B,4] before, or leaves the one that adds
    nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = (
            nn.Linear(4 * 256, width),
            nn.Linear(width, width, bias=False),
        )
        self.span = torch.tensor([HERE])

    def forward(self) -> torch.Tensor:
        spans = torch.cat([self.span, torch.tensor([HERE])])
        angles = SPAN_SCALE * spans[..., None] * 10000.0 ** (-torch.arange(128) / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)
        hidden = F.silu(self.linear_1(waves))
        return self.linear_2(hidden[:-1] - hidden[-1:])


def _add_positions(cfg: Blip3oConfig):
    """Our one addition to SANA: the encoded condition's tokens after the first lie on a grid, as do
    the latents of each source image behind them."""
    own, side = cfg.num_condition_tokens, cfg.sana.sample_size

    def places(size: int) -> torch.Tensor:
        grid = np.asarray(grid_positions(cfg.sana, size, size), np.float32)
        return torch.from_numpy(grid.reshape(size**2, -1))

    # Made once, not in each step.
    tokens, source = F.pad(places(math.isqrt(own - 1)), (0, 0, 1, 0)), places(side)

    def hook(module, inputs, encoded):
        sources = [source] * ((encoded.shape[1] - own) // side**2)
        return encoded + torch.cat([tokens, *sources]).to(encoded.dtype)

    return hook


def round_to(reference: Reference, dtype: str) -> Reference:
    """The same modules, whose weights are rounded to a dtype in place."""
    for module in vars(reference).values():
        for weight in module.parameters() if isinstance(module, nn.Module) else ():
            weight.data = weight.data.to(getattr(torch, dtype)).float()
    return reference


def load(directory: str | Path, spans: bool = True) -> Reference:
    """The modules with the weights of a published folder; InputError when one is not there. Without
    its `spans` a SANA of few steps is an ordinary one."""
    cfg, stored = open_published(Path(directory))
    cfg = cfg if spans else replace(cfg, sana={"few_steps": 0})
    reference = build(cfg)
    parts = {
        "": reference.ar,
        "model.diffusion_connector.": reference.connector,
        "model.sana.": reference.sana,
        "model.sana_vae.": reference.vae,
        TA_TOK: reference.ta_tok,
        "model.und_image_vae_connector.": reference.vae_connector,
        "model.tar_siglip_features_connector.": reference.siglip_connector,
    }
    parts = {prefix: module for prefix, module in parts.items() if module is not None}
    # Every weight of a module is in the file, but for what its checkpoint never had.
    for prefix, module in parts.items():
        for name, target in module.state_dict().items():
            full = published_name(prefix + name.replace("encoder.vision_model.", "encoder.", 1))
            if full == "lm_head.weight" and cfg.qwen3.tie_word_embeddings:
                continue
            if full in stored:
                target.copy_(torch.from_numpy(stored[full].read(np.float32)))
                continue
            derived = prefix == TA_TOK or name in ("pos_embed", "patch_embed.pos_embed")
            require(derived, f"{directory}: PyTorch's module needs {full!r}, which is not there.")
    return reference
