"""What the diffusion transformer is given besides latents and time: from text, and from the source
images of an edit; built here for the loss and for sampling alike (docs/model.md §1.2, §5.2).

B samples, N source images of a sample, S condition tokens; `params` are those of all parts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import Array

from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.sample import flow
from blip3o_jax.sample.flow import Scalar
from blip3o_jax.sample.settings import EditSettings

# What guidance compares the whole condition with: no condition at all, the source alone, or, as the
# PyTorch code, nothing but the reference beside the noisy latents.
NULLS = ("nothing", "source", "original")


@flax.struct.dataclass
class Guidance:
    """What `flow.guided` is given: a scale for each of `nulls`, which are of NULLS."""

    scales: tuple[Scalar, ...] = ()
    renorm_min: Scalar | None = None
    nulls: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())


def guidance(
    text: Scalar | None, image: float | None = None, renorm_min: float = 1.0, quirks: bool = False
) -> Guidance:
    """Guidance by the scale of the text (None: none), for an edit also by that of its source image
    (both 1: none); no more forwards a step than these numbers need.

    `quirks`: the PyTorch code's null of an edit, which it guides by one scale.
    """
    renorm = None if renorm_min == 1 else renorm_min
    if image is None or quirks or (image == text and text != 1):
        nothing = "original" if quirks else "nothing"
        return Guidance() if text is None else Guidance((text,), renorm, (nothing,))
    if image == 1:
        return Guidance() if text == 1 else Guidance((text,), renorm, ("source",))
    return Guidance((image, text), renorm, ("nothing", "source"))


def edit_options(settings: EditSettings) -> dict[str, Any]:
    """The keywords of `programs.edit`."""
    options = dataclasses.asdict(settings)
    names = ("guidance_scale", "image_guidance_scale", "renorm_min", "reference_quirks")
    scales = [options.pop(name) for name in names]
    return options | {"guidance_scale": guidance(*scales)}


@flax.struct.dataclass
class Sources:
    """The source images of B samples, encoded: an edit needs them once, not at every step."""

    latents: Array  # [B,N,Y,X,C] f32, scaled as SANA takes them
    exists: Array  # [B,N] bool; a row of text to image has none


@flax.struct.dataclass
class Condition:
    """The condition of B samples; None for what the model or its samples do not have."""

    tokens: Array  # [B,S,caption]
    mask: Array | None = None  # [B,S] bool, the tokens that exist
    # [B,Y,X,C] clean latents, beside the noisy ones or among their channels
    reference: Array | None = None
    has_reference: Array | None = None  # [B] bool, of those beside them
    # trailing tokens that are pixels of source images
    num_reference: int = flax.struct.field(pytree_node=False, default=0)


def build(
    model: Blip3o,
    params: Params,
    hidden: Array,
    sources: Sources | None = None,
    source_dropped: Array | None = None,
) -> Condition:
    """From hidden states [B,n+1,D], zeros where they are dropped, and sources, dropped where
    `source_dropped` [B] says so.

    A dropped source is zeros: behind its connector, and as latents. A sample that never had one is
    computed as text to image, whatever the others have.
    """
    condition = condition_tokens(model, params, hidden, sources, source_dropped)
    return condition.replace(**reference(model, sources, source_dropped))


def condition_tokens(
    model: Blip3o,
    params: Params,
    hidden: Array,
    sources: Sources | None,
    source_dropped: Array | None,
) -> Condition:
    """The tokens of `build`, with which of them exist."""
    tokens = model.apply(params, "diffusion_connector", hidden)
    if sources is None or not model.config.reference_tokens:
        return Condition(tokens)
    extra, exist = reference_tokens(model, params, sources, _kept(sources, source_dropped))
    own = jnp.ones(tokens.shape[:2], bool)
    return Condition(
        tokens=jnp.concatenate([tokens, extra.astype(tokens.dtype)], axis=1),
        mask=jnp.concatenate([own, exist], axis=1),
        num_reference=extra.shape[1],
    )


def _kept(sources: Sources, dropped: Array | None) -> Array:
    """The sources [B,N] that are there and not `dropped` [B]."""
    return sources.exists if dropped is None else sources.exists & ~dropped[:, None]


def reference_tokens(
    model: Blip3o, params: Params, sources: Sources, keep: Array
) -> tuple[Array, Array]:
    """Condition tokens of sources, image after image and row by row, zeros where not `keep` [B,N]
    -> ([B,N*Y*X,caption], which of them exist [B,N*Y*X])."""
    batch, _, rows, columns, channels = sources.latents.shape
    pixels = rows * columns
    flat = sources.latents.reshape(batch, -1, channels)
    tokens = model.apply(params, "und_image_vae_connector", flat)
    tokens = jnp.where(jnp.repeat(keep, pixels, axis=1)[..., None], tokens, 0)
    return tokens, jnp.repeat(sources.exists, pixels, axis=1)


def reference(model: Blip3o, sources: Sources | None, dropped: Array | None) -> dict[str, Array]:
    """The fields of Condition that hold the latents of sources, zeros for rows `dropped` [B]."""
    beside = model.config.use_und_image_vae_as_noise | model.config.use_und_image_vae_as_channels
    if sources is None or not beside:
        return {}
    keep = _kept(sources, dropped)
    latents = jnp.where(keep[:, :1, None, None], sources.latents[:, 0], 0)
    if model.config.use_und_image_vae_as_channels:
        return {"reference": latents}
    return {"reference": latents, "has_reference": keep[:, 0]}


def sana_inputs(model: Blip3o, x: Array, condition: Condition) -> tuple[Array, dict]:
    """Latents x [B,Y,X,C] -> what SANA embeds, with the reference as more channels if the model has
    those (zeros without a source), and SANA's keywords."""
    keywords = {"condition_mask": condition.mask}
    if not model.config.use_und_image_vae_as_channels:
        names = ("reference", "has_reference")
        return x, keywords | {name: getattr(condition, name) for name in names}
    reference = jnp.zeros_like(x) if condition.reference is None else condition.reference
    return jnp.concatenate([x, reference.astype(x.dtype)], axis=-1), keywords


