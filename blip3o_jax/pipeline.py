"""A loaded model that makes images from prompts: what `blip3o_jax.load` returns and `blip3o-jax
generate` runs."""

import hashlib
import pathlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import resources, training_checkpoint
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import converted, published
from blip3o_jax.convert.config_json import config_from_json
from blip3o_jax.convert.safetensors_io import read_json
from blip3o_jax.errors import InputError, nearest
from blip3o_jax.kernels.platform import dtype_for, enable_compilation_cache
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.batches import batch_shards
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.settings import Settings
from blip3o_jax.text import Text, load_tokenizer

CPU_BATCH = 4  # images made at once


@dataclass(frozen=True)
class Sample:
    """One image and what it was made from.

    `image` uint8 [H,W,3]; `tokens` int32 [n] are codebook ids.
    """

    prompt: str
    index: int
    seed: int
    image: np.ndarray
    tokens: np.ndarray


def embedded_checkpoints() -> dict[str, pathlib.Path]:
    """Names of the checkpoints that travel with the package, and their folders."""
    return {folder.parent.name: folder.parent for folder in resources.ASSETS.glob("*/config.json")}


def find_checkpoint(name: str) -> pathlib.Path:
    """The folder of an embedded name, or the folder itself; InputError naming the nearest embedded
    name otherwise."""
    embedded = embedded_checkpoints()
    if str(name) in embedded:
        return embedded[str(name)]
    folder = pathlib.Path(name)
    if (folder / "config.json").is_file() or training_checkpoint.is_workdir(folder):
        return folder
    if folder.is_dir():
        raise InputError(
            f"{name} holds neither config.json (a published or converted model) nor "
            "checkpoints (a training run)."
        )
    raise InputError(
        f"No checkpoint {str(name)!r}, neither a folder nor an embedded name; "
        f"{nearest(str(name), embedded)}"
    )


def config_of(folder: pathlib.Path) -> Blip3oConfig:
    """The model in the folder of a checkpoint, as its configuration alone describes it.

    Touches no device.
    """
    if training_checkpoint.is_workdir(folder):  # whose config.json is the run's
        from blip3o_jax.train.config import TrainConfig, from_dict

        return from_dict(TrainConfig, training_checkpoint.config_of_run(folder)).blip3o()
    file = folder / "config.json"
    fields = read_json(file, published.CONFIG_LIMIT)
    with published.about(file):
        return config_from_json(fields, None, folder.resolve().name)


class Pipeline:
    """A model on a mesh.

    Prompts run through compiled programs of fixed shape, so that an image does not depend on its
    company.
    """

    def __init__(self, model: Blip3o, params, text: Text, mesh, identity: str, batch_size: int):
        self.model, self.params, self.text, self.mesh, self.identity = (
            model,
            params,
            text,
            mesh,
            identity,
        )
        self.batch_size = batch_size
        if batch_size % batch_shards(mesh):
            raise InputError(
                f"batch_size {batch_size} does not divide by the mesh's "
                f"{batch_shards(mesh)} batch shards."
            )
        self._place = jax.NamedSharding(mesh, BATCH)
        self._run = programs.text_to_image(model, out_shardings=self._place)

    def samples(
        self,
        prompts: list[str],
        seed: int = 0,
        num_images: int = 1,
        settings: Settings | None = None,
    ) -> Iterator[Sample]:
        """Images prompt by prompt, `num_images` of each, made as they are taken; InputError for a
        bad prompt at once."""
        if num_images < 1:
            raise InputError(f"num_images is at least 1, not {num_images}.")
        if not prompts:
            raise InputError("There are no prompts.")
        encoded = self.text.encode_prompts(prompts, self.model.config.max_prompt_tokens)
        return self._samples(prompts, *encoded, seed, num_images, asdict(settings or Settings()))

    def _samples(
        self, prompts, ids, valid, seed: int, num_images: int, settings: dict
    ) -> Iterator[Sample]:
        work = [(p, i) for p in range(len(prompts)) for i in range(num_images)]
        for start in range(0, len(work), self.batch_size):
            chunk = work[start : start + self.batch_size]
            rows = [p for p, _ in chunk] + [chunk[0][0]] * (self.batch_size - len(chunk))
            numbers = [generate.sample_key(seed, prompts[p], i) for p, i in chunk]
            numbers += [(0, 0, 0)] * (self.batch_size - len(chunk))
            inputs = jax.device_put(
                (ids[rows], valid[rows], np.array(numbers, np.uint32)), self._place
            )
            # by which the model knows the platform's kernels, and keeps the batch cut as it comes
            with jax.set_mesh(self.mesh):
                made = jax.device_get(self._run(self.params, *inputs, **settings))
            for (p, i), image, tokens in zip(chunk, made["images"], made["tokens"], strict=False):
                yield Sample(prompts[p], i, seed, image, tokens)

    def generate(
        self, prompts: str | list[str], seed: int = 0, num_images: int = 1, **settings
    ) -> list:
        """PIL images, `num_images` a prompt in order. Keywords are those of `Settings`."""
        from PIL import Image

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        made = self.samples(prompts, seed, num_images, Settings(**settings))
        return [Image.fromarray(sample.image) for sample in made]


