"""The whole model as frozen dataclasses, and the named presets.

Field names follow the PyTorch configs they mirror (transformers' Qwen3Config and SiglipConfig,
diffusers' SanaTransformer2DModel and AutoencoderDC, TA-Tok's checkpoint arguments), so that a
`config.json` maps onto them by name. Every class checks itself: a wrong combination raises
`InputError` with one sentence. The published sizes are those of BLIP3o-NEXT (arXiv 2510.15857).
"""

import dataclasses
import functools
import math
import reprlib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from blip3o_jax.errors import InputError, nearest, require
from blip3o_jax.moved import refuse

__getattr__ = functools.partial(refuse, "config")
MAX_LAYERS, MAX_STAGES = 1024, 16
ZERO = ("layers_per_block", "_id", "max_sources", "vocab_padding", "few_steps")  # may be 0
MAX_DC_AE_SIZE = 512  # of either half, layers and their taps, which are traced one by one


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
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        uneven = f"Qwen3: {heads} query heads do not divide by {groups} key-value heads."
        require(heads % groups == 0, uneven)
        padding, width = self.vocab_padding, self.head_dim
        require(padding >= 0, f"Qwen3: vocab_padding is at least 0, not {padding}.")
        require(width % 2 == 0, f"Qwen3: head_dim {width} must be even for rotary embedding.")

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding in memory."""
        return self.vocab_size + self.vocab_padding


@dataclass(frozen=True)
class SiglipConfig:
    """SiglipVisionModel (fixed resolution); TaTokConfig says how many of the layers are used."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        width, heads = self.hidden_size, self.num_attention_heads
        require(width % heads == 0, f"SigLIP: width {width} does not divide by {heads} heads.")

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
        layer, layers = self.select_layer_id, self.encoder.num_hidden_layers
        outside = f"TA-Tok: select_layer_id {layer} must lie in [-{layers}, -1]."
        require(-layers <= layer <= -1, outside)
        is_square = math.isqrt(self.decoder_num_patches) ** 2 == self.decoder_num_patches
        require(is_square, "TA-Tok: decoder_num_patches must be a square number.")
        width, heads = self.encoder.hidden_size, self.decoder_num_attention_heads
        uneven = f"TA-Tok: width {width} does not divide by the decoder's {heads} heads."
        require(width % heads == 0, uneven)

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
    # ours, not 0: a model of mean velocities (train.distill), which is told the step that it takes
    # and the guidance; sampled in this number of steps, unless another is asked for
    few_steps: int = 0

    def __post_init__(self):
        unscaled = self.condition_positions and self.interpolation_scale is None
        needs = "SANA: condition_positions are those of the latents, which need an"
        require(not unscaled, f"{needs} interpolation_scale.")
        # Cross-attention has heads of its own, which make up the same width.
        heads, size = self.num_cross_attention_heads, self.cross_attention_head_dim
        width = self.hidden_size
        require(width == heads * size, f"SANA: width {width} is not {heads} cross heads x {size}.")

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        """Width of the gated half of the mix-FFN (GLUMBConv)."""
        return int(self.mlp_ratio * self.hidden_size)


BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
RESAMPLING = {
    "downsample_block_type": ("Conv", "pixel_unshuffle"),
    "upsample_block_type": ("interpolate", "pixel_shuffle"),
}


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
    downsample_block_type: str = "Conv"
    upsample_block_type: str = "interpolate"
    scaling_factor: float = 0.41407

    def __post_init__(self):
        # Every stage is described, by kinds that exist.
        widths, stages = self.block_out_channels, len(self.block_out_channels)
        require(stages > 0, "DC-AE: block_out_channels must have an entry.")
        layers = ("encoder_layers_per_block", "decoder_layers_per_block")
        for name in ("block_types", *layers, "qkv_multiscales"):
            entries = f"DC-AE: {name} must have {stages} entries, as block_out_channels."
            require(len(getattr(self, name)) == stages, entries)
        unknown = sorted(set(self.block_types) - set(BLOCK_TYPES))
        kinds = f"DC-AE: unknown block types {unknown}; known: {', '.join(BLOCK_TYPES)}."
        require(not unknown, kinds)
        for name, known in RESAMPLING.items():
            require(getattr(self, name) in known, f"DC-AE: {name} is {' or '.join(known)}.")
        # Widths that heads, and the channels of shortcuts, divide.
        is_divisible = widths[-1] % self.latent_channels == 0
        require(is_divisible, "DC-AE: the last width must divide by latent_channels.")
        head = self.attention_head_dim
        for width, kind in zip(widths, self.block_types, strict=True):
            uneven = f"DC-AE: width {width} does not divide into heads of {head}."
            require(kind == "ResBlock" or width % head == 0, uneven)
        for counts in (getattr(self, name) for name in layers):
            taps = [1 + sum(kernel**2 for kernel in scales) for scales in self.qkv_multiscales]
            size = sum(map(math.prod, zip(counts, taps, strict=True)))
            many = f"DC-AE: {size} layers and taps of qkv_multiscales in one half, more than"
            require(size <= MAX_DC_AE_SIZE, f"{many} {MAX_DC_AE_SIZE}.")
            empty = "DC-AE: only the first and the last stage may have no layers, the others"
            require(all(counts[1:-1]), f"{empty} would not change the resolution.")
            for fine, coarse, count in zip(widths, widths[1:], counts, strict=False):
                uneven = f"DC-AE: four times width {fine} must divide by the next width, {coarse}."
                require(not count or 4 * fine % coarse == 0, uneven)

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
    # Source images that an edit may have; their tokens are in its prompt. 0: text to image only.
    max_sources: int = 0
    # What else an editing checkpoint does with a source image (docs/model.md §1.2). Text to image
    # does not look at these. Its latents as more condition tokens, through a connector,
    use_und_image_vae: bool = False
    # or beside the noisy latents, along the width,
    use_und_image_vae_as_noise: bool = False
    # and then not as condition tokens, though their connector exists;
    only_use_und_image_vae_as_noise: bool = False
    # or as more channels of the noisy latents (ours, after VIBE);
    use_und_image_vae_as_channels: bool = False
    # the tokenizer's features in place of the prompt's image tokens
    use_tar_siglip_features: bool = False

    def __post_init__(self):
        # Every id has a row, and every code an id.
        rows, ids = self.qwen3.vocab_size, self.vocab.size
        too_few = f"{self.name}: vocabulary of {rows} rows is smaller than the ids need ({ids})."
        require(rows >= ids, too_few)
        tokens, codes = self.vocab.num_image_tokens, self.ta_tok.codebook_size
        require(tokens == codes, f"{self.name}: {tokens} image tokens but a codebook of {codes}.")
        # SANA works on the autoencoder's latents.
        among, beside = self.use_und_image_vae_as_channels, self.use_und_image_vae_as_noise
        takes, gives = self.sana.in_channels, (1 + among) * self.dc_ae.latent_channels
        channels = f"{self.name}: SANA takes {takes} channels, its inputs have {gives}."
        require(takes == gives, channels)
        # One source fits beside the noisy latents or among their channels.
        place = f"{self.name}: a source is beside the noisy latents or among their channels"
        require(not (among and beside), f"{place}, not both.")
        sources, fits = self.max_sources, self.max_sources <= 1 or not (among or beside)
        require(sources >= 0 and fits, f"{place}, or there may be several, not {sources}.")

    @property
    def image_size(self) -> int:
        """Pixels along one side of a generated image."""
        return self.sana.sample_size * self.dc_ae.factor

    @property
    def reference_tokens(self) -> bool:
        """Whether a source's latents are condition tokens."""
        return self.use_und_image_vae and not self.only_use_und_image_vae_as_noise

    @property
    def reads_source_latents(self) -> bool:
        """Whether the diffusion transformer is given a source's latents in some way."""
        flags = self.use_und_image_vae_as_noise, self.use_und_image_vae_as_channels
        return self.reference_tokens or any(flags)

    @property
    def num_condition_tokens(self) -> int:
        """`<S0>` and the image tokens: 730 as published."""
        return self.ta_tok.num_tokens + 1

    def check_sources(self, count: int) -> None:
        """InputError unless the model can edit `count` source images together."""
        what = "The checkpoint has no editing weights (its max_sources is 0)"
        require(self.max_sources > 0, f"{what}; it makes images from text alone.")
        takes = "1" if self.max_sources == 1 else f"1 to {self.max_sources}"
        limit = f"{count} source images for one edit; the checkpoint takes {takes}."
        require(1 <= count <= self.max_sources, limit)


def typed(value: Any, kind: Any, name: str) -> Any:
    """`value`, also of JSON, as annotated; InputError for another type or one beyond sense."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else typed(value, arguments[0], name)
    if origin is tuple and isinstance(value, list | tuple) and len(value) <= MAX_STAGES:
        return tuple(typed(item, arguments[0], name) for item in value)
    if kind is float and type(value) in (int, float) and 0 < value < 1e9:
        return float(value)
    # Numbers beyond these would only fail later, or fill the memory.
    if kind is int and type(value) is int:
        least = 0 if name.endswith(ZERO) else 1
        most = MAX_LAYERS if "layers" in name or "depth" in name else 2**31 - 1
        if least <= value <= most or name == "select_layer_id":
            return value
    if kind not in (int, float) and isinstance(kind, type) and type(value) is kind:
        return value
    kind = getattr(kind, "__name__", kind)
    raise InputError(f"{name} is {reprlib.repr(value)}, which makes no sense as {kind}.")


def replace(config, /, **changes):
    """`dataclasses.replace` that accepts dotted names, replace(c, **{"sana.num_layers": 2}), and
    nested ones, replace(c, sana={"num_layers": 2}).

    All changes are made before any check.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    own: dict = {}
    nested: dict[str, dict] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        require(head in kinds, f"Unknown key {key!r}; {nearest(head, kinds)}")
        if rest or (isinstance(value, dict) and dataclasses.is_dataclass(kinds[head])):
            nested.setdefault(head, {}).update({rest: value} if rest else value)
        else:
            own[head] = typed(value, kinds[head], head)
    # Each part with all of its own changes at once.
    for head, part in nested.items():
        require(dataclasses.is_dataclass(kinds[head]), f"{head} is a value, not a group of keys.")
        own[head] = replace(getattr(config, head), **part)
    return dataclasses.replace(config, **own)
