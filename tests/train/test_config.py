import dataclasses
import json
import re

import pytest
from flax.traverse_util import flatten_dict

from blip3o_jax.cli import main
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import REFERENCE_QUIRKS
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.resources import shipped_configs
from blip3o_jax.train.config import JointConfig, TrainConfig
from blip3o_jax.train.read_config import RENAMED_KEYS, from_dict, read_config, saved_config
from blip3o_jax.train.stages import STAGES
from blip3o_jax.train.workdir import open_workdir


def test_warmup_ends_before_the_updates_of_either_half():
    alternating = ["--config.grpo.train=alternating", "--config.grpo.phase_steps=10"]
    sentence = "warmup_steps 5 must be below the 2 updates that num_steps 12 gives"
    with pytest.raises(InputError, match=sentence):
        read_config("emoji_diffusion_rl", [*alternating, "--config.num_steps=12"])
    read_config("emoji_diffusion_rl", [*alternating, "--config.num_steps=16"])


@pytest.mark.parametrize("way", ["prompt", "tokens", "noise", "both", "features"])
def test_the_other_ways_of_a_source_differ_from_the_preset_in_nothing_else(way):
    cfg = read_config(f"emoji_edit:{way}", [])
    assert not cfg.blip3o().use_und_image_vae_as_channels
    latents = way in ("tokens", "noise", "both")
    assert cfg.blip3o().reads_source_latents == latents
    assert dataclasses.replace(cfg, model={}) == read_config("emoji_edit", [])
    with pytest.raises(InputError, match="no variant 'x', but channels, prompt, tokens"):
        read_config("emoji_edit:x", [])


@pytest.mark.parametrize("name", list(shipped_configs()))
def test_every_shipped_config_is_valid(name):
    cfg = read_config(name, [])
    assert cfg.blip3o().name == cfg.preset


def test_overrides_reach_nested_keys_and_the_model():
    overrides = [
        "--config.optimizer.learning_rate=0.5",
        "--config.model.sana.num_layers=2",
        "--config.init.dc_ae=some/where",
    ]
    cfg = read_config("emoji_joint", overrides)
    assert cfg.optimizer.learning_rate == 0.5
    assert cfg.blip3o().sana.num_layers == 2
    assert cfg.init["dc_ae"] == "some/where"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.optimizer.learning_rat=1"], "did you mean 'learning_rate'"),
        (["--config.bach_size=8"], "did you mean 'batch_size'"),
        (["--config.batch_size=many"], "wants int"),
        (["--config.optimizer.b1=Infinity"], "wants float, not inf"),
        (["--config.optimizer.b1=NaN"], "wants float, not nan"),
        ([f"--config.optimizer.b1={10**400}"], "wants float, not 1000"),
        (["--config.batch_size=0"], "at least 1"),
        (["--config.preset=emoji_46"], "did you mean 'emoji_64'"),
        (["--config.model.sana.num_layer=2"], "num_layers"),
        (["--config.stage=jiont"], "did you mean 'joint'"),
        (["--config.num_steps=40"], "warmup_steps 50 must be below num_steps 40"),
        (["--config.data.named_ground=2"], "named_ground is in"),
        (["--config.data.num_train=0"], "data.num_train is at least 1, not 0"),
        (["--config.stage=jiont", "--config.init.sana=x"], "did you mean 'joint'"),
        (["--config.stage=[1]"], r"Unknown stage '\[1\]'"),
        (["--config.optimizer.clip_norm=-1"], "optimizer.clip_norm is at least 0, not -1"),
        (["--config.optimizer.b2=1"], r"optimizer.b2 is in \[0, 1\), not 1"),
        (
            ["--config.optimizer.learning_rate=1e-7"],
            "final_learning_rate .* is above learning_rate",
        ),
        (["--config.optimizer.eps=0"], "optimizer.eps is above 0"),
        (["--config.joint.ce_chunk=-1"], "joint.ce_chunk is at least 0"),
        (["--config.joint.flow_weight=-1"], "joint.flow_weight is at least 0"),
    ],
)
def test_what_a_config_gets_wrong_is_named(overrides, message):
    with pytest.raises(InputError, match=message):
        read_config("emoji_joint", overrides).blip3o()


def test_missing_key_and_integer_for_float():
    with pytest.raises(InputError, match="'stage' is missing"):
        from_dict(TrainConfig, {})
    assert (
        from_dict(
            TrainConfig, {"stage": "joint", "optimizer": {"clip_norm": 1}}
        ).optimizer.clip_norm
        == 1.0
    )


