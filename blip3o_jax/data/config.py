"""The data of a run as frozen dataclasses: the embedded world, or a mixture of sources on disk."""

import math
from dataclasses import dataclass, field

from blip3o_jax.errors import check_seed, nearest, require
from blip3o_jax.pictures import MAX_ASPECT, MAX_PIXELS, Limits
from blip3o_jax.scenes.config import EXERCISES, WEIGHTS, WorldConfig

KINDS = ("webdataset", "parquet", "jsonl", "array_record", "folder")
TABLES = ("parquet", "jsonl")  # kinds whose records may name files, and be edits
CHOICES = {"crop": ("shared", "original"), "long_captions": ("truncate", "drop")}


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Empty fields follow the names that are usual in the format (data.tables, data.tars).
    """

    kind: str
    # a file or a pattern of files, e.g. "tars/*.tar"; array_record: a folder written by TFDS;
    # folder: one of pictures, each with its caption beside it
    path: str
    weight: float = 0.0  # share of the examples against the other sources'; all 0: by size
    # without weights: how often an epoch shows each record, as the PyTorch code's integer weights
    repeat: int = 1
    root: str = ""  # jsonl, parquet: folder of the images' paths; empty: that of the file
    split: str = "train"  # array_record
    image_field: str = ""  # webdataset, folder: an extension, e.g. "input.png"
    # folder: an extension in place of txt; webdataset: also a field of the record's json
    caption_field: str = ""
    inputs_field: str = ""  # jsonl, parquet: source images of an edit

    def __post_init__(self):
        kind, path = self.kind, self.path
        require(kind in KINDS, f"Unknown kind of source {kind!r} ({path}); {nearest(kind, KINDS)}")
        require(bool(path), f"A source of kind {kind!r} has an empty path.")
        for name in ("root", "inputs_field"):
            has_effect = not getattr(self, name) or kind in TABLES
            require(has_effect, f"{name} has no effect on a source of kind {kind!r} ({path}).")
        given = f"weight {self.weight} and repeat {self.repeat}"
        in_range = self.weight >= 0 and self.repeat >= 1
        require(in_range, f"The source {path} has {given}; at least 0 and 1.")


@dataclass(frozen=True)
class DataConfig:
    """Either `sources`, or the embedded world: written once under `data_dir`, then read at random.

    `num_train` to `named_ground` are the fields of scenes.config.WorldConfig.
    """

    data_dir: str = ""  # empty: `scenes` beside the workdir; of one in a bucket, in the cache
    num_train: int = 60000
    seed: int = 0
    text_fraction: float = 0.0  # share of scenes that show a word
    # tag -> share of the training prompts; empty: scenes.config.WEIGHTS
    weights: dict = field(default_factory=dict)
    # share of the training prompts of kinds that GenEval does not have: scenes.prompts.EXTRA
    extra: float = 0.15
    named_ground: float = 0.5  # share of the training prompts that name the ground
    # share of the embedded world's rows that are edits (scenes.edits), and of edits those turned
    # round, from their result to their source, and those that ask for two changes at once
    edits: float = 0.0
    inverted_edits: float = 0.0
    composed_edits: float = 0.0
    # for rows without pictures: kind of scenes.exercises -> share of the rows
    exercises: dict = field(default_factory=dict)
    # tokens of a training row; 0: the longest prompt that the model allows, and its image
    row_length: int = 0
    reader_threads: int = 1
    sources: tuple[SourceConfig, ...] = ()  # not empty: these in place of the embedded world
    # a tokenizer.json that fits the preset; empty: the one that travels with it
    tokenizer: str = ""
    prompts: str = ""  # file of the prompts that GRPO draws, instead of the embedded world's
    heldout: int = 64  # records of the first source that are never trained on
    # of images that are not square: "original" squashes the whole frame for the tokenizer
    # (docs/model.md §6.4)
    crop: str = "shared"
    # captions that do not fit the prompt: "truncate", or "drop", and the next record is taken
    long_captions: str = "truncate"
    # pictures beyond these are bad records: pixels, and the longer side by the shorter
    max_pixels: int = MAX_PIXELS
    max_aspect: float = MAX_ASPECT
    row_group_mb: int = 1024  # row groups of Parquet in memory, of all sources together
    max_bad_fraction: float = 0.01  # of the records read; beyond it the run stops
    # folder of `blip3o-jax data cache`: codes and latents of `sources`, so that steps encode no
    # image
    cache: str = ""

    def __post_init__(self):
        # Ranges and choices.
        check_seed(self.seed, "data.seed")
        shares = ("edits", "inverted_edits", "composed_edits", "text_fraction")
        for name in ("extra", "named_ground", "max_bad_fraction", *shares):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name} is in [0, 1], not {value}.")
        for name in ("num_train", "reader_threads", "heldout", "max_aspect", "row_group_mb"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name} is at least 1, not {value}.")
        pixels = self.max_pixels
        in_range = 1 <= pixels <= MAX_PIXELS
        require(in_range, f"data.max_pixels is from 1 to {MAX_PIXELS}, not {pixels}.")
        for name, (one, other) in CHOICES.items():
            value = getattr(self, name)
            require(value in (one, other), f"data.{name} is {one!r} or {other!r}, not {value!r}.")
        # The sources, with one way of weighing them.
        weighted = {source.weight > 0 for source in self.sources}
        repeated = any(source.repeat != 1 for source in self.sources)
        each = "Either every source of data.sources has a weight above 0, or none."
        require(len(weighted) < 2, each)
        both = True in weighted and repeated
        require(not both, "data.sources have weights or repeats, not both.")
        unnamed = "data.cache holds the records of data.sources, which is empty; name the sources."
        require(not self.cache or bool(self.sources), unnamed)
        # The exercises, and the tags of the embedded world.
        rows = not self.exercises or self.row_length >= 1
        require(rows, "data.exercises need data.row_length, the tokens of a row.")
        for kind in self.exercises:
            require(kind in EXERCISES, f"Unknown exercise {kind!r}; {nearest(kind, EXERCISES)}")
        for name in ("exercises", "weights"):
            for kind, share in getattr(self, name).items():
                is_number = isinstance(share, int | float) and not isinstance(share, bool)
                above_0 = is_number and 0 < share < math.inf
                require(above_0, f"data.{name} are shares above 0, not {share!r} ({kind}).")
        self.world  # noqa: B018, refuses unknown tags

    @property
    def may_hold_edits(self) -> bool:
        """Whether a record may have source images: any of a table, not the first alone."""
        return self.edits > 0 or any(source.kind in TABLES for source in self.sources)

    @property
    def limits(self) -> Limits:
        """What a picture may have at most."""
        return Limits(self.max_pixels, self.max_aspect)

    @property
    def world(self) -> WorldConfig:
        """What the embedded world draws for this run."""
        return WorldConfig(
            train=self.num_train,
            seed=self.seed,
            text=self.text_fraction,
            weights=self.weights or WEIGHTS,
            extra=self.extra,
            named_ground=self.named_ground,
        )
