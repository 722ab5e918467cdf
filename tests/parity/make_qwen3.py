"""Reference values of transformers' Qwen3ForCausalLM at a tiny size: run this file to write
tests/fixtures/qwen3.npz."""

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

FIELDS = {  # transformers' defaults are no Qwen3 that we know, so none is left to them
    "vocab_size": 72,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 0.01,  # large enough to matter
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
IMAGE_IDS = range(35, 67)  # five ids follow
NUM_TOKENS = 6
LENGTHS = (10, 7, 4)


def _randomise(model, generator):
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        values = (
            values * 1.5 * parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 1 + 0.3 * values
        )
        parameter.data.copy_(values)


def _forward(model, tokens, mask):
    output = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    return output.hidden_states[-1], output.logits


@torch.no_grad()
def make() -> dict[str, np.ndarray]:
    """Tied weights by torch name, `lm_head.weight` of an untied twin, hidden states and logits with
    either padding, greedy image tokens."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **FIELDS)).eval()
    _randomise(model, generator)
    weights = {
        name: value for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    head = (
        torch.randn(FIELDS["vocab_size"], FIELDS["hidden_size"], generator=generator)
        * FIELDS["hidden_size"] ** -0.5
    )
    untied = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=False, **FIELDS)).eval()
    untied.load_state_dict({**weights, "lm_head.weight": head})

    rows = [torch.randint(1, 35, (length,), generator=generator) for length in LENGTHS]
    values = {"lm_head.weight": head}
    for side in ("left", "right"):
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        mask = (tokens != 0).long()
        hidden, logits = _forward(model, tokens, mask)
        values |= {
            f"{side}/tokens": tokens.int(),
            f"{side}/valid": mask.bool(),
            f"{side}/hidden": hidden,
            f"{side}/logits": logits,
        }
        values[f"{side}/untied_logits"] = _forward(untied, tokens, mask)[1]

    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = (tokens != 0).long()
    written = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        prefix_allowed_tokens_fn=lambda row, ids: list(IMAGE_IDS),
    )
    mask = torch.cat([mask, torch.ones(len(rows), NUM_TOKENS, dtype=mask.dtype)], dim=1)
    first = tokens.shape[1]
    values["greedy/tokens"] = written[:, first:].int() - IMAGE_IDS.start
    values["greedy/hidden"] = _forward(model, written, mask)[0][:, first - 1 :]
    values |= {f"weights/{name}": value for name, value in weights.items()}
    return {name: value.contiguous().numpy() for name, value in values.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parents[1] / "fixtures" / "qwen3.npz", **make())