@pytest.mark.parametrize(
    ("stage", "sana", "path", "trained"),
    [
        ("joint", "captions", "sana/caption_projection/linear_1/kernel", True),
        ("joint", "captions", "sana/caption_norm/scale", True),
        ("joint", "captions", "sana/transformer_blocks/attn2/to_k/kernel", False),
        ("joint", "all", "sana/transformer_blocks/attn2/to_k/kernel", True),
        ("joint", "all", "dc_ae/decoder/conv_in/kernel", False),
        ("joint", "all", "ta_tok/encode_task_layer/kernel", False),
        ("joint", "captions", "qwen3/embed_tokens/embedding", True),
        ("joint", "captions", "diffusion_connector/norm/scale", True),
        ("tokenizer", "captions", "ta_tok/bottleneck/regularizer/embedding", False),
        ("tokenizer", "captions", "ta_tok/bottleneck/regularizer/embedding_proj/kernel", True),
        ("autoencoder", "captions", "dc_ae/decoder/conv_in/kernel", True),
    ],
)
def test_what_each_stage_trains(stage, sana, path, trained):
    joint = JointConfig(trainable_sana=sana) if stage == "joint" else None
    assert TrainConfig(stage=stage, joint=joint).trainable(path) is trained


@pytest.mark.parametrize("beside", [True, False])
def test_an_edit_trains_the_ways_in_and_out_of_the_latents(beside):
    """docs/model.md §6.1 and the sizes of §2.4 and §2.6."""
    override = f"--config.model.use_und_image_vae_as_noise={str(beside).lower()}"
    cfg = read_config("edit_3b", [override])
    shapes = flatten_dict(Blip3o(cfg.blip3o()).abstract(cfg.parts), sep="/")
    counts = dict.fromkeys(cfg.parts, 0)
    for path, leaf in shapes.items():
        counts[path.split("/")[0]] += leaf.size * cfg.trainable(path)
    width, caption, channels = 2240, 2304, 32
    captions = (caption + 1) * width + (width + 1) * width + width  # and its norm's scale
    ends = (channels + 1) * width + (width + 1) * channels
    assert counts == {
        "qwen3": sum(leaf.size for path, leaf in shapes.items() if path.startswith("qwen3/")),
        "diffusion_connector": 10_033_920,
        "und_image_vae_connector": 5_389_056,
        "sana": captions + ends * beside,
        "ta_tok": 0,
        "dc_ae": 0,
    }


def test_reference_quirks_are_those_of_the_specification():
    loss = read_config("emoji_joint", REFERENCE_QUIRKS).joint
    assert (loss.last_slice, loss.stochastic_codes) == (True, True)
    plain = read_config("emoji_joint", []).joint
    assert (plain.last_slice, plain.stochastic_codes) == (False, False)


def test_a_workdir_of_another_config_is_refused(tmp_path):
    open_workdir(TrainConfig(stage="joint"), tmp_path / "run")
    open_workdir(TrainConfig(stage="joint"), tmp_path / "run")
    with pytest.raises(InputError, match="seed: 0 there, 1 here"):
        open_workdir(TrainConfig(stage="joint", seed=1), tmp_path / "run")


def test_a_workdir_that_cannot_be_written_is_named():
    with pytest.raises(InputError, match=r"The workdir /proc/run cannot be written: "):
        open_workdir(TrainConfig(stage="joint"), "/proc/run")


def test_a_wrong_input_leaves_no_config_in_the_workdir(tmp_path, capsys):
    argv = ["train", "--config", "emoji_recital", "--workdir", str(tmp_path / "run")]
    assert main([*argv, "--config.data.row_length=20"]) == 2
    assert "does not fit data.row_length 20" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()  # a run that has come further keeps its config
    assert main([*argv, "--config.data.row_length=20"]) == 2
    assert (tmp_path / "run" / "config.json").exists()


def test_a_topology_chooses_among_pods_and_is_refused_where_there_are_none():
    assert read_config("pretrain_3b:v5e:4x4", []).accumulate == 8
    with pytest.raises(
        InputError, match="emoji_joint is the same on all topologies; leave ':v5e:4x4' out"
    ):
        read_config("emoji_joint:v5e:4x4", [])


OLD_NAMES = [
    ("trainable_sana", "all", "joint", "trainable_sana"),
    ("loss.condition_dropout", 0.2, "joint", "condition_dropout"),
    ("loss.flow_weight", 2.0, "joint", "flow_weight"),
    ("loss.last_slice", True, "joint", "last_slice"),
    ("loss.stochastic_codes", True, "joint", "stochastic_codes"),
    ("loss.ce_chunk", 2, "joint", "ce_chunk"),
    ("loss.latent_noise", 0.5, "autoencoder", "latent_noise"),
    ("named_tokens", True, "pretrain_ar", "named_tokens"),
]


@pytest.mark.parametrize(("old", "value", "stage", "new"), OLD_NAMES, ids=lambda x: str(x))
def test_keys_of_version_0_1_work_and_say_their_new_names(old, value, stage, new, caplog):
    names = {"joint": "emoji_joint", "autoencoder": "emoji_autoencoder"}
    cfg = read_config(names.get(stage, "emoji_sketch"), [f"--config.{old}={json.dumps(value)}"])
    assert getattr(cfg.section, new) == value
    assert f"Config: {old} is now called {stage}.{new}." in caplog.messages


