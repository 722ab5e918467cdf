"""A training run as frozen dataclasses, built and checked from the ml_collections of a config file
before anything else happens."""

import dataclasses
import math
import typing
from dataclasses import dataclass, field

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.data.config import DataConfig
from blip3o_jax.errors import InputError, multiples, nearest
from blip3o_jax.presets import preset

# The parts that a stage's run holds, trained or not.
WHOLE = ("qwen3", "diffusion_connector", "sana", "ta_tok", "dc_ae")
PARTS = {
    "autoencoder": ("dc_ae",),
    "tokenizer": ("ta_tok",),
    "practice": ("qwen3",),
    "joint": WHOLE,
    "grpo": WHOLE,
}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine to a floor, clipping by global norm and an average of the weights
    (docs/model.md §6.2)."""

    learning_rate: float = 5e-5
    final_learning_rate: float = 1e-5
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # 0 turns clipping off
    ema_decay: float = 0.0  # 0 turns the average off
    # part -> factor of its learning rate, e.g. {"sana": 0.1}
    part_learning_rates: dict = field(default_factory=dict)


@dataclass(frozen=True)
class GuardConfig:
    """A step whose loss or gradient is not finite, or whose gradient is a spike, changes nothing
    and is counted (train.guard)."""

    # gradient norm in units of its running average; 0 lets every finite one through
    spike: float = 0.0
    max_skipped: int = 10  # in a row; then the run stops


@dataclass(frozen=True)
class ProfileConfig:
    """The steps that `jax.profiler` watches, `steps` of them from `start` on; written to
    WORKDIR/profile."""

    start: int = 10
    steps: int = 0  # 0 turns it off


@dataclass(frozen=True)
class LossConfig:
    """What each stage's loss may vary; fields of other stages are ignored by a stage that has no
    use for them."""

    # joint: whole samples whose condition is zeroed before the connector
    condition_dropout: float = 0.1
    flow_weight: float = 1.0  # joint: weight of the velocity loss against the cross-entropy's 1
    # joint: condition on the row's last positions, as the PyTorch code does (§6.6 no. 1)
    last_slice: bool = False
    # joint: sample the tokenizer's codes, as the PyTorch code does (§6.6 no. 2)
    stochastic_codes: bool = False
    ce_chunk: int = 0  # joint: rows of logits held at once, 0 for all
    latent_noise: float = 0.0  # autoencoder: noise on latents, in units of their standard deviation


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimisation (docs/model.md §7): `batch_size` pictures an update,
    `num_generations` of each prompt."""

    num_generations: int = 16
    temperature: float = 1.0
    num_inference_steps: int = 30
    guidance_scale: float | None = 2.0  # None: rendered without guidance, at half the cost
    # weight of the divergence from the starting policy; 0 saves its forward pass
    beta: float = 0.001
    epsilon: float = 0.2
    # share of the strict verdict in the reward; the rest is GenEval's dense score
    strict: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    `init` names where parts come from: {"dc_ae": DIR} with a published or a training-run directory;
    others start at random.
    """

    stage: str
    preset: str = "emoji_64"
    model: dict = field(default_factory=dict)  # changes to the preset, e.g. {"sana.num_layers": 8}
    seed: int = 0
    batch_size: int = 16  # of a step, over all hosts
    accumulate: int = 1  # micro-batches that a step's batch is computed in, one after the other
    num_steps: int = 1000
    # or "all": a diffusion transformer without pretrained weights (§6.1)
    trainable_sana: str = "captions"
    frozen_parts: tuple[str, ...] = ()  # parts that the stage would train and this run does not
    init: dict = field(default_factory=dict)
    named_tokens: bool = (
        # practice: image tokens of a fresh transformer start as the words that name them (the
        # embedded world's codes)
        False
    )
    # sizes of data, fsdp, tensor, and dcn, the number of slices; see mesh.make_mesh
    mesh: dict = field(default_factory=dict)
    # the TPUs that mesh and remat are chosen for, e.g. "v5e:16x16": what `blip3o-jax plan` compiles
    # for
    topology: str = ""
    dtype: str = "auto"  # compute: bfloat16 on accelerators, float32 on CPU
    remat: str = "none"
    log_every: int = 50
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)

    def __post_init__(self):
        for name in (
            "batch_size",
            "accumulate",
            "num_steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, not {getattr(self, name)}.")
        checks = (
            (self.stage in PARTS, f"Unknown stage {self.stage!r}; {nearest(self.stage, PARTS)}"),
            (
                self.trainable_sana in ("captions", "all"),
                f"trainable_sana is 'captions' or 'all', not {self.trainable_sana!r}.",
            ),
            (
                self.dtype in ("auto", "float32", "bfloat16"),
                f"dtype is auto, float32 or bfloat16, not {self.dtype!r}.",
            ),
            (
                self.remat in ("none", "full", "dots"),
                f"remat is none, full or dots, not {self.remat!r}.",
            ),
            (
                not self.named_tokens or self.stage == "practice",
                "named_tokens belongs to the practice stage, where a transformer starts.",
            ),
            (
                bool(self.data.exercises) == (self.stage == "practice"),
                "data.exercises are what the practice stage trains on, and no other stage does.",
            ),
            (
                not self.data.sources or self.stage == "joint",
                f"data.sources are images with captions, which stage {self.stage!r} does "
                "not read; leave them empty.",
            ),
            (
                not self.data.cache or not self.loss.stochastic_codes,
                "data.cache holds each image's likeliest codes, so loss.stochastic_codes "
                "must be false.",
            ),
            (
                self.optimizer.warmup_steps < self.num_steps,
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} must be below "
                f"num_steps {self.num_steps}.",
            ),
            (
                0 <= self.loss.condition_dropout < 1,
                f"loss.condition_dropout is in [0, 1), not {self.loss.condition_dropout}.",
            ),
            (
                self.stage != "grpo"
                or (
                    self.grpo.num_generations > 1
                    and self.batch_size % self.grpo.num_generations == 0
                ),
                f"batch_size {self.batch_size} is no multiple of grpo.num_generations "
                f"{self.grpo.num_generations}, 2 or more.",
            ),
            (0 <= self.grpo.strict <= 1, f"grpo.strict is in [0, 1], not {self.grpo.strict}."),
            (self.grpo.beta >= 0, f"grpo.beta is at least 0, not {self.grpo.beta}."),
            (
                self.grpo.temperature > 0,
                f"grpo.temperature is above 0, not {self.grpo.temperature}.",
            ),
            (
                self.stage != "grpo" or self.accumulate == 1,
                f"accumulate is 1 in stage 'grpo', not {self.accumulate}: its rollouts are "
                "drawn at once anyway.",
            ),
            (
                self.batch_size % self.accumulate == 0,
                f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}; "
                + multiples(self.batch_size, self.accumulate),
            ),
            (
                self.guard.spike == 0 or self.guard.spike > 1,
                f"guard.spike is above 1, or 0 for none, not {self.guard.spike}.",
            ),
            (
                self.guard.max_skipped >= 1,
                f"guard.max_skipped is at least 1, not {self.guard.max_skipped}.",
            ),
            (
                self.profile.start >= 1 and self.profile.steps >= 0,
                "profile.start is at least 1 and profile.steps at least 0, not "
                f"{self.profile.start} and {self.profile.steps}.",
            ),
            (
                0 <= self.optimizer.ema_decay < 1,
                f"optimizer.ema_decay is in [0, 1), not {self.optimizer.ema_decay}.",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise InputError(message)
        for part, factor in self.optimizer.part_learning_rates.items():
            if part not in self.trained_parts:
                raise InputError(
                    f"optimizer.part_learning_rates: {part!r} is not trained; "
                    f"{nearest(part, self.trained_parts)}"
                )
            if (
                isinstance(factor, bool)
                or not isinstance(factor, int | float)
                or not 0 < factor < math.inf
            ):
                raise InputError(
                    f"optimizer.part_learning_rates are factors above 0, not {factor!r} "
                    f"({part}); frozen_parts freezes."
                )
        for part in self.frozen_parts:
            if part not in PARTS[self.stage]:
                raise InputError(
                    f"frozen_parts: stage {self.stage!r} has no part {part!r}; "
                    f"{nearest(part, PARTS[self.stage])}"
                )
        if not self.trained_parts:
            raise InputError(
                f"frozen_parts {', '.join(self.frozen_parts)}: nothing is left to train."
            )

    def blip3o(self) -> Blip3oConfig:
        """The model's config: the preset with the run's changes."""
        return replace(preset(self.preset), **self.model)

    @property
    def whole_model(self) -> bool:
        """Whether the run holds every part; its checkpoints can then generate."""
        return self.stage in ("joint", "grpo")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts of which something is trained."""
        kept = {
            "practice": ("qwen3",),
            "grpo": ("qwen3",),
            "joint": ("qwen3", "diffusion_connector", "sana"),
        }
        return tuple(
            part
            for part in kept.get(self.stage, PARTS[self.stage])
            if part not in self.frozen_parts
        )

    def trainable(self, path: str) -> bool:
        """Whether the parameter at "part/.../leaf" is trained in this run (§6.1)."""
        if path.split("/")[0] not in self.trained_parts:
            return False
        if self.stage == "tokenizer":
            return not path.endswith("regularizer/embedding")
        return not path.startswith("sana/") or self.trainable_sana == "all" or "caption" in path


