"""A loaded model that makes images from prompts and edits: what `blip3o_jax.load` returns."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from blip3o_jax import checkpoints, geometry
from blip3o_jax.errors import about, require
from blip3o_jax.kernels.platform import dtype_for, enable_compilation_cache, on_cpu
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.moved import refuse
from blip3o_jax.parallel.batches import batch_shards
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.pictures import Picture, array
from blip3o_jax.sample import generate, programs
from blip3o_jax.sample.condition import guidance
from blip3o_jax.sample.settings import EditSettings, Settings
from blip3o_jax.text import Text, left_pad

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


@dataclass(frozen=True)
class EditSample:
    """One edited image uint8 [h,w,3], of its source's size, and what it was made from.

    The model drew `square` uint8 [H,W,3] from `latents` f32 [Y,X,C]; `mask` uint8 [h,w] says what
    is new where unchanged pixels are the source's own. `turn` counts from 0.
    """

    instruction: str
    index: int
    turn: int
    seed: int
    image: np.ndarray
    square: np.ndarray
    tokens: np.ndarray
    latents: np.ndarray
    mask: np.ndarray | None


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
        compiled = programs.programs(model, out_shardings=self._place)
        self._run, self._edit, self._round_trip = (
            functools.partial(function, compiled)
            for function in (programs.text_to_image, programs.edit, programs.round_trip)
        )

    def samples(
        self,
        prompts: list[str],
        seed: int = 0,
        num_images: int = 1,
        settings: Settings | None = None,
    ) -> Iterator[Sample]:
        """`num_images` of each prompt in order, generated batch by batch as the iterator advances;
        InputError for a bad prompt at once."""
        work = _work(prompts, num_images)
        limit = self.model.config.max_prompt_tokens
        ids, valid = self.text.encode_prompts(prompts, limit)
        run = functools.partial(self._run, self.params, **asdict(settings or Settings()))
        rows = (((p, i), (ids[p], valid[p], _key(seed, prompts[p], i))) for p, i in work)
        return (
            Sample(prompts[p], i, seed, row["images"], row["tokens"])
            for (p, i), row in self._rows(run, rows)
        )

    def generate(
        self, prompts: str | list[str], seed: int = 0, num_images: int = 1, **settings
    ) -> list:
        """PIL images, `num_images` a prompt in order. Keywords are those of `Settings`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        samples = self.samples(prompts, seed, num_images, Settings(**settings))
        return [Image.fromarray(sample.image) for sample in samples]

    def edits(
        self,
        images: Sequence[Picture | list[Picture]],
        turns: list[list[str]],
        seed: int = 0,
        num_images: int = 1,
        settings: EditSettings | None = None,
        keep_unchanged: float | None = None,
    ) -> Iterator[EditSample]:
        """Edits of each source image, or of several in order, of which the first gives the size, by
        the instructions of its turns, as many for each; every further turn edits the last result.

        `keep_unchanged`: see `geometry.keep_unchanged`. Pictures are read batch by batch;
        InputError for anything else at once.
        """
        sources = [row if isinstance(row, list | tuple) else [row] for row in images]
        for number, row in enumerate(sources, 1):
            with about(f"Edit {number}"):
                self.model.config.check_sources(len(row))
        same = f"{len(sources)} images need as many instructions, not {len(turns)}."
        require(len(sources) == len(turns), same)
        text = next((texts for texts in turns if isinstance(texts, str)), "")
        require(not text, f"An edit's turns are a list of instructions, not {text!r} alone.")
        require(len({len(texts) for texts in turns}) < 2, "Edits have as many turns each.")
        work = _work(turns, num_images)
        counts = [len(row) for row in sources]
        prompts = []
        for texts in zip(*turns, strict=True):
            prompts.append(self._edit_prompts(texts, counts))
            counts = [1] * len(sources)
        ids, valid = (np.stack(arrays, axis=1) for arrays in zip(*prompts, strict=True))
        run = functools.partial(
            self._edit_turns, keep_unchanged is not None, _edit_options(settings or EditSettings())
        )

        def rows() -> Iterator[tuple[tuple, tuple]]:
            for r, i in work:
                pictures = [array(picture) for picture in sources[r]]
                keys = np.stack([_key(seed, text, i) for text in turns[r]])
                squares, exists, place = self._squares(pictures)
                source = None if keep_unchanged is None else pictures[0]
                yield (r, i, place, source), (ids[r], valid[r], keys, squares, exists)

        def edited() -> Iterator[EditSample]:
            for (r, i, place, source), row in self._rows(run, rows()):
                for turn, text in enumerate(turns[r]):
                    image, mask = geometry.from_square(row["images"][turn], place), None
                    if keep_unchanged is not None:
                        seen = geometry.from_square(row["seen"][turn], place)
                        image, mask = geometry.keep_unchanged(source, image, seen, keep_unchanged)
                        source = image
                    drawn = (row[name][turn] for name in ("images", "tokens", "latents"))
                    yield EditSample(text, i, turn, seed, image, *drawn, mask)

        return edited()

    def edit(
        self,
        images: Picture | Sequence[Picture | list[Picture]],
        instructions: str | list[str],
        seed: int = 0,
        num_images: int = 1,
        then: Sequence[str] = (),
        keep_unchanged: float | None = None,
        **settings,
    ) -> list:
        """PIL images of the sources' sizes, in the order of `edits`; paths, PIL images or arrays
        uint8 [h,w,3] are edited, then each result by the instructions `then`. Other keywords are
        those of `EditSettings`."""
        if isinstance(instructions, str):
            images, instructions = [images], [instructions]
        turns = [[instruction, *then] for instruction in instructions]
        samples = self.edits(
            images, turns, seed, num_images, EditSettings(**settings), keep_unchanged
        )
        return [Image.fromarray(sample.image) for sample in samples]

    def _rows(
        self, run: Callable[..., dict[str, jax.Array]], rows: Iterator[tuple[Any, tuple]]
    ) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        """(what it is, its inputs) of each row -> (what it is, its results), batch by batch."""
        while chunk := list(itertools.islice(rows, self.batch_size)):
            # A full batch: what is missing repeats the first row and is dropped.
            full = [inputs for _, inputs in chunk]
            full += [full[0]] * (self.batch_size - len(chunk))
            inputs = tuple(np.stack(arrays) for arrays in zip(*full, strict=True))
            # From the mesh the model knows the platform's kernels and how the batch is sharded.
            with jax.set_mesh(self.mesh):
                batch = jax.device_get(run(*jax.device_put(inputs, self._place)))
            for i, (what, _) in enumerate(chunk):
                yield what, {name: values[i] for name, values in batch.items()}

    def _edit_prompts(
        self, texts: Sequence[str], counts: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Instructions with the numbers of their source images -> (ids, valid) [B,P]."""
        config, vocab = self.model.config, self.text.vocab
        size = config.ta_tok.num_tokens
        prompts = [
            self.text.encode_edit(text, np.zeros((count, size), np.int32))
            for text, count in zip(texts, counts, strict=True)
        ]
        length = config.max_prompt_tokens + config.max_sources * size
        return left_pad(prompts, length, vocab.pad_token_id)

    def _squares(
        self, pictures: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, geometry.Placement]:
        """Source images as the model takes them, [N,H,W,3], which exist [N], and where the first
        one lies."""
        config = self.model.config
        size, count = config.image_size, config.max_sources
        squares = np.zeros((count, size, size, 3), np.uint8)
        places = []
        for i, picture in enumerate(pictures):
            squares[i], place = geometry.to_square(picture, size)
            places.append(place)
        return squares, np.arange(count) < len(pictures), places[0]

    def _edit_turns(
        self,
        is_compared: bool,
        options: dict[str, Any],
        ids: jax.Array,
        valid: jax.Array,
        keys: jax.Array,
        squares: jax.Array,
        exists: jax.Array,
    ) -> dict[str, jax.Array]:
        """All turns T of a batch, from ids and valid [B,T,P] and keys [B,T,3] -> the results of
        `programs.edit`, [B,T,...]; also, if they are to be compared with it, `seen`, what the
        autoencoder makes of each turn's source."""
        results, latents = [], None
        seen = self._round_trip(self.params, squares[:, 0]) if is_compared else None
        for turn in range(ids.shape[1]):
            prompt = (x[:, turn] for x in (ids, valid, keys))
            result = self._edit(self.params, *prompt, squares, exists, latents, **options)
            results.append(result | {"seen": seen} if is_compared else result)
            # A result is already what the autoencoder makes of its latents.
            seen = result["images"]
            # The one source of the next turn, in the first place of as many as there may be.
            places = [(0, 0), (0, squares.shape[1] - 1), (0, 0), (0, 0), (0, 0)]
            squares = jnp.pad(result["images"][:, None], places)
            latents = jnp.pad(result["latents"][:, None], places)
            exists = exists & (jnp.arange(squares.shape[1]) == 0)
        return jax.tree.map(lambda *turns: jnp.stack(turns, axis=1), *results)


def _work(texts: Sequence, num_images: int) -> list[tuple[int, int]]:
    """(text, index) of all images to make."""
    require(num_images >= 1, f"num_images is at least 1, not {num_images}.")
    require(len(texts) > 0, "There are no prompts.")
    return [(p, i) for p in range(len(texts)) for i in range(num_images)]


def _key(seed: int, text: str, index: int) -> np.ndarray:
    return np.array(generate.sample_key(seed, text, index), np.uint32)


def _edit_options(settings: EditSettings) -> dict[str, Any]:
    """The keywords of `programs.edit`."""
    options = asdict(settings)
    names = ("guidance_scale", "image_guidance_scale", "renorm_min", "reference_quirks")
    scales = [options.pop(name) for name in names]
    return options | {"guidance_scale": guidance(*scales)}


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
    # The batch fills the mesh; a CPU gains nothing from a large one.
    each = math.ceil(CPU_BATCH / shards) if on_cpu() else 8
    batch_size = batch_size or each * shards
    model = Blip3o(config, dtype=jnp.dtype(dtype))
    text = checkpoints.text_of(name)
    return Pipeline(model, params, text, mesh, checkpoint.identity, batch_size)
