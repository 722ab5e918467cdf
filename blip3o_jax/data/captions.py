"""The caption of a record as data sets write it: a text, several of them, or a conversation."""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.data.records import RecordError
from blip3o_jax.text import T2I_REQUEST

MAX_CHARACTERS = 1 << 18  # of a caption: tokenising takes some hundred times its memory
IMAGE = "<image>"  # where LLaVA's conversations have an image
ROLES = {"human": "user", "gpt": "assistant"}  # other names of who speaks


def captions_of(value: object, name: str, is_edit: bool = False) -> tuple[str, ...]:
    """The captions in the field `name` of a record, of which each describes its image, or the one
    instruction of an edit; RecordError for anything but text."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        value = _of_conversation(value, name)
    texts = [value] if isinstance(value, str) else value
    are_texts = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not are_texts or not texts:
        raise RecordError(f"{name!r} is not text, nor a list of texts")
    if is_edit and len(texts) > 1:  # perhaps steps after each other
        raise RecordError(f"{len(texts)} texts in {name!r}, where an edit has one")
    if (longest := max(map(len, texts))) > MAX_CHARACTERS:
        raise RecordError(f"{name!r} has a text of {longest} characters, beyond {MAX_CHARACTERS}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # halves of characters, which JSON can hold
        raise RecordError(f"{name!r} has a text that is not UTF-8") from error
    # A single empty caption is said to be empty where it is encoded.
    return tuple(filter(None, map(str.strip, texts))) or ("",)


def _of_conversation(turns: list, name: str) -> str:
    """The caption of one question and its answer: the answer about an image, or the request that an
    image answers."""
    said = []
    for turn in turns:
        role, text = (turn.get(a, turn.get(b)) for a, b in (("from", "role"), ("value", "content")))
        if role != "system":
            said.append((ROLES.get(str(role), role), text))
    who, texts = [role for role, _ in said], [text for _, text in said]
    if who != ["user", "assistant"] or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{name!r} is not one question and its answer")
    question, answer = texts
    caption = question if IMAGE in answer else answer
    return caption.replace(IMAGE, "").strip().removeprefix(T2I_REQUEST)


def draw(captions: Sequence[str], *numbers: int) -> str:
    """One of a record's captions, a function of the numbers: seed, source, epoch and record."""
    if len(captions) == 1:
        return captions[0]
    return captions[np.random.default_rng(numbers).integers(len(captions))]
