"""The embedded world as a TFDS data set in ArrayRecord files, written and read without TensorFlow.

The only file of this folder that imports TFDS.
"""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.prompts import sample
from blip3o_jax.scenes.scene import PATCHES, SIZE, compose, patch_words

DESCRIPTION = (
    "64x64 scenes of Noto emoji sprites and short words, with prompts and metadata in GenEval's "
    "schema; see blip3o_jax/scenes."
)


@dataclasses.dataclass
class EmojiScenesConfig(tfds.core.BuilderConfig):
    """A world as TFDS wants it, under the world's own name."""

    name: str = ""
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)

    def __post_init__(self):
        self.name = self.world.name


class EmojiScenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Record i of a split is prompts.sample(world, i, split): image, prompt, metadata (JSON) and
    patches (indices of scene.PATCH_WORDS)."""

    name = "emoji_scenes"
    VERSION = tfds.core.Version("1.3.0")  # to be raised when art, words or sampling change
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
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(
            builder=self, description=DESCRIPTION, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "heldout")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        world = self.builder_config.world
        for index in range(getattr(world, split)):
            metadata, scene = sample(world, index, split)
            # encoded by Pillow, as TFDS would need TensorFlow for it
            png = io.BytesIO()
            Image.fromarray(compose(scene)).save(png, "png", compress_level=1)
            png.seek(0)
            words = {"prompt": metadata["prompt"], "metadata": json.dumps(metadata)}
            yield index, {"image": png, **words, "patches": patch_words(scene)}


def open_source(data_dir: str | Path, split: str = "train", world: WorldConfig | None = None):
    """Random access to a split, which is drawn first if data_dir does not hold it (about a minute
    for 62,000 records; all or nothing).

    Returns a TFDS data source; source[i] and source.__getitems__([i, ...]) give image uint8 [64,
    64, 3], prompt and metadata as bytes, patches uint8 [8, 8].
    """
    config = EmojiScenesConfig(world=world or WorldConfig())
    builder = EmojiScenes(data_dir=str(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare()
    return builder.as_data_source(split=split)
