"""What a run looks at between steps: held-out numbers and an image, stage by stage.

Each function gives (parameters on the mesh, held-out host batch) -> (numbers by name, uint8 image
or None where there is nothing to see).
"""

import functools
from collections.abc import Callable
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.batches import put_replicated
from blip3o_jax.pixels import contact_sheet, to_uint8, to_unit
from blip3o_jax.sample import programs
from blip3o_jax.sample.settings import Settings
from blip3o_jax.text import left_pad
from blip3o_jax.train import losses, sections
from blip3o_jax.train.distill import distill_loss

SHEET_ROWS, SHEET_COLUMNS = 4, 8

Evaluate = Callable[[dict, dict], tuple[dict[str, float], np.ndarray | None]]


def autoencoder(model: Blip3o, cfg: sections.AutoencoderConfig, mesh: Mesh) -> Evaluate:
    """Reconstruction errors; images beside their reconstructions."""

    # One program: the reconstructions, and how far they are off.
    def reconstruct(params: dict, images: jax.Array) -> tuple[jax.Array, dict]:
        images = to_unit(images)
        latents = model.apply(params, "dc_ae", images, method="encode")
        decoded = model.apply(params, "dc_ae", latents, method="decode")
        mse = jnp.mean(jnp.square(decoded - images), axis=(1, 2, 3))
        return to_uint8(decoded), {
            "psnr": jnp.mean(-10 * jnp.log10(mse / 4)),
            "latent_std": jnp.std(latents),
            "latent_mean": jnp.mean(latents),
        }

    reconstruct = _everywhere(reconstruct, mesh)

    def evaluate(params: dict, batch: dict) -> tuple[dict[str, float], np.ndarray]:
        pixels, metrics = reconstruct(params, batch["images"])
        pairs = np.stack([batch["images"][:32], np.asarray(pixels)[:32]], axis=1)
        return _heldout(metrics), contact_sheet(pairs.reshape(-1, *pixels.shape[1:]), columns=16)

    return evaluate


def tokenizer(model: Blip3o, cfg: sections.TokenizerConfig, mesh: Mesh) -> Evaluate:
    """The loss's numbers; the images."""
    measure = _measured(losses.tokenizer_loss, model, cfg, mesh)
    sheet = functools.partial(contact_sheet, columns=SHEET_COLUMNS)
    return lambda params, batch: (measure(params, batch), sheet(_first(batch)["images"]))


def pretrain_ar(model: Blip3o, cfg: sections.PretrainArConfig, mesh: Mesh) -> Evaluate:
    """The loss's numbers."""
    measure = _measured(losses.pretrain_ar_loss, model, cfg, mesh)
    return lambda params, batch: (measure(params, batch), None)


def joint(model: Blip3o, cfg: sections.JointConfig, mesh: Mesh) -> Evaluate:
    """The loss's numbers; images generated from the held-out prompts, and edits of their
    sources."""
    return _generated(losses.joint_loss, model, cfg, mesh, steps=20)


def distill(model: Blip3o, cfg: sections.DistillConfig, mesh: Mesh) -> Evaluate:
    """As `joint`, in few steps."""
    return _generated(distill_loss, model, cfg, mesh, model.config.sana.few_steps)


def _generated(loss: Callable, model: Blip3o, cfg: object, mesh: Mesh, steps: int) -> Evaluate:
    """The loss's numbers, and images made in so many steps."""
    measure = _measured(loss, model, cfg, mesh)
    encode = _everywhere(functools.partial(losses.encode_sources, model), mesh)
    compiled = programs.programs(model, NamedSharding(mesh, PartitionSpec()))
    settings = asdict(Settings(num_inference_steps=steps))
    decoding = {name: settings.pop(name) for name in programs.DECODING}
    config, pad = model.config, model.config.vocab.pad_token_id
    length = config.max_prompt_tokens + config.max_sources * config.ta_tok.num_tokens

    def evaluate(params: dict, batch: dict) -> tuple[dict[str, float], np.ndarray]:
        shown = _first(batch)
        rows = zip(shown["tokens"], shown["start"], strict=True)
        prompts = [row[: start + 1] for row, start in rows]
        numbers = np.stack([np.array([0, 0, i], np.uint32) for i in range(len(prompts))])
        *inputs, keys = put_replicated((*left_pad(prompts, length, pad), numbers), mesh)
        codes, sources = encode(params, shown)
        hidden = compiled.write_tokens(params, *inputs, keys, codes, **decoding)["hidden"]
        images = np.asarray(compiled.draw(params, hidden, keys, sources, **settings)[0])
        return measure(params, batch), contact_sheet(images, SHEET_COLUMNS)

    return evaluate


def _everywhere(function: Callable, mesh: Mesh) -> Callable:
    """A function of (params, host arrays), jitted: the arrays sharded along the batch, the results
    in every process."""
    compiled = jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda params, *arrays: compiled(params, *put_replicated(arrays, mesh))


def _measured(loss: Callable, model: Blip3o, cfg: object, mesh: Mesh) -> Callable:
    """(params, host batch) -> metrics of the loss, by name."""
    key = jax.random.key(0)
    measure = _everywhere(lambda params, batch: loss(model, cfg, params, batch, key)[1], mesh)
    return lambda params, batch: _heldout(measure(params, batch))


def _heldout(metrics: dict) -> dict[str, float]:
    return {f"heldout/{name}": float(value) for name, value in metrics.items()}


def _first(batch: dict, count: int = SHEET_ROWS * SHEET_COLUMNS) -> dict:
    return jax.tree.map(lambda x: x[:count], batch)
