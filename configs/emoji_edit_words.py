"""Stage 8 of the embedded model: the transformer alone learns edits, and keeps learning pictures.

    blip3o-jax train --config emoji_edit_words --workdir runs/edit_words

`emoji_edit` starts from its weights.
"""

from emoji_picture import get_config as picture
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = picture()
    # Rows as long as an edit may be.
    data = {"exercises": {"picture": 0.2, "edit": 0.8}, "row_length": 195}
    changes = {
        "seed": 4,
        "num_steps": 1400,
        "init": {"qwen3": "emoji_64"},
        "data": {**config.data, **data, "weights": {**config.data.weights, "counting": 1.5}},
        "optimizer": {**config.optimizer, "final_learning_rate": 1e-4, "warmup_steps": 50},
    }
    return ConfigDict({**config, **changes})
