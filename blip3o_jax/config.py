"""The whole model as frozen dataclasses, and the named presets.

Field names follow the PyTorch configs they mirror (transformers' Qwen3Config and SiglipConfig,
diffusers' SanaTransformer2DModel and AutoencoderDC, TA-Tok's checkpoint arguments), so that a
`config.json` maps onto them by name. Every class checks itself: a wrong combination raises
`InputError` with one sentence. The published sizes are those of BLIP3o-NEXT (arXiv 2510.15857).
"""

import dataclasses
import functools
from dataclasses import dataclass, field

from blip3o_jax.errors import InputError, nearest
from blip3o_jax.moved import refuse

__getattr__ = functools.partial(refuse, "config")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class Qwen3Config:
    """Qwen3ForCausalLM. `vocab_size` counts text, special, scale and image tokens together."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    # rows behind the vocabulary, so that a mesh divides it: in memory, never in a published file
    vocab_padding: int = 0

    def __post_init__(self):
        _need(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"Qwen3: {self.num_attention_heads} query heads do not divide by "
            f"{self.num_key_value_heads} key-value heads.",
        )
        _need(
            self.vocab_padding >= 0,
            f"Qwen3: vocab_padding is at least 0, not {self.vocab_padding}.",
        )
        _need(
            self.head_dim % 2 == 0,
            f"Qwen3: head_dim {self.head_dim} must be even for rotary embedding.",
        )

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding in memory."""
        return self.vocab_size + self.vocab_padding


