"""A tokenizer of vocab.json and merges.txt against transformers' own reading of the same files."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from blip3o_jax.convert.tokenizer_files import to_tokenizer_json

pytestmark = pytest.mark.parity
TEXTS = (
    "A cat's tail, 12345 of them; we'll SEE\n\n  two  lines\r\n\tand a tab",
    "Ein Käsebrötchen \u2013 caf\u0065\u0301 \u4f60\u597d, \ud55c\uad6d\uc5b4!",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|> <tool> x<tool>y",
    "   leading and trailing   ",
)
ADDED = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<tool>": False}


@pytest.fixture
def folder(tmp_path):
    """Merges learned from a few sentences, as Qwen's tokenizer keeps them."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    learner.train_from_iterator(list(TEXTS) * 3, trainer)
    model = json.loads(learner.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    first = len(model["vocab"])
    rows = {
        str(first + i): {"content": token, "special": special, "normalized": False}
        | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        for i, (token, special) in enumerate(ADDED.items())
    }
    fields = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"}
    fields |= {"eos_token": "<|im_end|>", "unk_token": None, "added_tokens_decoder": rows}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    return tmp_path


def test_ids_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Tokenizer.from_pretrained(str(folder))
    ours = Tokenizer.from_str(to_tokenizer_json(folder))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        assert len(ids) < len(text.encode())
    added = ours.get_added_tokens_decoder()
    assert {token.content: token.special for token in added.values()} == ADDED
