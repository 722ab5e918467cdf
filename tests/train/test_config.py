import pytest

from blip3o_jax.cli import main
from blip3o_jax.errors import InputError
from blip3o_jax.jobs.train import REFERENCE_QUIRKS, open_workdir, read_config
from blip3o_jax.resources import CONFIGS
from blip3o_jax.train.config import TrainConfig, from_dict


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.py")))
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
        (["--config.batch_size=0"], "at least 1"),
        (["--config.preset=emoji_46"], "did you mean 'emoji_64'"),
        (["--config.model.sana.num_layer=2"], "num_layers"),
        (["--config.stage=jiont"], "did you mean 'joint'"),
        (["--config.num_steps=40"], "warmup_steps 50 must be below num_steps 40"),
        (["--config.data.named_ground=2"], "named_ground is in"),
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
    assert TrainConfig(stage=stage, trainable_sana=sana).trainable(path) is trained


def test_reference_quirks_are_those_of_the_specification():
    loss = read_config("emoji_joint", REFERENCE_QUIRKS).loss
    assert (loss.last_slice, loss.stochastic_codes) == (True, True)
    plain = read_config("emoji_joint", []).loss
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
