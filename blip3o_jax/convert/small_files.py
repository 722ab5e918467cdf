"""What the small files beside a checkpoint say where its config.json does not: ids, in the files of
its tokenizer; sizes of SANA and its autoencoder, in the folder of `diffusion_name_or_path`."""

import json
from collections.abc import Mapping
from typing import Any

from blip3o_jax.convert.config_json import NETWORKS
from blip3o_jax.convert.tokenizer_files import added_tokens
from blip3o_jax.errors import about
from blip3o_jax.files import read_json
from blip3o_jax.paths import AnyPath
from blip3o_jax.text import load_tokenizer

LIMIT = 1 << 20  # bytes of a config
TOKENIZER_LIMIT = 64 << 20  # and of a tokenizer's
# Field of config.json -> tokenizer_config.json's, and the token that it is in Qwen3.
IDS = {"pad_token_id": ("pad_token", "<|endoftext|>"), "eos_token_id": ("eos_token", "<|im_end|>")}
# Part -> its folder in a repository of diffusers.
FOLDERS = {"sana": "transformer", "dc_ae": "vae"}


def completed(directory: AnyPath, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` of a folder's config.json with the ids and networks that it leaves out, where a file
    beside it has them."""
    missing = [key for key in IDS if _first(fields.get(key)) is None]
    ids = {key: _first(fields[key]) for key in IDS if key not in missing}
    return {**fields, **ids, **_ids(directory, missing), **networks(directory, fields)}


def _first(number: Any) -> Any:
    """The first of several ids, as generation may end at; others as they are."""
    return number[0] if isinstance(number, list) and number else number


def _read(file: AnyPath, limit: int) -> dict[str, Any]:
    return read_json(file, limit) if file.is_file() else {}


def _ids(directory: AnyPath, missing: list[str]) -> dict[str, Any]:
    """Those of `missing` that the files of generation or of the tokenizer say."""
    if not missing:
        return {}
    generation = _read(directory / "generation_config.json", LIMIT)
    ids = {key: _first(generation.get(key)) for key in missing}
    left = [key for key, number in ids.items() if number is None]
    if not left:
        return ids
    # The tokenizer's names of them, then its ids of those names.
    config = _read(directory / "tokenizer_config.json", TOKENIZER_LIMIT)
    numbers = {token: number for token, (number, _) in added_tokens(directory).items()}
    for key in left:
        name, usual = IDS[key]
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        token = token if isinstance(token, str) else usual
        if token not in numbers and (directory / "tokenizer.json").is_file():
            numbers[token] = load_tokenizer(directory / "tokenizer.json").token_to_id(token)
        ids[key] = numbers.get(token)
    return ids


def networks(directory: AnyPath, fields: Mapping[str, Any]) -> dict[str, Any]:
    """{key of config.json: fields} of the networks that it does not describe and that are not the
    published ones, from the folder of that name in the checkpoint or beside it."""
    name = fields.get("diffusion_name_or_path")
    inner = name.rstrip("/").rpartition("/")[2] if isinstance(name, str) else ""
    if not inner or inner in (".", ".."):
        return {}
    described = {}
    for part, folder in FOLDERS.items():
        key, to_json, read = NETWORKS[part]
        places = (directory / inner, directory.resolve().parent / inner)
        files = [place / folder / "config.json" for place in places]
        file = next((file for file in files if file.is_file()), None)
        if key not in fields and file is not None:
            with about(file):
                cfg = read(read_json(file, LIMIT))
            if cfg != type(cfg)():
                described[key] = json.loads(json.dumps(to_json(cfg)))
    return described
