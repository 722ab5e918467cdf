#!/usr/bin/env bash
# TFDS tells configs of a builder apart by identity, so that an equal one is refused.
# What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile tensorflow-datasets==4.9.10 importlib_resources==7.1.0
venv/bin/python - 2>log <<'EOF' || { status=$?; tail -n 5 log; exit "$status"; }
import dataclasses
import importlib.metadata

import numpy as np
import tensorflow_datasets as tfds

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
    name: str = "small"
    size: int = 4


class Numbers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [Config()]

    def _info(self):
        features = tfds.features.FeaturesDict({"x": tfds.features.Tensor(shape=(), dtype=np.int32)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from ((i, {"x": i}) for i in range(self.builder_config.size))


class NoneOfItsOwn(Numbers, skip_registration=True):
    BUILDER_CONFIGS = []


def outcome(builder, config):
    try:
        return builder(data_dir="data", config=config).builder_config.size
    except ValueError as error:
        return str(error).splitlines()[0]


print("tensorflow-datasets", importlib.metadata.version("tensorflow-datasets"))
own = Numbers.BUILDER_CONFIGS[0]
print("equal:", outcome(Numbers, Config()))
expect("the two configs are equal", own == Config() and own is not Config())
expect("the class's own object is taken", outcome(Numbers, own) == 4)
expect("an equal object is refused", "Cannot name a custom" in str(outcome(Numbers, Config())))
expect("and one of another name is taken", outcome(Numbers, Config("large", size=9)) == 9)
expect("a class that lists no configs takes any", outcome(NoneOfItsOwn, Config()) == 4)
raise SystemExit(bool(changed))
EOF
