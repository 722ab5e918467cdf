"""Tokenizer, prompt templates and token rows (docs/model.md §4; paper section 2).

A caption becomes a ChatML conversation that ends where the image begins. Generation is given

    system turn | user turn with the caption | assistant header | <im_start> <S0>

to which a training row adds `t1 .. tn <im_end> <|im_end|> \\n`. `<im_start>` opens an image;
`<|im_start|>`, with bars, opens a chat turn. Rows are numpy arrays on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from blip3o_jax import paths
from blip3o_jax.config import Blip3oConfig, VocabConfig
from blip3o_jax.errors import InputError, require
from blip3o_jax.paths import AnyPath

if TYPE_CHECKING:
    import jax

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{content}<|im_end|>\n"
    "<|im_start|>assistant\n<im_start><S0>"
)
T2I_REQUEST = "Please generate image based on the following caption: "
IMAGE_END = "<im_end><|im_end|>\n"
IMAGE_PAD = "<|image_pad|>"
CHARACTERS = 1024  # more than any token has
WISHES = {"prompt": "what the image should show", "instruction": "what to change"}
# needed by the templates, not named in VocabConfig
CHAT_TOKENS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", IMAGE_PAD)


def t2i_prompt(caption: str) -> str:
    """The text that asks for an image of `caption`, in inference, GRPO and training (§4.2)."""
    return CHAT.format(content=T2I_REQUEST + caption)


def edit_prompt(instruction: str, num_images: int, num_image_tokens: int) -> str:
    """The text that asks for an edit; the tokens of the source images take the places of
    `<|image_pad|>` (§4.2)."""
    what = "this image" if num_images == 1 else "these images"
    images = f"<|vision_start|>{IMAGE_PAD * num_images * num_image_tokens}<|vision_end|>"
    request = f"Please edit {what} according to the following instruction: {instruction}.\n"
    return CHAT.format(content=request + images)


def load_tokenizer(path: str | AnyPath, text: str | None = None) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, or of its `text`, which `path` then only
    names; with any truncation or padding saved in the file switched off."""
    from tokenizers import Tokenizer

    file = paths.path(path)
    require(file.is_file(), f"No tokenizer at {str(path)!r}; checkpoints hold a tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_str(text or file.read_text("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{str(path)!r} is not a tokenizer.json ({error}).") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def row_length(model: Blip3oConfig) -> int:
    """Tokens of a training row: the longest prompt, its source images, the image and its end
    (`IMAGE_END`)."""
    return model.max_prompt_tokens + (model.max_sources + 1) * model.ta_tok.num_tokens + 3


TokenRows = Sequence[Sequence[int]]  # of different lengths


def left_pad(rows: TokenRows, length: int, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows -> (ids [B,length] int32, valid [B,length] bool), aligned right so that all rows
    end in the same column."""
    return _padded(rows, length, pad_token_id, "prompt")


def right_pad(rows: TokenRows, length: int, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """As `left_pad`, aligned left: rows begin in the first column."""
    return _padded(rows, length, pad_token_id, "training row")


def _padded(rows: TokenRows, length: int, pad: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([len(row) for row in rows], np.int32)[:, None]
    longest = sizes.max(initial=0)
    shorter = f"a row of {length}; make the rows longer or the text shorter."
    require(longest <= length, f"A {what} of {longest} tokens does not fit {shorter}")
    # prompts end in the last column, training rows begin in the first
    columns = np.arange(length)
    valid = columns >= length - sizes if what == "prompt" else columns < sizes
    ids = np.full(valid.shape, pad, np.int32)
    ids[valid] = np.concatenate(rows) if rows else []
    return ids, valid


def causal_positions(tokens: jax.Array) -> jax.Array:
    """Positions [B,T] of the tokens [B,T] of rows that begin in the first column: 0, 1, 2, ..."""
    import jax.numpy as jnp

    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def targets(tokens: jax.Array, start: jax.Array, vocab: VocabConfig) -> jax.Array:
    """Which tokens [B,T] are targets of the cross-entropy, bool [B,T]: all but padding and the
    source images of an edit prompt (docs/model.md §6.5).

    `start` [B] is the column of each row's `<S0>`. Numpy or jax arrays.
    """
    columns = np.arange(tokens.shape[1])
    source_image = (tokens >= vocab.image_start_token_id) & (columns < start[:, None])
    return (tokens != vocab.pad_token_id) & ~source_image


@dataclass(frozen=True)
class Text:
    """A tokenizer that agrees with `vocab`; InputError when a special token is missing or has
    another id.

    `max_prompt_tokens` bounds a templated prompt, without the source images of an edit.
    """

    tokenizer: Any
    vocab: VocabConfig
    max_prompt_tokens: int

    def __post_init__(self):
        # The ids that the config names, and the tokens that the templates need.
        v = self.vocab
        expected = {
            "<im_start>": v.image_start_tag_id,
            "<im_end>": v.image_end_tag_id,
            "<S0>": v.scale_start_token_id,
            f"<S{v.num_scale_tokens - 1}>": v.scale_start_token_id + v.num_scale_tokens - 1,
            "<I0>": v.image_start_token_id,
            f"<I{v.num_image_tokens - 1}>": v.image_end_token_id,
            "<|endoftext|>": v.pad_token_id,
            "<|im_end|>": v.eos_token_id,
        }
        for token, id_ in expected.items():
            actual = self.tokenizer.token_to_id(token)
            given = f"The tokenizer gives {token} the id {actual}, not the config's {id_}."
            require(actual == id_, given)
        for token in CHAT_TOKENS:
            missing = f"The tokenizer has no token {token}, which prompts need."
            require(self.tokenizer.token_to_id(token) is not None, missing)

    def ids(self, text: str) -> list[int]:
        """Ids of a text as it stands, without template or checks."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, caption: str) -> list[int]:
        """Ids of the templated caption, ending in `<im_start> <S0>`; InputError when it is empty,
        too long or holds a control token."""
        return self._encode(t2i_prompt(caption), caption, "prompt", 0)

    def encode_edit(self, instruction: str, image_ids: np.ndarray) -> list[int]:
        """Ids of the templated instruction with the source images' codes [images, n] in place;
        errors as `encode_prompt`."""
        prompt = edit_prompt(instruction, *image_ids.shape)
        ids = np.array(self._encode(prompt, instruction, "instruction", image_ids.size))
        places = ids == self.tokenizer.token_to_id(IMAGE_PAD)
        ids[places] = image_ids.ravel() + self.vocab.image_start_token_id
        return ids.tolist()

    def encode_prompts(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> (ids [B,length] int32, valid [B,length] bool), left-padded."""
        prompts = [self.encode_prompt(caption) for caption in captions]
        return left_pad(prompts, length, self.vocab.pad_token_id)

    def training_rows(
        self, prompts: TokenRows, image_ids: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encoded prompts and the codes [B,n] of their images -> (tokens [B,length] int32, start
        [B] int32), right-padded (§4.3).

        `start` is the column of `<S0>`: the image tokens are in start+1 .. start+n. Pass zeros for
        codes that the device makes and writes there.
        """
        end = self.ids(IMAGE_END)
        codes = (image_ids + self.vocab.image_start_token_id).tolist()
        rows = [[*prompt, *image, *end] for prompt, image in zip(prompts, codes, strict=True)]
        tokens, _ = right_pad(rows, length, self.vocab.pad_token_id)
        return tokens, np.array([len(prompt) - 1 for prompt in prompts], np.int32)

    @functools.cached_property
    def _controls(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    def _encode(self, prompt: str, written: str, what: str, num_image_tokens: int) -> list[int]:
        """Ids of a template that holds the user's words `written`, after the checks; `what` they
        are, for the sentence of an error."""
        # The user's words: some, in UTF-8, none of them a control token.
        words = written.split()
        quoted = repr(" ".join(words[:6])[:60] + (" ..." if len(words) > 6 else ""))
        require(bool(words), f"The {what} is empty; write {WISHES[what]}.")
        surrogates = not written.isascii() and any("\ud800" <= c <= "\udfff" for c in written)
        require(not surrogates, f"The {what} {quoted} is not UTF-8 text; save it as UTF-8.")
        # Tokenising takes some hundred times the memory of a text.
        limit, count = self.max_prompt_tokens, len(written)
        many = f"{count:,} characters, more than {limit} tokens can have; shorten it."
        require(count <= CHARACTERS * limit, f"The {what} {quoted} has {many}")
        if controls := [id_ for id_ in self.ids(written) if id_ in self._controls]:
            token = self.tokenizer.id_to_token(controls[0])
            raise InputError(f"The {what} {quoted} contains the control token {token}; remove it.")
        # The template, which must fit.
        ids = self.ids(prompt)
        size = len(ids) - num_image_tokens
        many = f"{size} tokens with its template, more than the {limit} allowed; shorten it."
        require(size <= limit, f"The {what} {quoted} has {many}")
        return ids
