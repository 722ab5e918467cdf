"""Sections of a run's config: those of every run, and one for each stage.

A run has the section of its own stage and no other, so that every key that is set has an effect.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from blip3o_jax.errors import nearest, require

# What a tokenizer may learn from -> the part of `init` that holds it.
TEACHERS = {"words": "", "latents": "dc_ae", "encoder": "ta_tok"}
# Fields of DiffusionRlConfig that only some methods read.
DIFFUSION_METHODS_OF = {
    **dict.fromkeys(("old_decay", "old_ramp"), ("ram", "nft")),
    **{"strength": ("ram",), "mix": ("nft",)},
    **dict.fromkeys(("sampler", "noise_level", "epsilon"), ("flow_grpo",)),
}
# What GRPO trains, each half with moments of its own.
HALVES = {"transformer": ("qwen3",), "diffusion": ("diffusion_connector", "sana")}
# Fields of GrpoConfig that only the transformer's update reads.
TRANSFORMER_FIELDS = ("beta", "epsilon", "epsilon_high", "loss_type", "importance_sampling_level")
TRANSFORMER_FIELDS += ("top_entropy_quantile", "full_vocabulary")
GRPO_CHOICES = {
    "train": (*HALVES, "alternating", "joint"),
    "loss_type": ("bnpo", "grpo", "dr_grpo", "dapo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine decay, clipping and averaged weights (docs/model.md §6.2)."""

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

    def __post_init__(self):
        names = (
            "learning_rate",
            "final_learning_rate",
            "warmup_steps",
            "weight_decay",
            "clip_norm",
        )
        ranges = {name: ("at least 0", getattr(self, name) >= 0) for name in names}
        for name in ("b1", "b2", "ema_decay"):
            ranges[name] = ("in [0, 1)", 0 <= getattr(self, name) < 1)
        _check_ranges("optimizer", self, ranges | {"eps": ("above 0", self.eps > 0)})
        rates = self.learning_rate, self.final_learning_rate
        sentence = f"optimizer.final_learning_rate {rates[1]} is above learning_rate {rates[0]}"
        require(rates[1] <= rates[0], f"{sentence}; lower it too.")


@dataclass(frozen=True)
class GuardConfig:
    """Steps that are skipped and counted: not finite, or a gradient spike (train.guard)."""

    spike: float = 0.0  # gradient norm over its running average; 0 accepts every finite one
    max_skipped: int = 10  # skipped steps in a row that stop the run

    def __post_init__(self):
        spike, longest = self.spike, self.max_skipped
        require(spike == 0 or spike > 1, f"guard.spike is above 1, or 0 for none, not {spike}.")
        require(longest >= 1, f"guard.max_skipped is at least 1, not {longest}.")


