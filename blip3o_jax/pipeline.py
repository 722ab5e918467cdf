"""A loaded model that makes images from prompts: what `blip3o_jax.load` returns."""

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip3o_jax import checkpoints
from blip3o_jax.errors import require
from blip3o_jax.kernels.platform import dtype_for, enable_compilation_cache, on_cpu
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.moved import refuse
from blip3o_jax.parallel.batches import batch_shards
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.settings import Settings
from blip3o_jax.text import Text, load_tokenizer

__getattr__ = functools.partial(refuse, "pipeline")

CPU_BATCH = 4  # images made at once


@dataclass(frozen=True)
class Sample:
    """One image uint8 [H,W,3] and what it was made from; `tokens` int32 [n] are codebook ids."""

    prompt: str
    index: int
    seed: int
    image: np.ndarray
    tokens: np.ndarray


class Pipeline:
    """A model on a mesh. Prompts run through compiled programs of fixed shape, so that an image
    does not depend on the others of its batch."""

    def __init__(
        self, model: Blip3o, params: Params, text: Text, mesh: Mesh, identity: str, batch_size: int
    ):
        self.model, self.params, self.text = model, params, text
        self.mesh, self.identity, self.batch_size = mesh, identity, batch_size
        shards = f"the mesh's {batch_shards(mesh)} batch shards"
        divides = batch_size % batch_shards(mesh) == 0
        require(divides, f"batch_size {batch_size} does not divide by {shards}.")
        self._place = jax.NamedSharding(mesh, BATCH)
        self._run = programs.text_to_image(model, out_shardings=self._place)

    def samples(
        self,
        prompts: list[str],
        seed: int = 0,
        num_images: int = 1,
        settings: Settings | None = None,
    ) -> Iterator[Sample]:
        """`num_images` of each prompt in order, generated batch by batch as the iterator advances;
        InputError for a bad prompt at once."""
        require(num_images >= 1, f"num_images is at least 1, not {num_images}.")
        require(len(prompts) > 0, "There are no prompts.")
        limit = self.model.config.max_prompt_tokens
        ids, valid = self.text.encode_prompts(prompts, limit)
        options = asdict(settings or Settings())
        work = [(p, i) for p in range(len(prompts)) for i in range(num_images)]

        def generated() -> Iterator[Sample]:
            for start in range(0, len(work), self.batch_size):
                # A full batch: what is missing repeats the first prompt and is dropped.
                chunk = work[start : start + self.batch_size]
                missing = self.batch_size - len(chunk)
                rows = [p for p, _ in chunk] + [chunk[0][0]] * missing
                keys = [generate.sample_key(seed, prompts[p], i) for p, i in chunk]
                keys = np.array(keys + [(0, 0, 0)] * missing, np.uint32)
                inputs = jax.device_put((ids[rows], valid[rows], keys), self._place)
                # From the mesh the model knows the platform's kernels and how the batch is sharded.
                with jax.set_mesh(self.mesh):
                    batch = jax.device_get(self._run(self.params, *inputs, **options))
                images = zip(chunk, batch["images"], batch["tokens"], strict=False)
                for (p, i), image, tokens in images:
                    yield Sample(prompts[p], i, seed, image, tokens)

        return generated()

    def generate(
        self, prompts: str | list[str], seed: int = 0, num_images: int = 1, **settings
    ) -> list:
        """PIL images, `num_images` a prompt in order. Keywords are those of `Settings`."""
        from PIL import Image

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        samples = self.samples(prompts, seed, num_images, Settings(**settings))
        return [Image.fromarray(sample.image) for sample in samples]


def load(
    name: str = "emoji_64",
    mesh: dict[str, int] | None = None,
    dtype: str = "auto",
    batch_size: int | None = None,
    devices=None,
) -> Pipeline:
    """A checkpoint of any kind by name or folder, placed on the mesh and ready to generate.

    mesh: sizes of the axes data, fsdp and tensor over `devices` (all by default). dtype: "auto" is
    float32 on CPU and bfloat16 elsewhere, for weights and compute. batch_size: images made at once,
    by default eight per part of the batch, and on CPU four in all or as many as it has parts.
    InputError for anything missing, damaged or contradictory.
    """
    enable_compilation_cache()
    checkpoints.find(name)  # before anything touches a device
    mesh, dtype = make_mesh(mesh, devices), dtype_for(dtype)
    # Weights go straight to their shards, with rows that make the vocabulary divisible.
    checkpoint = checkpoints.open(name).padded(mesh.shape["tensor"])
    config, shards = checkpoint.config, batch_shards(mesh)
    params = checkpoint.load(dtype=dtype, shardings=lambda tree: shardings(tree, mesh))
    text = Text(load_tokenizer(checkpoint.tokenizer), config.vocab, config.max_prompt_tokens)
    # The batch fills the mesh; a CPU gains nothing from a large one.
    each = math.ceil(CPU_BATCH / shards) if on_cpu() else 8
    batch_size = batch_size or each * shards
    model = Blip3o(config, dtype=jnp.dtype(dtype))
    return Pipeline(model, params, text, mesh, checkpoint.identity, batch_size)
