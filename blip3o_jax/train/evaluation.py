"""What a run looks at between steps: held-out numbers and a picture, a stage at a time."""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.batches import put_replicated
from blip3o_jax.pixels import contact_sheet, to_uint8, to_unit
from blip3o_jax.sample import programs
from blip3o_jax.sample.settings import Settings
from blip3o_jax.text import left_pad
from blip3o_jax.train import losses
from blip3o_jax.train.config import TrainConfig

SHEET_ROWS, SHEET_COLUMNS = 4, 8


def make_evaluate(model: Blip3o, cfg: TrainConfig, mesh):
    """(weights on the mesh, held-out host batch) -> (numbers by name, uint8 picture or None where
    there is nothing to see)."""
    stage = {
        "autoencoder": _autoencoder,
        "tokenizer": _tokenizer,
        "practice": _practice,
        "joint": _joint,
    }[cfg.stage]
    return stage(model, cfg, mesh)


def _everywhere(mesh):
    """Decorates a function of (params, host arrays, settings): jitted, the arrays cut along the
    batch, results in every process."""

    def decorate(function):
        compiled = jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))
        return lambda params, *arrays, **settings: compiled(
            params, *put_replicated(arrays, mesh), **settings
        )

    return decorate


def _prefixed(metrics) -> dict[str, float]:
    return {f"heldout/{name}": float(value) for name, value in metrics.items()}


def _first(batch, count: int = SHEET_ROWS * SHEET_COLUMNS):
    return jax.tree.map(lambda x: x[:count], batch)


def _autoencoder(model: Blip3o, cfg: TrainConfig, mesh):
    @_everywhere(mesh)
    def reconstruct(params, images):
        params = {"params": params["dc_ae"]}
        images = to_unit(images)
        latents = model.dc_ae.apply(params, images, method="encode")
        error = model.dc_ae.apply(params, latents, method="decode")
        mse = jnp.mean(jnp.square(error - images), axis=(1, 2, 3))
        return to_uint8(error), {
            "psnr": jnp.mean(-10 * jnp.log10(mse / 4)),
            "latent_std": jnp.std(latents),
            "latent_mean": jnp.mean(latents),
        }

    def evaluate(params, batch):
        pixels, metrics = reconstruct(params, batch["images"])
        pairs = np.stack([batch["images"][:32], np.asarray(pixels)[:32]], axis=1)
        return _prefixed(metrics), contact_sheet(pairs.reshape(-1, *pixels.shape[1:]), columns=16)

    return evaluate


def _tokenizer(model: Blip3o, cfg: TrainConfig, mesh):
    @_everywhere(mesh)
    def measure(params, batch):
        return losses.tokenizer_loss(model, cfg, params, batch, None)[1]

    def evaluate(params, batch):
        return _prefixed(measure(params, batch)), contact_sheet(
            _first(batch)["images"], SHEET_COLUMNS
        )

    return evaluate


def _practice(model: Blip3o, cfg: TrainConfig, mesh):
    @_everywhere(mesh)
    def measure(params, batch):
        return losses.practice_loss(model, cfg, params, batch, None)[1]

    return lambda params, batch: (_prefixed(measure(params, batch)), None)


def _joint(model: Blip3o, cfg: TrainConfig, mesh):
    @_everywhere(mesh)
    def measure(params, batch):
        return losses.joint_loss(model, cfg, params, batch, jax.random.key(0))[1]

    sample = programs.text_to_image(model, out_shardings=NamedSharding(mesh, PartitionSpec()))
    settings = asdict(Settings(num_inference_steps=20))

    def evaluate(params, batch):
        shown = _first(batch)
        prompts = [
            row[: start + 1] for row, start in zip(shown["tokens"], shown["start"], strict=True)
        ]
        prompt, valid = left_pad(
            prompts, model.config.max_prompt_tokens, model.config.vocab.pad_token_id
        )
        numbers = np.stack([np.array([0, 0, i], np.uint32) for i in range(len(prompts))])
        made = sample(params, *put_replicated((prompt, valid, numbers), mesh), **settings)
        return _prefixed(measure(params, batch)), contact_sheet(
            np.asarray(made["images"]), SHEET_COLUMNS
        )

    return evaluate