@dataclass(frozen=True)
class SiglipConfig:
    """SiglipVisionModel (fixed resolution).

    `num_hidden_layers` as published; TaTokConfig says how many are used.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        _need(
            self.hidden_size % self.num_attention_heads == 0,
            f"SigLIP: width {self.hidden_size} does not divide by "
            f"{self.num_attention_heads} heads.",
        )

    @property
    def grid(self) -> int:
        """Patches along one side; pixels beyond the last whole patch are ignored, as in PyTorch."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TaTokConfig:
    """TA-Tok: SigLIP2 features -> SimVQ codes, and a small ViT that decodes codes to features
    (docs/model.md §2.3)."""

    encoder: SiglipConfig = field(default_factory=SiglipConfig)
    # which of the encoder's hidden states is quantised; -1 is the last layer's output
    select_layer_id: int = -2
    bottleneck_dim: int = 1536
    codebook_size: int = 65536
    stochastic_temperature: float = 0.03
    pool_scale: int = 1
    decoder_depth: int = 3
    decoder_num_attention_heads: int = 12
    decoder_intermediate_size: int = 3072
    decoder_num_patches: int = 256  # learned positions of the decoder, resized to the token grid

    def __post_init__(self):
        _need(
            -self.encoder.num_hidden_layers <= self.select_layer_id <= -1,
            f"TA-Tok: select_layer_id {self.select_layer_id} must lie in "
            f"[-{self.encoder.num_hidden_layers}, -1].",
        )
        side = round(self.decoder_num_patches**0.5)
        _need(
            side * side == self.decoder_num_patches,
            "TA-Tok: decoder_num_patches must be a square number.",
        )
        width, heads = self.encoder.hidden_size, self.decoder_num_attention_heads
        _need(
            width % heads == 0,
            f"TA-Tok: width {width} does not divide by the decoder's {heads} heads.",
        )

    @property
    def num_encoder_layers(self) -> int:
        """Layers that reach the selected hidden state (26 of 27 as published)."""
        return self.encoder.num_hidden_layers + 1 + self.select_layer_id

    @property
    def grid(self) -> int:
        return self.encoder.grid // self.pool_scale

    @property
    def num_tokens(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class SanaConfig:
    """SanaTransformer2DModel (docs/model.md §2.4). SANA 1.0 has `qk_norm=False`, 1.5 has True."""

    in_channels: int = 32
    out_channels: int = 32
    num_layers: int = 20
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    qk_norm: bool = True
    norm_eps: float = 1e-6
    sample_size: int = 32  # latent rows and columns at the preset's resolution
    # not None: fixed sine-cosine positions are added to the latent tokens
    interpolation_scale: float | None = None
    # ours: the same positions on the condition, whose tokens after the first are a square grid
    condition_positions: bool = False

    def __post_init__(self):
        _need(
            self.interpolation_scale is not None or not self.condition_positions,
            "SANA: condition_positions are those of the latents, which need an "
            "interpolation_scale.",
        )
        _need(
            self.hidden_size == self.num_cross_attention_heads * self.cross_attention_head_dim,
            f"SANA: width {self.hidden_size} is not {self.num_cross_attention_heads} cross "
            f"heads x {self.cross_attention_head_dim}.",
        )

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        """Width of the gated half of the mix-FFN (GLUMBConv)."""
        return int(self.mlp_ratio * self.hidden_size)


@dataclass(frozen=True)
class DcAeConfig:
    """AutoencoderDC (docs/model.md §2.5). Tuples run from the highest resolution to the lowest."""

    latent_channels: int = 32
    attention_head_dim: int = 32
    block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    downsample_block_type: str = "Conv"  # or "pixel_unshuffle"
    upsample_block_type: str = "interpolate"  # or "pixel_shuffle"
    scaling_factor: float = 0.41407

    def __post_init__(self):
        # Every stage is described.
        stages = len(self.block_out_channels)
        _need(stages > 0, "DC-AE: block_out_channels must have an entry.")
        for name in (
            "block_types",
            "encoder_layers_per_block",
            "decoder_layers_per_block",
            "qkv_multiscales",
        ):
            _need(
                len(getattr(self, name)) == stages,
                f"DC-AE: {name} must have {stages} entries, as block_out_channels.",
            )
        # Kinds that exist.
        unknown = set(self.block_types) - {"ResBlock", "EfficientViTBlock"}
        _need(
            not unknown,
            f"DC-AE: unknown block types {sorted(unknown)}; known: ResBlock, EfficientViTBlock.",
        )
        _need(
            self.downsample_block_type in ("Conv", "pixel_unshuffle"),
            "DC-AE: downsample_block_type is Conv or pixel_unshuffle.",
        )
        _need(
            self.upsample_block_type in ("interpolate", "pixel_shuffle"),
            "DC-AE: upsample_block_type is interpolate or pixel_shuffle.",
        )
        _need(
            self.block_out_channels[-1] % self.latent_channels == 0,
            "DC-AE: the last width must divide by latent_channels.",
        )
        # Widths that heads, and the channels of shortcuts, divide.
        widths = self.block_out_channels
        for width, kind in zip(widths, self.block_types, strict=True):
            fits = kind == "ResBlock" or width % self.attention_head_dim == 0
            _need(
                fits,
                f"DC-AE: width {width} does not divide into heads of {self.attention_head_dim}.",
            )
        for layers in (self.encoder_layers_per_block, self.decoder_layers_per_block):
            _need(
                all(layers[1:-1]),
                "DC-AE: only the first and the last stage may have no layers, the others "
                "would not change the resolution.",
            )
            for fine, coarse, count in zip(widths, widths[1:], layers, strict=False):
                _need(
                    not count or 4 * fine % coarse == 0,
                    f"DC-AE: four times width {fine} must divide by the next width, {coarse}.",
                )

    @property
    def factor(self) -> int:
        """Pixels per latent row (32 as published)."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class VocabConfig:
    """Ids of the special and image tokens, with the names that BLIP3o's config.json gives them
    (docs/model.md §4.1)."""

    image_start_tag_id: int = 151669  # <im_start>
    image_end_tag_id: int = 151670  # <im_end>
    scale_start_token_id: int = 151671  # <S0>
    num_scale_tokens: int = 3
    image_start_token_id: int = 151674  # <I0>
    num_image_tokens: int = 65536
    pad_token_id: int = 151643
    eos_token_id: int = 151645

    @property
    def size(self) -> int:
        """Rows of the embedding that the ids need."""
        return self.image_start_token_id + self.num_image_tokens

    @property
    def image_end_token_id(self) -> int:
        return self.size - 1


@dataclass(frozen=True)
class Blip3oConfig:
    """BLIP3o-NEXT: the four networks, the vocabulary and the resolution."""

    name: str
    qwen3: Qwen3Config
    vocab: VocabConfig = field(default_factory=VocabConfig)
    ta_tok: TaTokConfig = field(default_factory=TaTokConfig)
    sana: SanaConfig = field(default_factory=SanaConfig)
    dc_ae: DcAeConfig = field(default_factory=DcAeConfig)
    max_prompt_tokens: int = 512
    connector_eps: float = 1e-5
    # What an editing checkpoint does with the source image's latents (docs/model.md §1.2). Text to
    # image does not look at these.
    use_und_image_vae: bool = False  # more condition tokens, through a connector of their own
    use_und_image_vae_as_noise: bool = False  # beside the noisy latents
    # the first of the two is then off, though its connector exists
    only_use_und_image_vae_as_noise: bool = False
    # the tokenizer's features in place of the prompt's image tokens
    use_tar_siglip_features: bool = False

    def __post_init__(self):
        _need(
            self.qwen3.vocab_size >= self.vocab.size,
            f"{self.name}: vocabulary of {self.qwen3.vocab_size} rows is smaller than the "
            f"ids need ({self.vocab.size}).",
        )
        _need(
            self.vocab.num_image_tokens == self.ta_tok.codebook_size,
            f"{self.name}: {self.vocab.num_image_tokens} image tokens but a codebook of "
            f"{self.ta_tok.codebook_size}.",
        )
        _need(
            self.sana.in_channels == self.dc_ae.latent_channels,
            f"{self.name}: SANA takes {self.sana.in_channels} channels, the autoencoder "
            f"gives {self.dc_ae.latent_channels}.",
        )

    @property
    def image_size(self) -> int:
        """Pixels along one side of a generated image."""
        return self.sana.sample_size * self.dc_ae.factor

    @property
    def num_condition_tokens(self) -> int:
        """`<S0>` and the image tokens: 730 as published."""
        return self.ta_tok.num_tokens + 1


def replace(config, **changes):
    """`dataclasses.replace` that accepts dotted names: replace(c, **{"sana.num_layers": 2}).

    All changes are made before any check.
    """
    own: dict = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in {f.name for f in dataclasses.fields(config)}:
            raise InputError(
                f"Unknown key {key!r}; "
                f"{nearest(head, [f.name for f in dataclasses.fields(config)])}"
            )
        if rest:
            own.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    nested = {
        head: replace(getattr(config, head), **value)
        for head, value in own.items()
        if isinstance(value, dict)
    }
    return dataclasses.replace(config, **{**own, **nested})
