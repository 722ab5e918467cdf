"""The command `convert` on miniatures, run as a user would."""

import json

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from blip3o_jax.cli import main
from blip3o_jax.convert.folders import Options
from blip3o_jax.convert.sources import open_source

TA_TOK = "model.vision_tower.vision_tower."
EMBEDDING = "model.embed_tokens.weight"
SPECIAL = {
    3: "<|endoftext|>",
    5: "<|im_end|>",
    6: "<|im_start|>",
    7: "<|vision_start|>",
    8: "<|vision_end|>",
    9: "<|image_pad|>",
}
ARGS = {
    "bottleneck": {"args": {"regularizer": {"args": {"stochastic_temperature": 0.03}}}},
    "input_size": 13,
    "teacher": "x/siglip2-so400m",
}
IGNORED = {
    f"{TA_TOK}encoder.head.probe": np.ones((1, 1, 16), np.float32),
    f"{TA_TOK}scale_layer.shift": np.zeros((1, 3, 1, 1), np.float32),
    "lm_head.weight": None,  # the embedding again
}


def argv(parts):
    """The options of {flag: path}."""
    return [item for pair in parts.items() for item in pair]


def opened(parts, **options):
    """The source that --ar, --dit and --tokenizer make."""
    flags = {flag.removeprefix("--"): str(path) for flag, path in parts.items()}
    return open_source(None, flags, "mean", "tiny", Options(**options))


def convert(capsys, *argv):
    """The report of a conversion that must succeed."""
    assert main(["convert", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refused(capsys, *argv):
    """The sentence of a conversion that must not."""
    capsys.readouterr()
    assert main(["convert", *map(str, argv)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("blip3o-jax: ")
    return error


def same(folder, other, without=()):
    """Asserts that two checkpoints hold the same tensors, bit for bit."""
    one, two = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()}
        for d in (folder, other)
    )
    assert set(one) - set(without) == set(two)
    assert all(
        (one[k].dtype, one[k].shape, one[k].tobytes())
        == (two[k].dtype, two[k].shape, two[k].tobytes())
        for k in two
    )


def tiny_tokenizer(extended=False):
    """Twenty tokens, as many as tiny.VOCAB leaves to text."""
    words = {SPECIAL.get(i, f"word{i}"): i for i in range(20)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    if extended:
        tokenizer.add_special_tokens(["<im_start>", "<im_end>"])
        tokenizer.add_tokens(["<S0>", "<S1>", "<S2>", *(f"<I{i}>" for i in range(16))])
    return tokenizer


def group(tensors, prefix):
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