def load(
    name: str = "emoji_64",
    mesh: dict[str, int] | None = None,
    dtype: str = "auto",
    batch_size: int | None = None,
    devices=None,
) -> Pipeline:
    """A checkpoint by embedded name, published or converted folder or training workdir, placed on
    the mesh and ready to generate.

    mesh: sizes of the axes data, fsdp and tensor over `devices` (all by default). dtype: "auto" is
    float32 on CPU and bfloat16 elsewhere, for weights and compute. batch_size: images made at once,
    by default eight per part of the batch, and on CPU four in all or as many as it has parts.
    Raises InputError for anything missing, damaged or contradictory.
    """
    enable_compilation_cache()
    folder = find_checkpoint(name)
    mesh = make_mesh(mesh, devices)
    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype_for(dtype)
    if not training_checkpoint.is_workdir(folder):
        load_folder = (
            converted.load_converted if converted.is_converted(folder) else published.load_published
        )
        config, params = load_folder(
            folder, dtype, lambda tree: shardings(tree, mesh), vocab_multiple=mesh.shape["tensor"]
        )
        tokenizer = folder / "tokenizer.json"
    else:
        from blip3o_jax.train.config import TrainConfig, from_dict

        saved, params = training_checkpoint.load_run(folder)
        run = from_dict(TrainConfig, saved)
        if not run.whole_model:
            raise InputError(
                f"{folder} is a run of stage {run.stage!r}; only a 'joint' or 'grpo' run "
                "can generate."
            )
        config = run.blip3o()
        tokenizer = run.data.tokenizer or tokenizer_of(config.name)
        params = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
        params = jax.tree.map(jax.device_put, params, shardings(params, mesh))
    text = Text(load_tokenizer(tokenizer), config.vocab, config.max_prompt_tokens)
    parts = batch_shards(mesh)
    batch_size = batch_size or (-(-CPU_BATCH // parts) if on_cpu else 8) * parts
    return Pipeline(
        Blip3o(config, dtype=jnp.dtype(dtype)), params, text, mesh, identity(folder), batch_size
    )


def tokenizer_of(preset: str) -> pathlib.Path:
    """The tokenizer.json that a preset is trained with; InputError when none travels with the
    package."""
    path = resources.ASSETS / preset / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"No tokenizer travels with preset {preset!r}, so it cannot be trained or "
            "exported from a config yet."
        )
    return path


def identity(folder: pathlib.Path) -> str:
    """Name and content hash of a checkpoint, for metadata: of sizes and first bytes of the JSON
    files, but for convert.json, which has a date, and of the weight files."""
    digest = hashlib.sha256()
    for file in sorted(
        p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors")
    ):
        if file.name == "convert.json":
            continue
        digest.update(f"{file.relative_to(folder)}:{file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
    return f"{folder.name}@{digest.hexdigest()[:12]}"
