"""A tokenizer as transformers' slow Qwen2Tokenizer saves it (vocab.json, merges.txt and the added
tokens), read as the tokenizer.json that it means."""

import re
from collections.abc import Mapping
from typing import Any

from blip3o_jax.errors import InputError, about, os_errors, require
from blip3o_jax.files import read_json
from blip3o_jax.paths import AnyPath

LIMIT = 64 << 20  # bytes
# How Qwen's tokenizer cuts text before its merges: contractions, words with one character before
# them, single digits, punctuation, line breaks, blanks.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
NAMED = ("pad_token", "eos_token", "bos_token", "unk_token")  # special, where a file names them


def is_slow(folder: AnyPath) -> bool:
    """Whether the tokenizer of a folder is there as vocab.json and merges.txt only."""
    files = ("vocab.json", "merges.txt")
    return not (folder / "tokenizer.json").is_file() and all((folder / x).is_file() for x in files)


def to_tokenizer_json(folder: AnyPath) -> str:
    """The text of tokenizer.json; InputError for damaged files, or ids that no tokenizer gives."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    vocab = read_json(folder / "vocab.json", LIMIT)
    try:
        tokenizer = Tokenizer(models.BPE(vocab, _merges(folder / "merges.txt")))
    except (Exception, BaseException) as error:  # the library's own kinds, and its panics
        if isinstance(error, KeyboardInterrupt | SystemExit | InputError):
            raise
        raise InputError(f"{folder}: vocab.json and merges.txt do not agree ({error}).") from error
    # Qwen's normaliser and pieces, and bytes as characters.
    tokenizer.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # The added tokens in the order of their ids, which have to come out as they are there.
    added = sorted(added_tokens(folder).items(), key=lambda item: item[1][0])
    tokenizer.add_tokens([AddedToken(token, **flags) for token, (_, flags) in added])
    for token, (number, _) in added:
        other = f"{folder}: the added token {token!r} has the id {number}, which leaves a gap."
        require(tokenizer.token_to_id(token) == number, other)
    return tokenizer.to_str()


def _merges(file: AnyPath) -> list[tuple[str, str]]:
    with os_errors(f"{file} cannot be read"):
        require(file.stat().st_size <= LIMIT, f"{file} is larger than {LIMIT} bytes.")
        data = file.read_bytes()
    try:
        lines = data.decode("utf-8").split("\n")
    except ValueError as error:
        raise InputError(f"{file} is not UTF-8.") from error
    # The first line may name the version.
    first = 1 if lines[0].startswith("#version") else 0
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines[first:] if line.strip()]
    for pair in pairs:
        require(len(pair) == 2, f"{file}: {' '.join(pair)[:60]!r} is not a pair of tokens.")
    return pairs


def added_tokens(folder: AnyPath) -> dict[str, tuple[int, dict[str, bool]]]:
    """{token: (id, flags)} of tokenizer_config.json, and of added_tokens.json what that lacks."""
    file = folder / "tokenizer_config.json"
    config = read_json(file, LIMIT) if file.is_file() else {}
    tokens: dict[str, tuple[int, dict[str, bool]]] = {}
    with about(file):
        decoder = config.get("added_tokens_decoder", {})
        require(isinstance(decoder, Mapping), "its added_tokens_decoder is not an object.")
        for number, row in decoder.items():
            is_row = isinstance(row, Mapping) and isinstance(row.get("content"), str)
            is_row = is_row and re.fullmatch(r"[0-9]{1,9}", number) is not None
            require(is_row, f"its added token {number!r} is not a token with its content.")
            flags = {flag: row.get(flag) is True for flag in FLAGS}
            tokens[row["content"]] = int(number), flags
    # added_tokens.json says nothing of flags: special are those that are named.
    special, file = _special(config), folder / "added_tokens.json"
    for token, number in (read_json(file, LIMIT) if file.is_file() else {}).items():
        require(type(number) is int and number >= 0, f"{file}: the id of {token!r} is {number!r}.")
        flags = {"special": token in special, "normalized": token not in special}
        tokens.setdefault(token, (number, flags))
    return tokens


def _special(config: Mapping[str, Any]) -> set[str]:
    """The tokens that tokenizer_config.json names."""
    rows = [config.get(name) for name in NAMED]
    more = config.get("additional_special_tokens")
    rows += more if isinstance(more, list) else []
    texts = (row.get("content") if isinstance(row, Mapping) else row for row in rows)
    return {text for text in texts if isinstance(text, str)}
