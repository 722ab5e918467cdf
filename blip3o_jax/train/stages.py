"""The stages of training, a record of each: all that depends on the stage of a run."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax import flops
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data.config import DataConfig
from blip3o_jax.text import row_length
from blip3o_jax.train import distill, evaluation, losses, sections

WHOLE = ("qwen3", "diffusion_connector", "sana", "ta_tok", "dc_ae")

# Fields of DataConfig: of prompts, of the embedded world's scenes, and of the sources that replace
# it, by what is read of them.
PROMPTS = ("weights", "extra", "named_ground")
EDITS = ("edits", "inverted_edits", "composed_edits")
WORLD = ("data_dir", "num_train", "seed", "text_fraction", *PROMPTS)
PICTURES = ("sources", "heldout", "max_bad_fraction", "max_pixels", "max_aspect", "row_group_mb")
MIXTURE = (*PICTURES, "crop", "long_captions", "cache")
TEXT = ("row_length", "tokenizer")
CAPTIONS = ("reader_threads", *TEXT, *WORLD, *EDITS, *MIXTURE)

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Stage:
    """One stage; in its functions `cfg` is the run's section of it and `model` the Blip3o, or its
    config where nothing is computed.

    A stage of another job than `train` brings its own loss and batches (rl.rollout).
    """

    parts: tuple[str, ...]  # that a run holds
    # section -> parts of which something is trained
    trained: Callable[[Any], tuple[str, ...]]
    section: type  # its own keys of the config
    data: tuple[str, ...]  # the fields of DataConfig that it reads
    job: str = "train"  # the command that runs it
    # section -> parts that its loss reads besides
    teachers: Callable[[Any], tuple[str, ...]] = lambda cfg: ()
    rows: str = ""  # what its batches hold (data.feed.ROWS)
    # (model, cfg, params, batch, key) -> (loss, metrics)
    loss: Callable[..., losses.LossAndMetrics] | None = None
    # (model, cfg, batch, key) -> what the loss needs of the whole batch, row by row
    draws: Callable[..., losses.Batch] = lambda model, cfg, batch, key: {}
    # (model, cfg, mesh) -> a function of (params, held-out batch)
    evaluate: Callable[..., evaluation.Evaluate] | None = None
    # (model, data, rows) -> the arrays of a batch
    batch: Callable[[Blip3oConfig, DataConfig, int], Shapes] | None = None
    # (model, cfg, batch) -> FLOPs of a step; None where they are not counted
    flops: Callable[[Blip3oConfig, Any, dict], int | None] = lambda model, cfg, batch: None
    # (model, cfg, path in a trained part) -> whether the parameter is trained (docs/model.md §6.1)
    trainable: Callable[[Blip3oConfig, Any, str], bool] = lambda model, cfg, path: True


def _rows(count: int, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *shape), dtype)


def _images(model: Blip3oConfig, data: DataConfig, rows: int) -> Shapes:
    return {"images": _rows(rows, model.image_size, model.image_size, 3, dtype=jnp.uint8)}


def _patches(model: Blip3oConfig, data: DataConfig, rows: int) -> Shapes:
    if data.sources:
        return _images(model, data, rows)
    grid = model.ta_tok.grid
    return _images(model, data, rows) | {"patches": _rows(rows, grid, grid)}


def _exercises(model: Blip3oConfig, data: DataConfig, rows: int) -> Shapes:
    ids = _rows(rows, data.row_length)
    weights = _rows(rows, data.row_length, dtype=jnp.float32)
    return {"tokens": ids, "positions": ids, "weights": weights}


def _captions(model: Blip3oConfig, data: DataConfig, rows: int) -> Shapes:
    if data.cache:
        side, channels = model.sana.sample_size, model.dc_ae.latent_channels
        latents = _rows(rows, side, side, channels, dtype=jnp.float32)
        arrays = {"codes": _rows(rows, model.ta_tok.num_tokens), "latents": latents}
    else:
        arrays = _images(model, data, rows)
        if data.crop == "original":
            side = model.ta_tok.encoder.image_size
            arrays["view"] = _rows(rows, side, side, 3, dtype=jnp.uint8)
    length = data.row_length or row_length(model)
    if model.max_sources and data.may_hold_edits:
        names = {"source_codes": "codes", "source_latents": "latents"}
        names = names if data.cache else {"sources": "images"}
        for name, like in names.items():
            count, *shape = arrays[like].shape
            dtype = arrays[like].dtype
            arrays[name] = _rows(count, model.max_sources, *shape, dtype=dtype)
        arrays["num_sources"] = _rows(rows)
    return arrays | {"tokens": _rows(rows, length), "start": _rows(rows)}


def _caption_flops(model: Blip3oConfig, batch: dict, step: Callable[..., int]) -> int:
    """FLOPs of a `step` (of `flops`) on rows of captions. Counts the encoders, unless the batch
    comes from a cache."""
    rows, length = batch["tokens"].shape
    sources = model.max_sources if "num_sources" in batch else 0
    encoders = flops.image_encoders(model, rows, sources) if "latents" in batch else 0
    return step(model, rows, length, sources=sources) - encoders


def _joint_flops(model: Blip3oConfig, cfg: sections.JointConfig, batch: dict) -> int:
    whole = cfg.trainable_sana == "all"
    return _caption_flops(model, batch, functools.partial(flops.joint_step, whole_sana=whole))


def _distill_flops(model: Blip3oConfig, cfg: sections.DistillConfig, batch: dict) -> int:
    return _caption_flops(model, batch, flops.distill_step)


def _tokenizer_teachers(cfg: sections.TokenizerConfig) -> tuple[str, ...]:
    return ("dc_ae",) if cfg.teacher == "latents" else ()


def _tokenizer_trainable(model: Blip3oConfig, cfg: sections.TokenizerConfig, path: str) -> bool:
    """Not SimVQ's random table, nor an encoder that is its own teacher."""
    fixed = cfg.teacher == "encoder" and path.startswith("ta_tok/encoder/")
    return not fixed and not path.endswith("regularizer/embedding")