def from_dict(cls, values, prefix: str = ""):
    """Builds a frozen dataclass from nested dicts; an unknown key or a value of a wrong type is a
    InputError naming it."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    built = {}
    for key, value in dict(values).items():
        if key not in fields:
            raise InputError(f"Unknown config key {prefix + key!r}; {nearest(key, fields)}")
        kind = types[key]
        if dataclasses.is_dataclass(kind):
            value = from_dict(kind, value, f"{prefix}{key}.")
        elif (
            kind in (float, float | None) and isinstance(value, int) and not isinstance(value, bool)
        ):
            value = float(value)
        elif value is None and type(None) in typing.get_args(kind):
            pass
        elif (
            kind == tuple[str, ...]
            and isinstance(value, list | tuple)
            and all(isinstance(v, str) for v in value)
        ):
            value = tuple(value)
        elif (
            typing.get_origin(kind) is tuple
            and isinstance(value, list | tuple)
            and all(isinstance(v, dict) for v in value)
        ):
            item = typing.get_args(kind)[0]
            value = tuple(from_dict(item, v, f"{prefix}{key}[{i}].") for i, v in enumerate(value))
        elif typing.get_origin(kind) is tuple:
            wanted = "names" if kind == tuple[str, ...] else "groups of keys"
            raise InputError(
                f"Config key {prefix + key!r} wants a list of {wanted}, not {value!r}."
            )
        elif kind is dict:
            value = dict(value)
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"Config key {prefix + key!r} wants {getattr(kind, '__name__', kind)}, not "
                f"{value!r}."
            )
        built[key] = value
    missing = [
        n
        for n, f in fields.items()
        if n not in built and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"Config key {prefix + missing[0]!r} is missing.")
    return cls(**built)
