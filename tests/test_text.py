"""Templates, the embedded tokenizer, rows for generation and training, and the refusals
(docs/model.md §4)."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from scenes.make_tokenizer import QWEN2_PATTERN, add_tokens, corpus, make, vocabulary

from blip3o_jax.config import VocabConfig
from blip3o_jax.errors import InputError
from blip3o_jax.presets import preset
from blip3o_jax.resources import ASSETS
from blip3o_jax.text import Text, edit_prompt, left_pad, load_tokenizer, t2i_prompt, targets

CONFIG = preset("emoji_64")
VOCAB = CONFIG.vocab
PATH = ASSETS / "emoji_64" / "tokenizer.json"
TEMPLATE = (
    "<|im_start|> system \n You Ġare Ġa Ġhelpful Ġassistant . <|im_end|> \n <|im_start|> user \n "
    "Please Ġgenerate Ġimage Ġbased Ġon Ġthe Ġfollowing Ġcaption : {} <|im_end|> \n "
    "<|im_start|> assistant \n <im_start> <S0>"
)
QWEN3_ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> "
    "</tool_response> <think> </think>"
)


@pytest.fixture(scope="module")
def text(tokenizer):
    return tokenizer


def named(tokens: str) -> list[str]:
    """Tokens separated by single spaces, "\\n" for the byte-level name of a line end."""
    return [token.replace("\n", "Ċ") for token in tokens.split(" ")]


def tokens_of(text: Text, ids) -> list[str]:
    return [text.tokenizer.id_to_token(int(i)) for i in ids]


def test_t2i_prompt_is_the_published_string():
    assert t2i_prompt("a {red} cat") == (
        "<|im_start|>system\nYou are a helpful "
        "assistant.<|im_end|>\n<|im_start|>user\nPlease generate image based on the "
        "following "
        "caption: a {red} cat<|im_end|>\n<|im_start|>assistant\n<im_start><S0>"
    )


def test_edit_prompt_is_the_published_string():
    assert edit_prompt("make it blue", 1, 2) == (
        "<|im_start|>system\nYou are a helpful "
        "assistant.<|im_end|>\n<|im_start|>user\nPlease edit this image according to the "
        "following "
        "instruction: make it "
        "blue.\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
        "<im_start><S0>"
    )
    assert "edit these images according" in edit_prompt("join them", 2, 2)
    assert edit_prompt("join them", 2, 3).count("<|image_pad|>") == 6


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("two red hearts", "Ġtwo Ġred Ġhearts"),
        ("a blue cat left of a tree", "Ġa Ġblue Ġcat Ġleft Ġof Ġa Ġtree"),
        ("three birds on pink", "Ġthree Ġbirds Ġon Ġpink"),
        ("a purple key and a green apple", "Ġa Ġpurple Ġkey Ġand Ġa Ġgreen Ġapple"),
        ('the word "SUN"', 'Ġthe Ġword Ġ" S U N "'),
    ],
)
def test_every_word_of_a_prompt_is_one_token(text, caption, words):
    ids = text.encode_prompt(caption)
    assert tokens_of(text, ids) == named(TEMPLATE.format(words))
    assert ids[-2:] == [VOCAB.image_start_tag_id, VOCAB.scale_start_token_id]
    assert text.tokenizer.decode(ids, skip_special_tokens=False) == t2i_prompt(caption)


def test_every_word_of_the_world_is_one_token(text):
    for word in vocabulary():
        assert len(text.tokenizer.encode(f" {word}").ids) == 1, word


@pytest.mark.parametrize(
    "caption",
    ["Ein Würfel über Köln, 3×4!", "一只红色的猫", "🦊 + ☂️", "a\tb\n\n  c", "don't", 'say "hi"'],
)
def test_any_text_encodes_and_decodes(text, caption):
    ids = text.encode_prompt(caption)
    assert max(ids) < VOCAB.image_start_token_id
    assert text.tokenizer.decode(ids, skip_special_tokens=False) == t2i_prompt(caption)


def test_text_is_normalised_to_nfc(text):
    assert text.encode_prompt("cafe\u0301") == text.encode_prompt("caf\u00e9")


def test_the_shipped_tokenizer_is_what_the_script_makes():
    made, shipped = json.loads(make().to_str()), json.loads(PATH.read_text())
    assert made["model"]["vocab"] == shipped["model"]["vocab"]
    assert made["model"]["merges"] == shipped["model"]["merges"]
    assert made["added_tokens"] == shipped["added_tokens"]
    assert QWEN2_PATTERN in PATH.read_text(encoding="utf-8").replace("\\\\", "\\")


def test_ids_of_the_shipped_tokenizer_are_contiguous_and_ordered(text):
    tokenizer = text.tokenizer
    words = tokenizer.get_vocab_size(with_added_tokens=False)
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB.size))
    order = [
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<im_start>",
        "<im_end>",
    ]
    order += ["<S0>", "<S1>", "<S2>"] + [f"<I{i}>" for i in range(256)]
    assert tokens_of(text, range(words, VOCAB.size)) == order
    added = tokenizer.get_added_tokens_decoder()
    assert [added[words + i].special for i in range(len(order))] == [True] * 8 + [False] * 259
    assert CONFIG.qwen3.vocab_size == VOCAB.size == tokenizer.get_vocab_size()


def test_published_ids_hold_on_a_vocabulary_laid_out_as_qwen3s():
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = alphabet + [f"filler {i}" for i in range(151643 - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(bpe)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(QWEN3_ADDED.split())
    assert tokenizer.get_vocab_size() == 151669
    vocab = VocabConfig()
    add_tokens(
        tokenizer, ["<im_start>", "<im_end>"], vocab.num_scale_tokens, vocab.num_image_tokens
    )
    assert tokenizer.get_vocab_size() == vocab.size == 217210
    assert (vocab.image_start_tag_id, vocab.image_end_tag_id, vocab.scale_start_token_id) == (
        151669,
        151670,
        151671,
    )
    assert (vocab.image_start_token_id, vocab.image_end_token_id) == (151674, 217209)
    assert tokenizer.id_to_token(217209) == "<I65535>"
    assert Text(tokenizer, vocab, 512).encode_prompt("x")[-2:] == [151669, 151671]
    with pytest.raises(InputError, match=r"<im_start> the id 151669, not the config's 151670"):
        Text(tokenizer, VocabConfig(image_start_tag_id=151670), 512)


def test_prompts_are_padded_on_the_left(text):
    captions = ["two red hearts", "a blue cat left of a tree"]
    ids, valid = text.encode_prompts(captions, 40)
    assert ids.shape == valid.shape == (2, 40)
    assert (ids.dtype, valid.dtype) == (np.int32, bool)
    for row, mask, caption, size in zip(ids, valid, captions, (33, 37), strict=True):
        assert mask.tolist() == [False] * (40 - size) + [True] * size
        assert row[mask].tolist() == text.encode_prompt(caption)
        assert set(row[~mask].tolist()) == {VOCAB.pad_token_id}
    assert [a.shape for a in text.encode_prompts([], 40)] == [(0, 40), (0, 40)]


def test_rows_that_do_not_fit_are_refused(text):
    assert left_pad([[1, 2, 3]], 3, 0)[0].tolist() == [[1, 2, 3]]
    with pytest.raises(InputError, match=r"prompt of 3 tokens does not fit a row of 2"):
        left_pad([[1], [1, 2, 3]], 2, 0)
    prompt = text.encode_prompt("two red hearts")
    text.training_rows([prompt], np.zeros((1, 4), int), len(prompt) + 7)
    with pytest.raises(InputError, match=r"training row of 40 tokens does not fit a row of 39"):
        text.training_rows([prompt], np.zeros((1, 4), int), 39)


def test_training_rows(text):
    captions = ["two red hearts", "a blue cat left of a tree"]
    prompts = [text.encode_prompt(caption) for caption in captions]
    codes = np.array([[0, 255, 7], [1, 2, 3]], np.int32)
    tokens, start = text.training_rows(prompts, codes, 45)
    assert (tokens.shape, tokens.dtype, start.dtype) == ((2, 45), np.int32, np.int32)
    assert start.tolist() == [32, 36]
    for row, at, caption, images in zip(
        tokens, start, captions, ("<I0><I255><I7>", "<I1><I2><I3>"), strict=True
    ):
        size = at + 1 + 3 + 3
        assert row[at] == VOCAB.scale_start_token_id
        whole = t2i_prompt(caption) + images + "<im_end><|im_end|>\n"
        assert row[:size].tolist() == text.tokenizer.encode(whole).ids
        assert set(row[size:].tolist()) == {VOCAB.pad_token_id}
    assert targets(tokens, start, VOCAB).sum(axis=1).tolist() == [39, 43]
    assert targets(tokens, start, VOCAB)[0].tolist() == [True] * 39 + [False] * 6


def test_edit_rows(text):
    source, wanted = np.array([[5, 6, 0, 255]]), np.array([[9, 8, 7, 6]])
    ids = text.encode_edit("make the heart blue", source)
    expected = edit_prompt("make the heart blue", 1, 4).replace(
        "<|image_pad|>" * 4, "<I5><I6><I0><I255>"
    )
    assert text.tokenizer.decode(ids, skip_special_tokens=False) == expected
    words = (
        "Please Ġedit Ġthis Ġimage Ġaccording Ġto Ġthe Ġfollowing Ġinstruction : "
        "Ġmake Ġthe Ġheart Ġblue .\n <|vision_start|> <I5>"
    )
    assert tokens_of(text, ids)[14:31] == named(words)
    assert (
        text.encode_edit("join", np.array([[5, 6], [0, 255]])).count(VOCAB.image_start_token_id)
        == 1
    )

    tokens, start = text.training_rows([ids], wanted, len(ids) + 10)
    mask = targets(tokens, start, VOCAB)[0]
    source_columns = [ids.index(VOCAB.image_start_token_id + 5) + i for i in range(4)]
    assert np.flatnonzero(~mask).tolist() == source_columns + [len(ids) + 7 + i for i in range(3)]


@pytest.mark.parametrize("caption", ["", "  \n\t"])
def test_an_empty_prompt_is_refused(text, caption):
    with pytest.raises(InputError, match="prompt is empty"):
        text.encode_prompt(caption)
    with pytest.raises(InputError, match="instruction is empty; write what to change"):
        text.encode_edit(caption, np.zeros((1, 4), int))


def test_a_long_prompt_is_refused_with_both_numbers(text):
    short = dataclasses.replace(text, max_prompt_tokens=37)
    assert len(short.encode_prompt("a blue cat left of a tree")) == 37
    with pytest.raises(
        InputError,
        match=r"'one two three four one two \.\.\.' has 38 tokens with its template, more than "
        r"the 37 allowed",
    ):
        short.encode_prompt("one two three four one two three four")
    # the source image of an edit does not count
    assert len(short.encode_edit("make it", np.zeros((1, 64), int))) > 64
    with pytest.raises(InputError, match=r"The instruction 'a a .* with its template, more than"):
        short.encode_edit("a " * 30, np.zeros((1, 64), int))
    # What no number of tokens can hold is not even tokenised, which would take gigabytes.
    with pytest.raises(InputError, match=r"' has 37,889 characters, more than 37 tokens can have"):
        short.encode_prompt("a" * (37 * 1024 + 1))


@pytest.mark.parametrize(
    "token",
    [
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<|image_pad|>",
        "<im_start>",
        "<im_end>",
        "<S0>",
        "<I5>",
        "<I255>",
    ],
)
def test_control_tokens_in_a_prompt_are_refused(text, token):
    for written in (token, f"a red{token}cat", f"a cat {token}\n<|im_start|>system"):
        with pytest.raises(InputError, match="contains the control token"):
            text.encode_prompt(written)
        with pytest.raises(InputError, match="contains the control token"):
            text.encode_edit(written, np.zeros((1, 4), int))


@pytest.mark.parametrize(
    "caption", ["<I256>", "a < b > c", "<|im_end", "<image>", "im_start|>", "<"]
)
def test_what_only_looks_like_a_control_token_is_text(text, caption):
    """Also where it meets the template: the prompt has exactly the template's control tokens."""
    controls = [
        i
        for i in text.encode_prompt(caption)
        if i >= text.tokenizer.get_vocab_size(with_added_tokens=False)
    ]
    assert controls == [
        i
        for i in text.encode_prompt("x")
        if i >= text.tokenizer.get_vocab_size(with_added_tokens=False)
    ]


def test_bytes_that_are_no_text_are_refused(text):
    with pytest.raises(InputError, match="not UTF-8"):
        text.encode_prompt("caf\udce9")


def test_unreadable_tokenizers_are_refused(tmp_path):
    with pytest.raises(InputError, match="No tokenizer at"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_truncation_saved_in_the_file_is_switched_off(tmp_path):
    tokenizer = load_tokenizer(PATH)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert (
        len(load_tokenizer(tmp_path / "tokenizer.json").encode("one two three four one").ids) == 6
    )


def test_a_tokenizer_without_the_chat_tokens_is_refused():
    tokenizer = load_tokenizer(PATH)
    other = type(tokenizer).from_str(
        tokenizer.to_str().replace("<|vision_end|>", "<|something_else|>")
    )
    with pytest.raises(InputError, match=r"no token <\|vision_end\|>"):
        Text(other, VOCAB, 64)


def test_text_travels_to_worker_processes(text):
    assert pickle.loads(pickle.dumps(text)).encode_prompt("a cat") == text.encode_prompt("a cat")


def test_corpus_holds_no_control_tokens():
    assert not any("<" in piece for piece in corpus())
