"""A training run as frozen dataclasses, checked when they are built."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from blip3o_jax.config import Blip3oConfig, replace
from blip3o_jax.data.config import DataConfig
from blip3o_jax.errors import InputError, check_seed, multiples, nearest, require
from blip3o_jax.models.blip3o import EDITING_PARTS, PARTS, parts_of
from blip3o_jax.presets import preset
from blip3o_jax.train.sections import (
    HALVES,
    TEACHERS,
    AutoencoderConfig,
    DistillConfig,
    GrpoConfig,
    GuardConfig,
    JointConfig,
    OptimizerConfig,
    PretrainArConfig,
    ProfileConfig,
    TokenizerConfig,
)
from blip3o_jax.train.stages import EDITS, MIXTURE, PROMPTS, STAGES, WORLD, Stage

COUNTS = (
    *("batch_size", "accumulate", "num_steps", "log_every", "eval_every"),
    *("checkpoint_every", "keep_checkpoints"),
)
CHOICES = {"dtype": ("auto", "float32", "bfloat16"), "remat": ("none", "full", "dots")}
CACHE_WITHOUT_FEATURES = (
    "A model with use_tar_siglip_features reads the features of source images, and data.cache "
    "holds none; train without a cache."
)


@dataclass(frozen=True)
class TrainConfig:
    """One run: the keys of every stage, and in a section of its own those of its stage.

    `init` says where parts come from: {"dc_ae": CHECKPOINT}, or one checkpoint for all (a workdir
    is its newest one, WORKDIR@STEP that of a step); the others start at random.
    """

    stage: str
    preset: str = "emoji_64"
    model: dict = field(default_factory=dict)  # changes to the preset, e.g. {"sana.num_layers": 8}
    seed: int = 0
    batch_size: int = 16  # of a step, over all hosts
    accumulate: int = 1  # micro-batches that a step's batch is computed in
    num_steps: int = 1000
    frozen_parts: tuple[str, ...] = ()  # parts that the stage would train and this run does not
    init: dict | str = field(default_factory=dict)
    # sizes of data, fsdp, tensor, and dcn, the number of slices (parallel.mesh)
    mesh: dict = field(default_factory=dict)
    # the TPUs that mesh and remat are chosen for, e.g. "v5e:16x16" (`blip3o-jax plan`)
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
    # of the run's stage; None for the others
    autoencoder: AutoencoderConfig | None = None
    tokenizer: TokenizerConfig | None = None
    pretrain_ar: PretrainArConfig | None = None
    joint: JointConfig | None = None
    distill: DistillConfig | None = None
    grpo: GrpoConfig | None = None

    def __post_init__(self):
        check_seed(self.seed, "seed")
        for name in COUNTS:
            require(getattr(self, name) >= 1, f"{name} is at least 1, not {getattr(self, name)}.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
            require(value in choices, f"{name} is {listed}, not {value!r}.")
        stage, warmup, steps = self.stage, self.optimizer.warmup_steps, self.num_steps
        require(stage in STAGES, f"Unknown stage {stage!r}; {nearest(stage, STAGES)}")
        self._take_section()
        updates = min(map(self.updates_of, self.groups or [""]))
        sentence = f"grpo.phase_steps leaves the diffusion part none of the {steps} num_steps."
        require(updates > 0, sentence)
        most = f"num_steps {steps}"
        if updates != steps:
            most = f"the {updates} updates that {most} gives"
        require(warmup < updates, f"optimizer.warmup_steps {warmup} must be below {most}.")
        if isinstance(self.init, str):
            parts = self.record.parts + self.record.teachers(self.section)
            object.__setattr__(self, "init", dict.fromkeys(parts, self.init))
        self._check_data()
        self._check_parts()
        self._check_batch()

    def _take_section(self) -> None:
        """Gives the run its stage's section, and refuses another stage's."""
        if self.section is None:
            object.__setattr__(self, self.stage, self.record.section())
        for name in STAGES:
            section = getattr(self, name)
            if name != self.stage and section is not None:
                key = ".".join([name, *changed_fields(section)[:1]])
                raise InputError(f"{key} has no effect in stage {self.stage!r}; leave it out.")

    def _check_data(self) -> None:
        """Refuses a field of `data` that the run does not read."""
        read, sources = self.record.data, bool(self.data.sources)
        for name in changed_fields(self.data):
            where = f"data.{name} has no effect"
            require(name in read, f"{where} in stage {self.stage!r}; leave it out.")
            beside = "beside" if sources else "without"
            unread = (*WORLD, *EDITS) if sources else MIXTURE
            require(name not in unread, f"{where} {beside} data.sources; leave it out.")
            is_drawn = not self.data.prompts or name not in (*PROMPTS, "text_fraction", "edits")
            require(is_drawn, f"{where} beside data.prompts; leave it out.")
        for name in ("inverted_edits", "composed_edits"):
            has_effect = self.data.edits > 0 or not getattr(self.data, name)
            require(has_effect, f"data.{name} has no effect without data.edits; leave it out.")
        teacher = self.tokenizer and self.tokenizer.teacher
        sentence = "data.sources have no words for their patches; tokenizer.teacher is 'latents'"
        require(not sources or teacher != "words", f"{sentence} or 'encoder' with them.")
        sentence = f"Stage {self.stage!r} trains on data.exercises; name at least one."
        require("exercises" not in read or bool(self.data.exercises), sentence)
        sentence = "data.cache holds each image's likeliest codes"
        contradicts = self.data.cache and self.joint and self.joint.stochastic_codes
        require(not contradicts, f"{sentence}, so joint.stochastic_codes must be false.")
        contradicts = self.data.cache and self.blip3o().use_tar_siglip_features
        require(not contradicts, CACHE_WITHOUT_FEATURES)

    def _check_parts(self) -> None:
        """Refuses what names a part that the run does not hold or does not train."""
        stage, parts, trained = self.stage, self.parts, self.trained_parts
        listed = ", ".join(parts)
        # A teacher that is random teaches nothing.
        teacher = self.tokenizer.teacher if self.tokenizer else "words"
        there = not TEACHERS[teacher] or TEACHERS[teacher] in self.init
        sentence = f"tokenizer.teacher {teacher!r} is that of a checkpoint"
        require(there, f"{sentence}; name it as init.{TEACHERS[teacher]}.")
        # Parts that are loaded, frozen, or have a rate of their own.
        for part in self.init:
            sentence = f"init names {part!r}, which stage {stage!r} does not use; its parts: "
            require(part in parts, f"{sentence}{listed}.")
        for part in self.frozen_parts:
            sentence = f"frozen_parts: stage {stage!r} has no part {part!r}; "
            require(part in parts, sentence + nearest(part, parts))
        frozen = ", ".join(self.frozen_parts)
        is_left = all(set(parts) & set(trained) for parts in self.groups.values())
        require(bool(trained) and is_left, f"frozen_parts {frozen}: nothing is left to train.")
        for part, factor in self.optimizer.part_learning_rates.items():
            sentence = f"optimizer.part_learning_rates: {part!r} is not trained; "
            require(part in trained, sentence + nearest(part, trained))
            is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
            sentence = f"optimizer.part_learning_rates are factors above 0, not {factor!r} ({part})"
            require(is_number and 0 < factor < math.inf, f"{sentence}; frozen_parts freezes.")
        self._check_few_steps()
        has_effect = self.remat == "none" or "qwen3" in parts
        require(has_effect, f"remat has no effect in stage {stage!r}; leave it out.")

    def _check_few_steps(self) -> None:
        """A model of few steps is trained by its own stage, which trains no other."""
        few, stage = bool(self.blip3o().sana.few_steps), self.stage
        sentence = "Stage 'distill' trains a model of few steps; say how many by"
        require(few or stage != "distill", f"{sentence} --config.model.sana.few_steps=4.")
        others = few and stage != "distill" and "sana" in self.trained_parts
        sentence = f"Stage {stage!r} would train velocities of a model of few steps, and not its"
        require(not others, f"{sentence} mean ones; train before stage 'distill', or freeze sana.")
        scale = self.grpo.guidance_scale if self.grpo and few else None
        sentence = "grpo.guidance_scale of a model of few steps is from 1 on, or null"
        require(scale is None or scale >= 1, f"{sentence}, not {scale}.")

    def _check_batch(self) -> None:
        """Refuses a batch that does not divide."""
        size, pieces = self.batch_size, self.accumulate
        if self.grpo:
            group = self.grpo.num_generations
            sentence = f"batch_size {size} is no multiple of grpo.num_generations {group}"
            require(size % group == 0, f"{sentence}; {multiples(size, group)}")
            is_whole = pieces == 1 or self.grpo.top_entropy_quantile == 1
            sentence = "grpo.top_entropy_quantile compares the tokens of the whole batch"
            require(is_whole, f"{sentence}; set accumulate to 1.")
        counts = {"accumulate": pieces} | ({"grpo.pieces": self.grpo.pieces} if self.grpo else {})
        for name, count in counts.items():
            sentence = f"batch_size {size} does not divide by {name} {count}; "
            require(size % count == 0, sentence + multiples(size, count))

    @property
    def record(self) -> Stage:
        """All that depends on the stage."""
        return STAGES[self.stage]

    @property
    def section(self) -> Any:
        """The keys of the stage."""
        return getattr(self, self.stage)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """{name: parts} that are updated apart from the others, with moments and a guard of their
        own; {} where all are updated together."""
        halves = self.grpo.halves if self.grpo else ()
        return {half: HALVES[half] for half in halves} if len(halves) > 1 else {}

    def updates_of(self, group: str = "") -> int:
        """Updates in `num_steps` steps, of one of the groups or, where there are none, of all."""
        if self.grpo is None:
            return self.num_steps
        now = range(1, self.num_steps + 1)
        steps = sum(not group or group in self.grpo.halves_at(step) for step in now)
        return steps * self.grpo.num_iterations

    def blip3o(self) -> Blip3oConfig:
        """The model's config: the preset with the run's changes."""
        return replace(preset(self.preset), **self.model)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that a run holds: its stage's, and besides its teachers, or those that an
        editing model has."""
        whole = set(PARTS) <= set(self.record.parts)
        besides = self._editing_parts if whole else self.record.teachers(self.section)
        return (*self.record.parts, *besides)

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts of which something is trained."""
        trained = self.record.trained(self.section) + (
            self._editing_parts if self.stage in ("joint", "distill") else ()
        )
        return tuple(part for part in trained if part not in self.frozen_parts)

    @property
    def _editing_parts(self) -> tuple[str, ...]:
        return tuple(part for part in parts_of(self.blip3o()) if part in EDITING_PARTS)

    def trainable(self, path: str) -> bool:
        """Whether the parameter at "part/.../leaf" is trained in this run."""
        part = path.split("/")[0]
        trains = self.record.trainable(self.blip3o(), self.section, path)
        return part in self.trained_parts and trains


def changed_fields(section: Any) -> list[str]:
    """Names of the fields that do not have their default."""
    default = type(section)()
    names = [f.name for f in dataclasses.fields(section)]
    return [name for name in names if getattr(section, name) != getattr(default, name)]
