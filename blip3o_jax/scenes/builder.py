"""The embedded world as a TFDS dataset in ArrayRecord files, written and read without TensorFlow;
the only file here that imports TFDS."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from blip3o_jax.scenes.prompts import EXTRA_SHARE, NAMED_GROUND, WEIGHTS, sample
from blip3o_jax.scenes.scene import PATCHES, SIZE, compose, patch_words

DESCRIPTION = (
    "64x64 scenes of Noto emoji sprites and short words, with prompts and metadata in GenEval's "
    "schema; see blip3o_jax/scenes."
)


@dataclasses.dataclass
class EmojiScenesConfig(tfds.core.BuilderConfig):
    """What to draw: sizes of the splits, seed, shares of written words, tags, extra kinds and named
    grounds. Its name tells all apart."""

    name: str = ""  # follows from the rest
    train: int = 60_000
    heldout: int = 2_000
    seed: int = 0
    text: float = 0.1
    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(WEIGHTS))
    extra: float = EXTRA_SHARE
    named_ground: float = NAMED_GROUND

    def __post_init__(self):
        self.weights = dict(self.weights)
        drawn = json.dumps([self.text, sorted(self.weights.items()), self.extra, self.named_ground])
        digest = hashlib.sha256(drawn.encode()).hexdigest()[:8]
        self.name = f"train{self.train}_heldout{self.heldout}_seed{self.seed}_{digest}"


class EmojiScenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Record i of a split is prompts.sample(seed, i, split): image, prompt, metadata (JSON) and
    patches (indices of scene.PATCH_WORDS)."""

    name = "emoji_scenes"
    VERSION = tfds.core.Version("1.2.0")  # to be raised when art, words or sampling change
    BUILDER_CONFIGS = [EmojiScenesConfig()]  # noqa: RUF012, TFDS's own convention

    # no checksums to look for; TFDS 4.9.10 would need importlib_resources, which it does not
    # declare
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
            "prompt": tfds.features.Text(),
            "metadata": tfds.features.Text(),
            "patches": tfds.features.Tensor(shape=(PATCHES, PATCHES), dtype=np.uint8),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.train),
            "heldout": self._generate_examples("heldout", config.heldout),
        }

    def _generate_examples(self, split: str, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index in range(number):
            shares = {
                "text": config.text,
                "extra": config.extra,
                "named_ground": config.named_ground,
            }
            metadata, scene = sample(config.seed, index, split, config.weights, **shares)
            yield (
                index,
                {
                    "image": _png(compose(scene)),
                    "prompt": metadata["prompt"],
                    "metadata": json.dumps(metadata),
                    "patches": patch_words(scene),
                },
            )


def _png(image: np.ndarray) -> io.BytesIO:
    """Written by Pillow, as TFDS would need TensorFlow for it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    file.seek(0)
    return file


def open_source(
    data_dir: str | Path, split: str = "train", config: EmojiScenesConfig | None = None
):
    """Random access to a split, which is drawn first if data_dir does not hold it (about a minute
    for 62,000 records; all or nothing).

    Returns a TFDS data source; source[i] and source.__getitems__([i, ...]) give image uint8 [64,
    64, 3], prompt and metadata as bytes, patches uint8 [8, 8].
    """
    builder = EmojiScenes(
        data_dir=str(data_dir), config=config or EmojiScenesConfig(), file_format="array_record"
    )
    builder.download_and_prepare()
    return builder.as_data_source(split=split)