@dataclass(frozen=True)
class ProfileConfig:
    """The steps that `jax.profiler` records to WORKDIR/profile: `steps` of them, from `start`."""

    start: int = 10
    steps: int = 0  # 0 turns it off

    def __post_init__(self):
        require(self.start >= 1, f"profile.start is at least 1, not {self.start}.")
        require(self.steps >= 0, f"profile.steps is at least 0, not {self.steps}.")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Reconstruction of images through the latents."""

    latent_noise: float = 0.0  # noise on latents, in units of their standard deviation

    def __post_init__(self):
        _check_ranges("autoencoder", self, {"latent_noise": ("at least 0", self.latent_noise >= 0)})


@dataclass(frozen=True)
class TokenizerConfig:
    """Codes that name what their patches show."""

    commitment: float = 0.25  # weight of SimVQ's commitment loss
    # what the decoder aims at: the "words" that name patches of the embedded world; or, of any
    # pictures, the autoencoder's "latents", or the states of the "encoder", which stays as it is
    teacher: str = "words"
    # weight of the entropy loss, without which a new encoder's tokens are soon all one code; TA-Tok
    # has 0, from an encoder that was trained
    entropy: float = 0.1

    def __post_init__(self):
        teacher = self.teacher
        has_effect = teacher != "words" or self.entropy == type(self).entropy
        require(has_effect, "tokenizer.entropy has no effect with words as teacher; leave it out.")
        sentence = f"Unknown tokenizer.teacher {teacher!r}; {nearest(teacher, TEACHERS)}"
        require(teacher in TEACHERS, sentence)
        names = ("commitment", "entropy")
        weights = {name: ("at least 0", getattr(self, name) >= 0) for name in names}
        _check_ranges("tokenizer", self, weights)


@dataclass(frozen=True)
class PretrainArConfig:
    """The transformer alone, on rows of tokens (data.exercises)."""

    # image tokens of a new transformer start as the words that name them (the embedded world's)
    named_tokens: bool = False
    ce_chunk: int = 0  # rows of logits in memory at once, 0 for all

    def __post_init__(self):
        _check_ranges("pretrain_ar", self, {"ce_chunk": ("at least 0", self.ce_chunk >= 0)})


@dataclass(frozen=True)
class JointConfig:
    """Cross-entropy of the transformer and velocity loss of the diffusion part."""

    # or "all": for a diffusion transformer without pretrained weights (docs/model.md §6.1)
    trainable_sana: str = "captions"
    condition_dropout: float = 0.1  # whole samples whose condition is zeroed before the connector
    source_dropout: float = 0.5  # of those, the share of edits that lose their source image too
    flow_weight: float = 1.0  # weight of the velocity loss; that of the cross-entropy is 1
    # as the PyTorch code: condition on the last positions of rows that are as long as the batch's
    # longest and padded with zeros; sample the tokenizer's codes (docs/model.md §6.6 no. 1 and 2)
    last_slice: bool = False
    stochastic_codes: bool = False
    ce_chunk: int = 0  # rows of logits in memory at once, 0 for all

    def __post_init__(self):
        sana = self.trainable_sana
        is_known = sana in ("captions", "all")
        require(is_known, f"joint.trainable_sana is 'captions' or 'all', not {sana!r}.")
        _check_ranges(
            "joint",
            self,
            {
                "condition_dropout": ("in [0, 1)", 0 <= self.condition_dropout < 1),
                "source_dropout": ("in [0, 1]", 0 <= self.source_dropout <= 1),
                "flow_weight": ("at least 0", self.flow_weight >= 0),
                "ce_chunk": ("at least 0", self.ce_chunk >= 0),
            },
        )


@dataclass(frozen=True)
class DistillConfig:
    """A diffusion part of few steps (train.distill)."""

    condition_dropout: float = 0.1  # whole samples without text and source
    instant_share: float = 0.5  # rows whose step has no length, which learn the velocity itself
    # of the normal numbers whose sigmoids are the step's levels
    level_mean: float = 0.0
    level_std: float = 1.5
    max_scale: float = 4.0  # of the guidance that it learns, from 1
    softness: float = 0.001  # the error [B] is divided by itself and this

    def __post_init__(self):
        _check_ranges(
            "distill",
            self,
            {
                "condition_dropout": ("in [0, 1)", 0 <= self.condition_dropout < 1),
                "instant_share": ("in [0, 1)", 0 <= self.instant_share < 1),
                "level_std": ("above 0", self.level_std > 0),
                "max_scale": ("above 1", self.max_scale > 1),
                "softness": ("above 0", self.softness > 0),
            },
        )


@dataclass(frozen=True)
class DiffusionRlConfig:
    """Reinforcement of the diffusion part (rl.diffusion, docs/model.md §7.5)."""

    method: str = "ram"
    num_train_timesteps: int = 4  # noise levels of each image that it is trained at
    beta: float = 0.0  # weight of the squared distance from the first velocity
    norm_penalty: float = 0.0  # weight of the velocity's norm beyond the first one's
    # of the policy that draws images, an average of past ones (ram, nft): after each step it keeps
    # old_ramp x steps of itself, at most old_decay; 0 is the present policy
    old_decay: float = 0.9
    old_ramp: float = 0.01
    strength: float = 1.0  # ram: how far a reward moves the velocity
    mix: float = 1.0  # nft: share of the trained velocity in the mixtures (its beta)
    sampler: str = "cps"  # flow_grpo: the stochastic steps (sample.stochastic)
    noise_level: float = 0.8  # flow_grpo
    epsilon: float = 1e-4  # flow_grpo: clipping range of the ratio
    max_kl: float | None = None  # a step with a larger squared distance stops the run

    def __post_init__(self):
        choices = {"method": ("ram", "nft", "flow_grpo"), "sampler": ("cps", "flow_grpo", "dance")}
        _check_choices("grpo.diffusion", self, choices)
        default = type(self)
        for name, methods in DIFFUSION_METHODS_OF.items():
            has_effect = self.method in methods or getattr(self, name) == getattr(default, name)
            sentence = f"grpo.diffusion.{name} has no effect on method {self.method!r}"
            require(has_effect, f"{sentence}; leave it out.")
        _check_ranges(
            "grpo.diffusion",
            self,
            {
                "num_train_timesteps": ("at least 1", self.num_train_timesteps >= 1),
                "beta": ("at least 0", self.beta >= 0),
                "norm_penalty": ("at least 0", self.norm_penalty >= 0),
                "old_decay": ("in [0, 1)", 0 <= self.old_decay < 1),
                "old_ramp": ("at least 0", self.old_ramp >= 0),
                "strength": ("above 0", self.strength > 0),
                "mix": ("in (0, 1]", 0 < self.mix <= 1),
                "noise_level": ("above 0", self.noise_level > 0),
                "epsilon": ("in (0, 1)", 0 < self.epsilon < 1),
                "max_kl": ("above 0", self.max_kl is None or self.max_kl > 0),
            },
        )

    @property
    def lagged(self) -> bool:
        """Whether an average of past policies draws the images; the state then holds it."""
        return self.method in DIFFUSION_METHODS_OF["old_decay"]


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimisation (docs/model.md §7): a step takes `batch_size` images,
    `num_generations` of each prompt. Names are those of TRL's GRPOConfig where it has them."""

    # the transformer, the diffusion part, one after the other, or both by the same images
    train: str = "transformer"
    phase_steps: int = 20  # alternating: steps before the other half's turn
    diffusion: DiffusionRlConfig | None = None  # of a run that trains the diffusion part
    decodes: int = 1  # renderings of the same tokens, whose mean reward the transformer is given
    pieces: int = 1  # that images are rendered in, each rewarded while the device is at the next
    num_generations: int = 16
    temperature: float = 1.0
    num_inference_steps: int = 30
    guidance_scale: float | None = 2.0  # None: rendered without guidance, at half the cost
    num_iterations: int = 1  # updates of a rollout
    beta: float = 0.001  # weight of the divergence from the first policy; 0 saves a forward pass
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: as epsilon
    loss_type: str = "bnpo"  # what the tokens' losses are divided by (rl.grpo)
    importance_sampling_level: str = "token"
    scale_rewards: str = "group"  # whose standard deviation advantages are measured in
    multi_objective_aggregation: str = "sum_then_normalize"  # or GDPO's order
    top_entropy_quantile: float = 1.0  # share of the tokens, the least certain ones, that are moved
    # probabilities among all tokens, as in the PyTorch code, not among the image's
    full_vocabulary: bool = False
    # reward (rl.rewards.protocol) -> its weight in the sum
    rewards: dict = field(default_factory=lambda: {"scenes": 1.0})
    watched: tuple[str, ...] = ()  # rewards that are logged beside them and teach nothing
    reward_timeout: float = 600.0  # seconds that a step waits for rewards, and for a server
    # groups that teach little more: their rewards' mean is above, and their deviation below
    saturated_mean: float | None = None  # None drops only groups without any spread
    saturated_std: float = 0.05
    max_kl: float | None = None  # a step of the transformer with a larger divergence stops the run

    def __post_init__(self):
        _check_choices("grpo", self, GRPO_CHOICES)
        self._check_halves()
        require(bool(self.rewards), "grpo.rewards names no reward.")
        for name, weight in self.rewards.items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            above_0 = is_number and 0 < weight < math.inf
            require(above_0, f"grpo.rewards are weights above 0, not {weight!r} ({name}).")
        _check_ranges(
            "grpo",
            self,
            {
                "num_generations": ("at least 2", self.num_generations >= 2),
                "num_inference_steps": ("at least 1", self.num_inference_steps >= 1),
                "guidance_scale": ("at least 0", (self.guidance_scale or 0) >= 0),
                "num_iterations": ("at least 1", self.num_iterations >= 1),
                "beta": ("at least 0", self.beta >= 0),
                "temperature": ("above 0", self.temperature > 0),
                "epsilon": ("in (0, 1)", 0 < self.epsilon < 1),
                "epsilon_high": ("above 0", self.epsilon_high is None or self.epsilon_high > 0),
                "top_entropy_quantile": ("in (0, 1]", 0 < self.top_entropy_quantile <= 1),
                "reward_timeout": ("above 0", self.reward_timeout > 0),
                "saturated_std": ("at least 0", self.saturated_std >= 0),
                "phase_steps": ("at least 1", self.phase_steps >= 1),
                "decodes": ("at least 1", self.decodes >= 1),
                "pieces": ("at least 1", self.pieces >= 1),
                "max_kl": ("above 0", self.max_kl is None or self.max_kl > 0),
            },
        )
        has_effect = self.multi_objective_aggregation == "sum_then_normalize"
        sentence = "grpo.scale_rewards has no effect on rewards that are normalised one by one"
        require(has_effect or self.scale_rewards == "group", f"{sentence}; leave it out.")

    def _check_halves(self) -> None:
        """Gives a run that trains the diffusion part its section; refuses what has no effect."""
        if "diffusion" in self.halves and self.diffusion is None:
            object.__setattr__(self, "diffusion", DiffusionRlConfig())
        unread = {
            "diffusion": self.diffusion is not None and "diffusion" not in self.halves,
            "phase_steps": self.phase_steps != type(self).phase_steps
            and self.train != "alternating",
            "decodes": self.decodes > 1 and self.train in ("diffusion", "joint"),
        }
        if "transformer" not in self.halves:
            default = type(self)
            unread |= {x: getattr(self, x) != getattr(default, x) for x in TRANSFORMER_FIELDS}
        for name, is_unread in unread.items():
            sentence = f"grpo.{name} has no effect where grpo.train is {self.train!r}"
            require(not is_unread, f"{sentence}; leave it out.")
        has_kl = self.beta > 0 and "transformer" in self.halves
        sentence = "grpo.max_kl bounds the transformer's divergence, which grpo.beta=0 leaves out"
        require(self.max_kl is None or has_kl, f"{sentence}; set beta, or diffusion.max_kl.")
        if self.diffusion is None:
            return
        # What a method needs of the sampler.
        method, steps = self.diffusion.method, self.num_inference_steps
        is_plain = method == "ram" or self.guidance_scale is None
        sentence = f"Method {method!r} trains the policy that draws, without guidance"
        require(is_plain, f"{sentence}: set grpo.guidance_scale to null.")
        levels = self.diffusion.num_train_timesteps
        sentence = f"grpo.diffusion.num_train_timesteps is {levels}: {method!r} has one less than"
        is_there = method == "ram" or levels < steps
        require(is_there, f"{sentence} grpo.num_inference_steps, {steps - 1}.")

    @property
    def halves(self) -> tuple[str, ...]:
        """Of HALVES, those that the run trains."""
        return (self.train,) if self.train in HALVES else tuple(HALVES)

    def halves_at(self, step: int) -> tuple[str, ...]:
        """Those that it trains in this step, counted from 1."""
        if self.train != "alternating":
            return self.halves
        return (self.halves[(step - 1) // self.phase_steps % 2],)


def _check_choices(section: str, values: Any, choices: dict[str, tuple[str, ...]]) -> None:
    """InputError for a value that is none of its field's choices."""
    for name, known in choices.items():
        value = getattr(values, name)
        require(value in known, f"Unknown {section}.{name} {value!r}; {nearest(value, known)}")


def _check_ranges(section: str, values: Any, ranges: dict[str, tuple[str, bool]]) -> None:
    """InputError for a value that does not hold to its range, given as (words, whether it does)."""
    for name, (limits, holds) in ranges.items():
        require(holds, f"{section}.{name} is {limits}, not {getattr(values, name)}.")
