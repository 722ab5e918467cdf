"""Makes the tokenizer of preset emoji_64: `python tests/scenes/make_tokenizer.py`.

Byte-level BPE as Qwen2's (same pre-tokenisation, normaliser and decoder, so that any text can be
encoded and transformers reads the file), trained until every word of the embedded world is one
token. Then the special tokens in BLIP3o's order (docs/model.md §4.1).
"""

import re
from collections.abc import Iterable

from blip3o_jax.presets import preset
from blip3o_jax.resources import ASSETS
from blip3o_jax.scenes.prompts import NUMBERS, RELATIONS
from blip3o_jax.scenes.sprites import COLORS, GROUNDS, OBJECTS, PLURALS
from blip3o_jax.text import edit_prompt, t2i_prompt

# Qwen2's pattern: contractions, words with one leading mark or space, single digits, punctuation,
# line ends, spaces.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|vision_start|> <|vision_end|> <|image_pad|> <|endoftext|> <|im_start|> <|im_end|> "
    "<im_start> <im_end>"
)
GRAMMAR = 'a an the photo of and on in with it one natural word "'
EDITS = "make change replace remove add move put turn to from into color background"


def vocabulary() -> list[str]:
    """Every word of captions and edits; written words ("SUN") are spelled letter by letter."""
    names = [*OBJECTS, *PLURALS.values(), *COLORS, *GROUNDS, *NUMBERS.values(), *RELATIONS]
    return list(dict.fromkeys(f"{GRAMMAR} {EDITS} {' '.join(names)}".split()))


def corpus() -> list[str]:
    """The templates' text without their special tokens, and every caption word as it stands in a
    sentence."""
    templates = [t2i_prompt(""), edit_prompt("", 1, 1)]
    plain = [piece for template in templates for piece in re.split(r"<[^>]+>", template)]
    return [*plain, *(f" {word}" for word in vocabulary())]


def add_tokens(
    tokenizer, special: Iterable[str], num_scale_tokens: int, num_image_tokens: int
) -> None:
    """Appends special tokens, then `<S*>` and `<I*>`, ordinary added tokens as published."""
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([f"<S{i}>" for i in range(num_scale_tokens)])
    tokenizer.add_tokens([f"<I{i}>" for i in range(num_image_tokens)])


def make():
    """The tokenizer; deterministic, ids contiguous from the bytes to the last image token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # never reached: merging ends when every word of the corpus is one token
        vocab_size=1 << 16,
        min_frequency=0,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    vocab = preset("emoji_64").vocab
    add_tokens(tokenizer, SPECIAL_TOKENS.split(), vocab.num_scale_tokens, vocab.num_image_tokens)
    return tokenizer


if __name__ == "__main__":
    path = ASSETS / "emoji_64" / "tokenizer.json"
    tokenizer = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    words = tokenizer.get_vocab_size(with_added_tokens=False)
    print(f"{path}: {words} bytes and words, {tokenizer.get_vocab_size()} tokens")
