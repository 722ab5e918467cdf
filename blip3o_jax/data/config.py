"""The data of a run as frozen dataclasses: the embedded world, or a mixture of sources on disk."""

import math
from dataclasses import dataclass, field

from blip3o_jax.errors import InputError, nearest

KINDS = ("webdataset", "parquet", "jsonl", "array_record")
EXERCISES = ("recital", "sketch", "picture")  # of scenes.exercises


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Fields left empty are named as the formats' users name them (data.tables, data.tars).
    """

    kind: str
    # a file or a pattern of files, e.g. "tars/*.tar"; array_record: a folder that TFDS wrote
    path: str
    weight: float = 0.0  # share of the examples against the other sources'; all 0: by size
    # without weights: how often an epoch shows each record, as the PyTorch code's integer weights
    repeat: int = 1
    root: str = ""  # jsonl: folder of the images; empty: that of the file
    split: str = "train"  # array_record
    image_field: str = ""
    caption_field: str = ""  # webdataset: a field of the record's json, in place of its txt
    inputs_field: str = ""  # jsonl: source images of an edit

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(
                f"Unknown kind of source {self.kind!r} ({self.path}); {nearest(self.kind, KINDS)}"
            )
        if not self.path:
            raise InputError(f"A source of kind {self.kind!r} has an empty path.")
        if self.weight < 0 or self.repeat < 1:
            raise InputError(
                f"The source {self.path} has weight {self.weight} and repeat "
                f"{self.repeat}; at least 0 and 1."
            )


@dataclass(frozen=True)
class DataConfig:
    """Either `sources`, or the `emoji_scenes` TFDS builder: written once under `data_dir`, then
    read at random by Grain."""

    data_dir: str = ""  # empty: `scenes` under the workdir
    num_train: int = 60000
    seed: int = 0
    text_fraction: float = 0.0  # share of scenes that show a word
    # tag -> share of the training prompts; empty: scenes.prompts.WEIGHTS
    weights: dict = field(default_factory=dict)
    # share of the training prompts of kinds that GenEval does not know: scenes.prompts.EXTRA
    extra: float = 0.15
    named_ground: float = 0.5  # share of the training prompts that name the ground
    # practice: kind of scenes.exercises -> share of the rows
    exercises: dict = field(default_factory=dict)
    # tokens of a training row; 0: the longest prompt that the model allows, and its image
    row_length: int = 0
    reader_threads: int = 1
    sources: tuple[SourceConfig, ...] = ()  # not empty: these in place of the embedded world
    # a tokenizer.json that fits the preset; empty: the one that travels with it
    tokenizer: str = ""
    heldout: int = 64  # records of the first source that are never trained on
    # of images that are not square; "original": the tokenizer sees the whole frame squashed (§6.4)
    crop: str = "shared"
    # what happens to a caption that does not fit the prompt; or "drop": the next record takes its
    # place
    long_captions: str = "truncate"
    max_bad_fraction: float = 0.01  # of the records read; beyond it the run stops
    # folder of `blip3o-jax data cache`: ids and latents of `sources`, so that no image is encoded
    # in the step
    cache: str = ""

    def __post_init__(self):
        weighted = [s.weight > 0 for s in self.sources]
        checks = (
            (0 <= self.extra <= 1, f"data.extra is in [0, 1], not {self.extra}."),
            (
                0 <= self.named_ground <= 1,
                f"data.named_ground is in [0, 1], not {self.named_ground}.",
            ),
            (
                not self.exercises or self.row_length > 0,
                "data.exercises need data.row_length, the tokens of a row.",
            ),
            (
                self.reader_threads >= 1,
                f"data.reader_threads is at least 1, not {self.reader_threads}.",
            ),
            (
                all(weighted) or not any(weighted),
                "Either every source of data.sources has a weight above 0, or none.",
            ),
            (
                not any(weighted) or all(s.repeat == 1 for s in self.sources),
                "data.sources have weights or repeats, not both.",
            ),
            (self.heldout >= 1, f"data.heldout is at least 1, not {self.heldout}."),
            (
                self.crop in ("shared", "original"),
                f"data.crop is 'shared' or 'original', not {self.crop!r}.",
            ),
            (
                self.long_captions in ("truncate", "drop"),
                f"data.long_captions is 'truncate' or 'drop', not {self.long_captions!r}.",
            ),
            (
                0 <= self.max_bad_fraction <= 1,
                f"data.max_bad_fraction is in [0, 1], not {self.max_bad_fraction}.",
            ),
            (
                not self.cache or self.sources,
                "data.cache holds the records of data.sources, which is empty; name the sources.",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise InputError(message)
        for kind, share in self.exercises.items():
            if kind not in EXERCISES:
                raise InputError(f"Unknown exercise {kind!r}; {nearest(kind, EXERCISES)}")
            if (
                isinstance(share, bool)
                or not isinstance(share, int | float)
                or not 0 < share < math.inf
            ):
                raise InputError(f"data.exercises are shares above 0, not {share!r} ({kind}).")
