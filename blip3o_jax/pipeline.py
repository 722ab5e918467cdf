"""A loaded model that makes images from prompts and edits: what `blip3o_jax.load` returns."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from blip3o_jax import checkpoints, executables, geometry
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import published
from blip3o_jax.errors import InputError, require
from blip3o_jax.kernels.platform import dtype_for, enable_compilation_cache, on_cpu
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.moved import refuse
from blip3o_jax.parallel.batches import batch_shards
from blip3o_jax.parallel.mesh import BATCH, make_mesh
from blip3o_jax.parallel.parameters import shardings
from blip3o_jax.pictures import Picture, alpha_of, array
from blip3o_jax.request import Request, Sample, bucket, encode, repeated, settled
from blip3o_jax.sample import generate, int8, programs
from blip3o_jax.sample.condition import edit_options
from blip3o_jax.sample.settings import EditSettings, Settings, defaults
from blip3o_jax.scenes import lexicon
from blip3o_jax.text import Text, left_pad

__getattr__ = functools.partial(refuse, "pipeline")

CPU_BATCH = 4  # images made at once
WINDOW = 16  # batches whose requests are sorted by shape


@dataclass
class Row:
    """A request at its place in the window: what it becomes for the model, and what comes of it,
    samples or the error by which it cannot be served."""

    place: int
    request: Request
    tokens: list[list[int]] = field(default_factory=list)  # as `encode` gives them
    pictures: list[np.ndarray] = field(default_factory=list)  # sources, where results need them
    within: np.ndarray | None = None  # the mask's alpha
    placement: geometry.Placement | None = None
    samples: list[Sample] = field(default_factory=list)
    error: InputError | None = None


class Pipeline:
    """A model on a mesh. Prompts run through compiled programs of fixed shape, so that an image
    does not depend on the others of its batch.

    `embedded` names a model that knows the words of the embedded world alone; others are warned of.
    """

    def __init__(
        self,
        model: Blip3o,
        params: Params,
        text: Text,
        mesh: Mesh,
        identity: str,
        batch_size: int,
        embedded: str = "",
    ):
        self.model, self.params, self.text, self.embedded = model, params, text, embedded
        self.mesh, self.identity, self.batch_size = mesh, identity, batch_size
        shards = f"the mesh's {batch_shards(mesh)} batch shards"
        require(batch_size >= 1, f"batch_size is at least 1, not {batch_size}.")
        divides = batch_size % batch_shards(mesh) == 0
        require(divides, f"batch_size {batch_size} does not divide by {shards}.")
        self._place = jax.NamedSharding(mesh, BATCH)
        self._keep = executables.keeper(model, params, mesh)
        self._compile(programs.programs(model, self._place, self._keep))

    def _compile(self, compiled: programs.Programs) -> None:
        self.programs = compiled
        self._run, self._edit, self._round_trip = (
            functools.partial(function, compiled)
            for function in (programs.text_to_image, programs.edit, programs.round_trip)
        )

    def run(
        self, requests: Iterable[Request], failed: Callable[[Request, str], None] | None = None
    ) -> Iterator[Sample]:
        """The image of every request, or of every turn of an edit, in order, made batch by batch
        as the iterator advances: requests of one shape, out of a window, run together.

        A request that cannot be served, for its text or for a picture, ends the run by its
        InputError; or it is left out, and `failed` is told it and the reason.
        """
        requests = iter(requests)
        while window := list(itertools.islice(requests, WINDOW * self.batch_size)):
            window = [settled(request, self.model.config) for request in window]
            rows = [Row(place, request) for place, request in enumerate(window)]
            done, due = set(), 0
            for batch in self._batches(rows):
                done |= {row.place for row in batch}
                # In order, as far as all before are done.
                while due in done:
                    row = rows[due]
                    due += 1
                    if row.error and failed is None:
                        raise row.error
                    if row.error:
                        failed(row.request, str(row.error))
                    yield from row.samples
                    row.samples, row.error = [], None

    def watch(
        self,
        stops: Callable[[int], Iterable[int]],
        seen: Callable[[int, int, Callable[[], jax.Array]], None],
    ) -> None:
        """Lets the denoising of all that `run` makes be `seen`, see `programs.Stepwise`; images are
        those of a batch in its order."""
        watched = programs.stepwise(self.model, self.programs, stops, seen, self._keep)
        self._compile(watched)

    def check(self, requests: list[Request]) -> None:
        """InputError for the first request that cannot be served, its pictures unread; a warning
        as of `warn`."""
        for request in requests:
            encode(request, self.model.config, self.text)
        self.warn(requests)

    def warn(self, requests: list[Request]) -> None:
        """Names the words that an embedded model does not know."""
        if self.embedded:
            for is_edit, words in enumerate((lexicon.of_prompts, lexicon.of_instructions)):
                texts = [r.texts for r in requests if bool(r.images) == is_edit]
                lexicon.warn(self.embedded, itertools.chain(*texts), words())

    def samples(
        self,
        prompts: list[str],
        seed: int = 0,
        num_images: int = 1,
        settings: Settings | None = None,
    ) -> Iterator[Sample]:
        """`run` for `num_images` of each prompt in order; InputError for a bad one at once."""
        settings = settings or defaults(self.model.config)
        asked = [Request(prompt, seed=seed, settings=settings) for prompt in prompts]
        asked = repeated(asked, num_images)
        self.check(asked)
        return self.run(asked)

    def generate(
        self, prompts: str | list[str], seed: int = 0, num_images: int = 1, **settings
    ) -> list:
        """PIL images, `num_images` a prompt in order, with their origin in `info`. Keywords are
        those of `Settings`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        samples = self.samples(prompts, seed, num_images, defaults(self.model.config, **settings))
        return [self._picture(sample, "prompt") for sample in samples]

    def edit(
        self,
        images: Picture | Sequence[Picture | list[Picture]],
        instructions: str | list[str],
        seed: int = 0,
        num_images: int = 1,
        then: Sequence[str] = (),
        keep_unchanged: float | None = None,
        within: Picture | Sequence[Picture | None] | None = None,
        **settings,
    ) -> list:
        """PIL images of the sources' sizes, in order; paths, PIL images or arrays uint8 [h,w,3] are
        edited, or several of them together, then each result by the instructions `then`. `within`
        masks all, or in a list each (`Request`). Other keywords are those of `EditSettings`."""
        if isinstance(instructions, str):
            images, instructions = [images], [instructions]
        masks = within if isinstance(within, list | tuple) else [within] * len(images)
        for other, what in ((instructions, "instructions"), (masks, "masks")):
            same = f"{len(images)} images need as many {what}, not {len(other)}."
            require(len(images) == len(other), same)
        rows = [tuple(row) if isinstance(row, list | tuple) else (row,) for row in images]
        how = {"seed": seed, "keep_unchanged": keep_unchanged}
        how["settings"] = defaults(self.model.config, EditSettings, **settings)
        asked = [
            Request(text, row, tuple(then), **how, within=mask, id=f"Edit {number}")
            for number, (row, text, mask) in enumerate(
                zip(rows, instructions, masks, strict=True), 1
            )
        ]
        asked = repeated(asked, num_images)
        self.check(asked)
        return [self._picture(sample, "instruction") for sample in self.run(asked)]

    def _picture(self, sample: Sample, words: str) -> Any:
        """A PIL image whose `info` says what it was made from."""
        picture, settings = Image.fromarray(sample.image), asdict(sample.request.settings)
        picture.info |= {words: sample.prompt, "seed": sample.seed, "index": sample.index}
        picture.info |= {"turn": sample.turn} if sample.request.images else {}
        picture.info |= {"checkpoint": self.identity, "settings": settings}
        return picture

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows as they are done, batch by batch. An accelerator already works on the next batch
        while one is taken over; a CPU, which takes it over itself, would only hold both."""
        # A batch goes through the same compiled programs with the same settings.
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            try:
                row.tokens = encode(row.request, self.model.config, self.text)
                key = shape(row.request, row.tokens, self.model.config)
                groups.setdefault(key, []).append(row)
            except InputError as error:
                row.error = error
        yield [row for row in rows if row.error]
        ahead = int(self.mesh.devices.flat[0].platform != "cpu")
        begun: collections.deque[tuple[list[Row], dict]] = collections.deque()
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                begun.append((batch, self._start(batch)))
                if len(begun) > ahead:
                    yield self._finish(*begun.popleft())
        while begun:
            yield self._finish(*begun.popleft())

    def _start(self, rows: list[Row]) -> dict[str, jax.Array]:
        """Sets the devices to work on those rows of one shape that can be made."""
        inputs = []
        for row in rows:
            try:
                with row.request.named():
                    row.pictures = [array(picture) for picture in row.request.images]
                    if row.request.within is not None:
                        row.within = alpha_of(row.request.within)
                        geometry.check_mask(row.within, row.pictures[0])
                    inputs.append(self._inputs(row))
            except InputError as error:
                row.error, row.pictures, row.within = error, [], None
        if not inputs:
            return {}
        # A full batch: what is missing repeats the first row and is dropped.
        inputs += [inputs[0]] * (self.batch_size - len(inputs))
        arrays = jax.device_put(tuple(map(np.stack, zip(*inputs, strict=True))), self._place)
        request = rows[0].request
        # From the mesh the model knows the platform's kernels and how the batch is sharded.
        with jax.set_mesh(self.mesh):
            if request.images:
                return self._edit_turns(request, *arrays)
            return self._run(self.params, *arrays, **asdict(request.settings))

    def _inputs(self, row: Row) -> tuple[np.ndarray, ...]:
        """A row's own part of a batch: ids, valid and key, of an edit for each turn, and then its
        source images and which there are."""
        request, config = row.request, self.model.config
        length = bucket(request, row.tokens, config)
        ids, valid = left_pad(row.tokens, length, self.text.vocab.pad_token_id)
        keys = [generate.sample_key(request.seed, text, request.index) for text in request.texts]
        prompts = ids, valid, np.array(keys, np.uint32)
        if not request.images:
            return tuple(x[0] for x in prompts)
        squares, exists, row.placement = self._squares(row.pictures)
        if request.keep_unchanged is None and row.within is None:
            row.pictures = []
        return *prompts, squares, exists

    def _finish(self, rows: list[Row], results: dict[str, jax.Array]) -> list[Row]:
        """The rows with their samples, once the devices are ready."""
        results = jax.device_get(results)
        for i, row in enumerate(row for row in rows if not row.error):
            own = {name: values[i] for name, values in results.items()}
            if row.request.images:
                row.samples = list(_edited(row, own))
            else:
                row.samples = [Sample(row.request, 0, own["images"], own["tokens"])]
            row.pictures, row.within = [], None  # the row stays as long as its window
        return rows

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
        request: Request,
        ids: jax.Array,
        valid: jax.Array,
        keys: jax.Array,
        squares: jax.Array,
        exists: jax.Array,
    ) -> dict[str, jax.Array]:
        """All turns T of a batch of edits like `request`, from ids and valid [B,T,P] and keys
        [B,T,3] -> the results of `programs.edit`, [B,T,...]; also, if they are to be compared with
        it, `seen`, what the autoencoder makes of each turn's source."""
        options = edit_options(request.settings)
        is_compared = request.keep_unchanged is not None
        results, latents, seen = [], None, None
        if is_compared:
            seen = self._round_trip(self.params, squares[:, 0])
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


