"""A training run as frozen dataclasses, built and checked from the ml_collections of a config file before anything else happens."""

import dataclasses
import typing
from dataclasses import dataclass, field

from blip3o_jax import config as model_config
from blip3o_jax.config import ConfigError, nearest
from blip3o_jax.train.data_config import DataConfig

STAGES = ("autoencoder", "tokenizer", "practice", "joint", "grpo")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine to a floor, clipping by global norm and an average of the weights (spec S6.2)."""

    learning_rate: float = 5e-5
    final_learning_rate: float = 1e-5
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # 0 turns clipping off
    ema_decay: float = 0.0  # 0 turns the average off


@dataclass(frozen=True)
class LossConfig:
    """What each stage's loss may vary; fields of other stages are ignored by a stage that has no use for them."""

    condition_dropout: float = 0.1  # joint: whole samples whose condition is zeroed before the connector
    flow_weight: float = 1.0  # joint: weight of the velocity loss against the cross-entropy's 1
    last_slice: bool = False  # joint: condition on the row's last positions, as the PyTorch code does (S6.6 no. 1)
    stochastic_codes: bool = False  # joint: sample the tokenizer's codes, as the PyTorch code does (S6.6 no. 2)
    ce_chunk: int = 0  # joint: rows of logits held at once, 0 for all
    latent_noise: float = 0.0  # autoencoder: noise on latents, in units of their standard deviation


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimisation (spec S7): `batch_size` pictures an update, `num_generations` of each prompt."""

    num_generations: int = 16
    temperature: float = 1.0
    num_inference_steps: int = 30
    guidance_scale: float | None = 2.0  # None: rendered without guidance, at half the cost
    beta: float = 0.001  # weight of the divergence from the starting policy; 0 saves its forward pass
    epsilon: float = 0.2
    strict: float = 0.0  # share of the strict verdict in the reward; the rest is GenEval's dense score


@dataclass(frozen=True)
class TrainConfig:
    """One run. `init` names where parts come from: {"dc_ae": DIR} with a published or a training-run directory; others start at random."""

    stage: str
    preset: str = "emoji_64"
    model: dict = field(default_factory=dict)  # changes to the preset, e.g. {"sana.num_layers": 8}
    seed: int = 0
    batch_size: int = 16
    num_steps: int = 1000
    trainable_sana: str = "captions"  # or "all": a diffusion transformer without pretrained weights (S6.1)
    init: dict = field(default_factory=dict)
    named_tokens: bool = (
        False  # practice: image tokens of a fresh transformer start as the words that name them (the embedded world's codes)
    )
    mesh: dict = field(default_factory=dict)
    topology: str = ""  # the TPUs that mesh and remat are chosen for, e.g. "v5e:16x16": what `blip3o-jax plan` compiles for
    dtype: str = "auto"  # compute: bfloat16 on accelerators, float32 on CPU
    remat: str = "none"
    log_every: int = 50
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)

    def __post_init__(self):
        checks = (
            (self.stage in STAGES, f"Unknown stage {self.stage!r}; {nearest(self.stage, STAGES)}"),
            (self.trainable_sana in ("captions", "all"), f"trainable_sana is 'captions' or 'all', not {self.trainable_sana!r}."),
            (self.dtype in ("auto", "float32", "bfloat16"), f"dtype is auto, float32 or bfloat16, not {self.dtype!r}."),
            (self.remat in ("none", "full", "dots"), f"remat is none, full or dots, not {self.remat!r}."),
            (not self.named_tokens or self.stage == "practice", "named_tokens belongs to the practice stage, where a transformer starts."),
            (
                bool(self.data.exercises) == (self.stage == "practice"),
                "data.exercises are what the practice stage trains on, and no other stage does.",
            ),
            (
                not self.data.sources or self.stage == "joint",
                f"data.sources are images with captions, which stage {self.stage!r} does not read; leave them empty.",
            ),
            (
                not self.data.cache or not self.loss.stochastic_codes,
                "data.cache holds each image's likeliest codes, so loss.stochastic_codes must be false.",
            ),
            (
                self.optimizer.warmup_steps < self.num_steps,
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} must be below num_steps {self.num_steps}.",
            ),
            (0 <= self.loss.condition_dropout < 1, f"loss.condition_dropout is in [0, 1), not {self.loss.condition_dropout}."),
            (
                self.stage != "grpo" or (self.grpo.num_generations > 1 and self.batch_size % self.grpo.num_generations == 0),
                f"batch_size {self.batch_size} is no multiple of grpo.num_generations {self.grpo.num_generations}, 2 or more.",
            ),
            (0 <= self.grpo.strict <= 1, f"grpo.strict is in [0, 1], not {self.grpo.strict}."),
            (self.grpo.beta >= 0, f"grpo.beta is at least 0, not {self.grpo.beta}."),
            (self.grpo.temperature > 0, f"grpo.temperature is above 0, not {self.grpo.temperature}."),
            (0 <= self.optimizer.ema_decay < 1, f"optimizer.ema_decay is in [0, 1), not {self.optimizer.ema_decay}."),
        )
        for holds, message in checks:
            if not holds:
                raise ConfigError(message)
        for name in ("batch_size", "num_steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, not {getattr(self, name)}.")

    def blip3o(self) -> model_config.Blip3oConfig:
        """The model's config: the preset with the run's changes."""
        return model_config.replace(model_config.preset(self.preset), **self.model)

    @property
    def whole_model(self) -> bool:
        """Whether the run holds every part, so that its checkpoints can generate and be converted."""
        return self.stage in ("joint", "grpo")

    def trainable(self, path: str) -> bool:
        """Whether the parameter at "part/.../leaf" is trained in this stage (S6.1)."""
        part = path.split("/")[0]
        if self.stage == "autoencoder":
            return part == "dc_ae"
        if self.stage == "tokenizer":
            return part == "ta_tok" and not path.endswith("regularizer/embedding")
        if self.stage in ("practice", "grpo"):
            return part == "qwen3"
        if part == "sana":
            return self.trainable_sana == "all" or "caption" in path
        return part in ("qwen3", "diffusion_connector")


def from_dict(cls, values, prefix: str = ""):
    """Builds a frozen dataclass from nested dicts; an unknown key or a value of a wrong type is a ConfigError naming it."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    built = {}
    for key, value in dict(values).items():
        if key not in fields:
            raise ConfigError(f"Unknown config key {prefix + key!r}; {nearest(key, fields)}")
        kind = types[key]
        if dataclasses.is_dataclass(kind):
            value = from_dict(kind, value, f"{prefix}{key}.")
        elif kind in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif value is None and type(None) in typing.get_args(kind):
            pass
        elif typing.get_origin(kind) is tuple and isinstance(value, list | tuple) and all(isinstance(v, dict) for v in value):
            item = typing.get_args(kind)[0]
            value = tuple(from_dict(item, v, f"{prefix}{key}[{i}].") for i, v in enumerate(value))
        elif typing.get_origin(kind) is tuple:
            raise ConfigError(f"Config key {prefix + key!r} wants a list of groups of keys, not {value!r}.")
        elif kind is dict:
            value = dict(value)
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"Config key {prefix + key!r} wants {getattr(kind, '__name__', kind)}, not {value!r}.")
        built[key] = value
    missing = [n for n, f in fields.items() if n not in built and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"Config key {prefix + missing[0]!r} is missing.")
    return cls(**built)