def test_every_old_key_is_tried():
    assert {old for old, *_ in OLD_NAMES} == set(RENAMED_KEYS)


def test_the_stage_of_version_0_1_works_and_says_its_new_name(caplog):
    cfg = read_config("emoji_recital", ["--config.stage=practice"])
    assert (cfg.stage, cfg.record.rows) == ("pretrain_ar", "exercises")
    assert "Config: stage 'practice' is now called 'pretrain_ar'." in caplog.messages


@pytest.mark.parametrize(
    ("config", "override", "sentence"),
    [
        ("emoji_joint", "grpo.beta=0.1", "grpo.beta has no effect in stage 'joint'"),
        ("emoji_joint", "autoencoder.latent_noise=1", "autoencoder.latent_noise has no effect"),
        ("emoji_joint", "joint.latent_noise=1", "Unknown config key 'joint.latent_noise'"),
        ("emoji_joint", 'data.exercises={"recital": 1}', "data.exercises has no effect in stage"),
        ("emoji_joint", "data.max_bad_fraction=0.5", "has no effect without data.sources"),
        ("emoji_autoencoder", "data.row_length=8", "data.row_length has no effect in stage"),
        ("emoji_autoencoder", "remat=full", "remat has no effect in stage 'autoencoder'"),
        ("pretrain_3b", "data.num_train=5", "data.num_train has no effect beside data.sources"),
        ("pretrain_3b", "data.edits=0.5", "data.edits has no effect beside data.sources"),
        ("emoji_joint", "data.composed_edits=0.1", "has no effect without data.edits"),
    ],
)
def test_a_key_without_effect_is_refused(config, override, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_config(config, [f"--config.{override}"])


def test_one_checkpoint_may_start_all_parts():
    cfg = read_config("pretrain_3b", [])
    assert cfg.init == dict.fromkeys(STAGES["joint"].parts, "/mnt/jax-3b")
    other = read_config("pretrain_3b", ["--config.init.sana=sana"])
    assert other.init == {**cfg.init, "sana": "sana"}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("sana.num_layers", "two", "num_layers is 'two', which makes no sense as int"),
        ("sana.num_layers", 0, "num_layers is 0, which makes no sense as int"),
        ("qwen3.num_key_value_heads", 0, "num_key_value_heads is 0, which makes no sense as int"),
        ("dc_ae.block_types", None, "block_types is None, which makes no sense as tuple"),
        ("dc_ae.block_out_channels", [8, "8"], "block_out_channels is '8', which makes no sense"),
        ("sana.qk_norm", 1, "qk_norm is 1, which makes no sense as bool"),
        ("sana", 3, "sana is 3, which makes no sense as SanaConfig"),
        ("name", {"x": 1}, "name is {'x': 1}, which makes no sense as str"),
        ("name.x", 1, "name is a value, not a group of keys."),
        ("dc_ae.encoder_layers_per_block", [0, 1, 1, 600], "DC-AE: 602 layers and taps of"),
    ],
)
def test_a_change_of_the_model_has_the_type_of_its_field(key, value, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_config("emoji_joint", [f"--config.model.{key}={json.dumps(value)}"])


def test_lists_of_a_change_become_tuples():
    """As the checks and the equality of configs want them; a workdir's JSON has lists."""
    cfg = read_config("emoji_joint", ["--config.model.dc_ae.qkv_multiscales=[[], [], [], [5]]"])
    assert cfg.blip3o().dc_ae.qkv_multiscales == ((), (), (), (5,))


def test_a_workdir_of_version_0_1_is_that_of_the_same_run():
    """Its config.json has the keys of all stages, also those without an effect."""
    cfg = read_config("emoji_recital", [])
    saved = dataclasses.asdict(cfg)
    section = saved.pop("pretrain_ar")
    for stage in STAGES:
        saved.pop(stage, None)
    saved |= {"stage": "practice", "named_tokens": section["named_tokens"]}
    saved |= {"trainable_sana": "captions", "grpo": {"beta": 0.001, "num_generations": 16}}
    saved["loss"] = {"condition_dropout": 0.1, "ce_chunk": 0, "latent_noise": 0.0}
    assert saved_config(saved) == cfg


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        ([], "it has no groups of keys"),
        ({"stage": "joint", "data": 3}, "it has no groups of keys"),
        ({"stage": "joint", "data": {"seed": 1}, "loss": [1]}, "it has no groups of keys"),
        ({"stage": ["joint"], "data": {"seed": 1}}, "its stage is \"['joint']\""),
        ({"data": {"seed": 1}}, "its stage is 'None'"),
        ({"stage": "joint", "data": {"seed": 1}, "joint": 3}, "Config key 'joint' wants a group"),
    ],
)
def test_a_damaged_config_of_a_workdir_is_refused(saved, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=re.escape(sentence)) as error:
        open_workdir(read_config("emoji_joint", []), tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'} is no config of a run (")
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"config\.json is no config of a run \(it is not JSON: "):
        open_workdir(read_config("emoji_joint", []), tmp_path)