def shape(request: Request, tokens: list[list[int]], config: Blip3oConfig) -> tuple:
    """What the requests of one batch have in common."""
    length = bucket(request, tokens, config)
    compared = request.keep_unchanged is not None
    return length, request.settings, bool(request.images), len(request.then), compared


def _edited(row: Row, results: dict[str, np.ndarray]) -> Iterator[Sample]:
    """The sample of each turn from its results [T,...], back in its source's size."""
    request = row.request
    for turn in range(len(request.texts)):
        image, mask = geometry.from_square(results["images"][turn], row.placement), None
        if row.pictures:
            source = row.pictures[0]
            if request.keep_unchanged is not None:
                seen = geometry.from_square(results["seen"][turn], row.placement)
                image, mask = geometry.keep_unchanged(source, image, seen, request.keep_unchanged)
            if row.within is not None:
                image = geometry.masked(source, image, row.within)
                new = np.full_like(row.within, 255) if mask is None else mask
                mask = geometry.masked(np.zeros_like(new), new, row.within)
            row.pictures[0] = image
        drawn = (results[name][turn] for name in ("tokens", "images", "latents"))
        yield Sample(request, turn, image, *drawn, mask)


def load(
    name: str = "emoji_64",
    mesh: dict[str, int] | None = None,
    dtype: str = "auto",
    batch_size: int | None = None,
    devices=None,
) -> Pipeline:
    """A checkpoint of any kind by name or folder, placed on the mesh and ready to generate.

    mesh: sizes of the axes data, fsdp and tensor over `devices` (those of this process by default).
    dtype: "auto" is float32 on CPU and bfloat16 elsewhere, for weights and compute; "int8" the
    same with weights of eight bits in the layers of Qwen3 and SANA (`sample.int8`). batch_size:
    images made at once, by default eight per part of the batch, and on CPU four in all or as many
    as it has parts.
    InputError for anything missing, damaged or contradictory.
    """
    known = ("auto", "int8", *published.DTYPES)
    is_known = not isinstance(dtype, str) or dtype in known
    require(is_known, f"There is no dtype {dtype!r}; known: {', '.join(known)}.")
    enable_compilation_cache()
    checkpoints.find(name)  # before anything touches a device
    mesh, weights = make_mesh(mesh, devices or jax.local_devices()), dtype
    dtype = dtype_for("auto" if weights == "int8" else weights)
    # Weights go straight to their shards, with rows that make the vocabulary divisible.
    checkpoint = checkpoints.open(name).padded(mesh.shape["tensor"])
    config, shards = checkpoint.config, batch_shards(mesh)
    params = checkpoint.load(dtype=dtype, shardings=lambda tree: shardings(tree, mesh))
    identity = checkpoint.identity
    if weights == "int8":
        params, identity = int8.quantized(params), f"{identity}+int8"
    # The batch fills the mesh; a CPU gains nothing from a large one.
    each = math.ceil(CPU_BATCH / shards) if on_cpu() else 8
    batch_size = each * shards if batch_size is None else batch_size
    model = Blip3o(config, dtype=jnp.dtype(dtype))
    text, folder = checkpoints.text_of(name), checkpoint.folder
    embedded = folder.name if folder in checkpoints.embedded().values() else ""
    return Pipeline(model, params, text, mesh, identity, batch_size, embedded)
