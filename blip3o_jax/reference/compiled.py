"""Text to image and training with `torch.compile`: the strongest that PyTorch offers its users.

Compiled, each as one graph of fixed shapes: a token of the transformer, over transformers' static
cache, with its logits and the largest of them (and the prompt, a graph of its own); the connector;
SANA's velocity; the autoencoder both ways; TA-Tok's encoder; and in training the losses of all
trained parts, forwards and backwards. What is left to PyTorch's loops are the loop over tokens, the
Euler step, the clipping of gradients and the fused AdamW.

Weights are shared with the modules that are compiled, not copied. Inductor's own folder
(TORCHINDUCTOR_CACHE_DIR) keeps what is compiled.
"""

import copy
import functools
import itertools
from collections.abc import Callable

import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from transformers import StaticCache

from blip3o_jax.errors import InputError
from blip3o_jax.reference.modules import Reference
from blip3o_jax.reference.pipeline import prompt_positions

compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)


def check_compiler() -> None:
    """InputError where inductor finds no C++ compiler."""
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as error:
        sentence = "--against torch compiles with a C++ compiler, which is not here; install g++"
        raise InputError(f"{sentence}, or name one in CXX.") from error


def compiled_reference(ref: Reference) -> Reference:
    """The same weights, whose networks are compiled when they are first called."""
    own = copy.copy(ref)
    # transformers hooks a vision model that was asked for all of its states, as the original asks,
    # and a hook that reads a context variable is more than torch.compile can trace.
    tensors = itertools.chain(ref.ta_tok.parameters(), ref.ta_tok.buffers())
    own.ta_tok = copy.deepcopy(ref.ta_tok, {id(tensor): tensor for tensor in tensors})
    for name in ("velocity", "encode", "decode", "codes"):
        setattr(own, name, compiled(getattr(own, name)))
    return own


def writer(ref: Reference) -> Callable:
    """`pipeline.greedy_tokens` of image logits alone, (prompt, valid) -> (codes, states)."""
    vocab, n = ref.config.vocab, ref.config.ta_tok.num_tokens
    first, last = vocab.image_start_token_id, vocab.image_start_token_id + vocab.num_image_tokens
    qwen3, model, head = ref.config.qwen3, ref.ar.model, ref.ar.lm_head.weight[first:last]

    @compiled
    def step(ids, mask, positions, cache):
        out = model(ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        state = out.last_hidden_state[:, -1]
        return state, (state @ head.T).argmax(dim=-1)

    def write(prompt: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache = StaticCache(ref.ar.config, max_cache_len=prompt.shape[1] + n)
        heads = qwen3.num_key_value_heads, qwen3.head_dim
        cache.early_initialization(len(prompt), *heads, torch.float32, "cpu")
        # The mask of all that will be there; what is not there yet comes after each query.
        mask, lengths = torch.nn.functional.pad(valid.long(), (0, n), value=1), valid.sum(dim=1)
        state, code = step(prompt, mask, prompt_positions(valid), cache)
        states, codes = [state], []
        for i in range(n):
            codes.append(code)
            state, code = step((first + code)[:, None], mask, (lengths + i)[:, None], cache)
            states.append(state)
        return torch.stack(codes, dim=1), torch.stack(states, dim=1)

    return write