def velocity(
    model: Blip3o,
    params: Params,
    x: Array,
    t: Array,
    condition: Condition,
    span: Array | None = None,
) -> Array:
    """SANA's velocity [B,Y,X,C] at latents x [B,Y,X,C] and timesteps t [B] in (0, 1000]; without
    guidance. Of a model of few steps the mean one over a `span`, see `Sana`."""
    x, keywords = sana_inputs(model, x, condition)
    keywords |= {"num_reference": condition.num_reference, "span": span}
    return model.apply(params, "sana", x, t, condition.tokens, **keywords)


def velocity_function(
    model: Blip3o,
    params: Params,
    hidden: Array,
    nulls: tuple[str, ...] = (),
    sources: Sources | None = None,
) -> Callable[..., Array]:
    """(x, t) -> velocity, as `flow.guided_velocity` takes it: of each sample a row for every one of
    `nulls` (of NULLS), then the one with its whole condition. A model of few steps may be given a
    span as well, as by `flow.mean_velocity`.

    Connectors, caption projection and the keys and values of the cross-attentions are computed
    here, once. The nulls' hidden states are zeros, before the connector: equal tokens, from which a
    cross-attention makes the same for every pixel unless they have positions or others beside them.
    ValueError for a null that keeps the source where there is none.
    """
    if sources is None and "source" in nulls and model.config.reads_source_latents:
        raise ValueError("guidance by the source image needs `sources`")
    batch, rows = len(hidden), len(nulls) + 1
    uniform = nulls and not model.config.sana.condition_positions
    if sources is not None:
        # A row for each null, which keeps of the source what it says.
        sources = Sources(*(jnp.repeat(x, rows, axis=0) for x in (sources.latents, sources.exists)))
        uniform = uniform and not model.config.reference_tokens
    zeros = jnp.zeros_like(hidden)

    # Of uniform nulls the tokens are left out, but not their references.
    states = hidden if uniform else flow.alternating(*[zeros] * len(nulls), hidden)
    tokens_dropped = jnp.tile(jnp.array([null != "source" for null in nulls] + [False]), batch)
    condition = condition_tokens(model, params, states, sources, tokens_dropped)
    reference_dropped = jnp.tile(jnp.array([null == "nothing" for null in nulls] + [False]), batch)
    condition = condition.replace(**reference(model, sources, reference_dropped))
    without = None
    if uniform:
        token = model.apply(params, "diffusion_connector", zeros[:1, :1])
        without = model.apply(params, "sana", token, method="without_condition")
    keys_values = model.apply(
        params, "sana", condition.tokens, condition.num_reference, method="keys_values"
    )

    def function(x: Array, t: Array, span: Array | None = None) -> Array:
        x, keywords = sana_inputs(model, x, condition)
        keywords["span"] = span
        return model.apply(params, "sana", x, t, keys_values, without, method="step", **keywords)

    return function