def _joint_trainable(model: Blip3oConfig, cfg: sections.JointConfig, path: str) -> bool:
    if not path.startswith("sana/") or cfg.trainable_sana == "all" or "caption" in path:
        return True
    # The ways in and out, where a source's latents go them too.
    beside = model.use_und_image_vae_as_noise or model.use_und_image_vae_as_channels
    return beside and path.split("/")[1] in ("patch_embed", "proj_out")


STAGES = {
    "autoencoder": Stage(
        parts=("dc_ae",),
        trained=lambda cfg: ("dc_ae",),
        section=sections.AutoencoderConfig,
        data=("reader_threads", *WORLD, *PICTURES),
        rows="images",
        loss=losses.autoencoder_loss,
        draws=losses.autoencoder_draws,
        evaluate=evaluation.autoencoder,
        batch=_images,
    ),
    "tokenizer": Stage(
        parts=("ta_tok",),
        trained=lambda cfg: ("ta_tok",),
        section=sections.TokenizerConfig,
        data=("reader_threads", *WORLD, *PICTURES),
        rows="images",
        teachers=_tokenizer_teachers,
        loss=losses.tokenizer_loss,
        evaluate=evaluation.tokenizer,
        batch=_patches,
        trainable=_tokenizer_trainable,
    ),
    "pretrain_ar": Stage(
        parts=("qwen3",),
        trained=lambda cfg: ("qwen3",),
        section=sections.PretrainArConfig,
        data=("exercises", "text_fraction", "reader_threads", *TEXT, *PROMPTS),
        rows="exercises",
        loss=losses.pretrain_ar_loss,
        draws=losses.pretrain_ar_draws,
        evaluate=evaluation.pretrain_ar,
        batch=_exercises,
    ),
    "joint": Stage(
        parts=WHOLE,
        trained=lambda cfg: ("qwen3", "diffusion_connector", "sana"),
        section=sections.JointConfig,
        data=CAPTIONS,
        rows="captions",
        loss=losses.joint_loss,
        draws=losses.joint_draws,
        evaluate=evaluation.joint,
        batch=_captions,
        flops=_joint_flops,
        trainable=_joint_trainable,
    ),
    "distill": Stage(
        parts=WHOLE,
        trained=lambda cfg: ("diffusion_connector", "sana"),
        section=sections.DistillConfig,
        data=CAPTIONS,
        rows="captions",
        loss=distill.distill_loss,
        draws=distill.distill_draws,
        evaluate=evaluation.distill,
        batch=_captions,
        flops=_distill_flops,
    ),
    "grpo": Stage(
        parts=WHOLE,
        trained=lambda cfg: sum((sections.HALVES[half] for half in cfg.halves), ()),
        section=sections.GrpoConfig,
        data=("seed", "prompts", "text_fraction", "edits", *TEXT, *PROMPTS),
        job="grpo",
    ),
}
