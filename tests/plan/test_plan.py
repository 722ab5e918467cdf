"""plan on the simulated CPU devices, and what is said about a wrong question.
tests/test_plan_tpu.py has the TPU's compiler."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import pytest
from flax.traverse_util import flatten_dict
from tiny import SMALL

from blip3o_jax import flops
from blip3o_jax.chips import Chip, parse_topology
from blip3o_jax.cli import build_parser, main
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import AXES, make_mesh, mesh_shape
from blip3o_jax.parallel.parameters import spec
from blip3o_jax.plan import estimate, programs
from blip3o_jax.train import start
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.read_config import read_config

CHIP = Chip("", 1e12, 16 * 1024)
POD_CONFIGS = ("pretrain_3b", "sft_3b", "edit_3b", "few_steps_3b", "pretrain_0_6b")
PODS = (*("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "v5e:4x4", "v5p:2x2x4", "v6e:4x4"), "tpu7x:2x2x1")


def small(**changes) -> TrainConfig:
    return dataclasses.replace(
        TrainConfig("joint", model=SMALL, batch_size=16, dtype="float32"), **changes
    )


def lowered(cfg: TrainConfig) -> programs.Program:
    """The step on the config's mesh, compiled at most once, however often it is measured."""
    program = programs.lower_step(cfg, make_mesh(cfg.mesh))
    once = SimpleNamespace(compile=functools.cache(program.lowered.compile))
    return dataclasses.replace(program, lowered=once)


@pytest.fixture(scope="module")
def averaged():
    """A step with unsharded weights and their average."""
    cfg = small(mesh={"data": 8})
    optimizer = dataclasses.replace(cfg.optimizer, ema_decay=0.9)
    return lowered(dataclasses.replace(cfg, optimizer=optimizer))


@pytest.fixture(scope="module")
def sharded():
    """A step with sharded weights, without their average."""
    return lowered(small(mesh={"fsdp": 8}))


def test_bytes_by_kind_are_those_of_the_parts(averaged):
    cfg = small()
    found = estimate.measure(averaged, CHIP)["bytes"]
    params = Blip3o(cfg.blip3o()).abstract()
    trained = sum(
        leaf.size
        for part in ("qwen3", "diffusion_connector")
        for leaf in jax.tree.leaves(params[part])
    )
    captions = ("caption_projection", "caption_norm")
    trained += sum(leaf.size for name in captions for leaf in jax.tree.leaves(params["sana"][name]))
    everything = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found["parameters"] == found["average"] == 4 * trained
    assert found["optimizer"] == 8 * trained + 4  # two moments, and the count of steps
    assert found["frozen"] == 4 * (everything - trained)
    model = cfg.blip3o()
    length = model.max_prompt_tokens + model.ta_tok.num_tokens + 3
    row = model.image_size**2 * 3 + 4 * length + 4
    assert found["batch"] == 16 // 8 * row
    assert found["total"] == sum(size for kind, size in found.items() if kind != "total")
    assert found["temporary"] > 0


def test_a_sharded_step_holds_a_part_and_no_average_unless_it_is_kept(averaged, sharded):
    whole, part = (estimate.measure(program, CHIP)["bytes"] for program in (averaged, sharded))
    assert part["average"] == 0
    assert part["parameters"] < 0.2 * whole["parameters"]


def test_what_the_step_does_not_read_is_there_all_the_same():
    """From a cache no image is encoded, but the encoders are loaded: the total counts them, the
    program does not."""
    cfg = read_config("pretrain_3b", [])
    cfg = small(data=dataclasses.replace(cfg.data, row_length=160), mesh={"data": 8})
    program = lowered(cfg)
    assert set(program.arguments[2]) == {"tokens", "start", "codes", "latents"}
    found = estimate.measure(program, CHIP)
    argument = program.lowered.compile().memory_analysis().argument_size_in_bytes
    params = Blip3o(cfg.blip3o()).abstract()
    encoders = 4 * sum(
        leaf.size for part in ("ta_tok", "dc_ae") for leaf in jax.tree.leaves(params[part])
    )
    arguments = sum(
        size for kind, size in found["bytes"].items() if kind not in ("temporary", "total")
    )
    assert arguments - argument == encoders
    assert found["bytes"]["total"] > arguments


def test_what_fits_is_what_the_compiler_would_take():
    """Arguments, outputs and temporaries less aliases, and code, to the byte of the chip's limit;
    not the peak, which counts other memory too. What is not read is on the device as well."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    read, unread = (
        jax.ShapeDtypeStruct((size,), jax.numpy.uint8, sharding=place) for size in (600, 77)
    )
    names = ("argument_size", "output_size", "temp_size", "alias_size", "generated_code_size")
    sizes = zip((*names, "peak_memory"), (1024, 512, 300, 512, 40, 9999), strict=True)
    memory = SimpleNamespace(**{f"{name}_in_bytes": size for name, size in sizes})
    compiled = SimpleNamespace(
        input_shardings=([place, None], {}), memory_analysis=lambda: memory, as_text=lambda: ""
    )
    lowered = SimpleNamespace(compile=lambda: compiled)
    kinds = {"parameters": [read], "frozen": [unread]}
    program = programs.Program(lowered, (read, unread), kinds, None, 1)
    total = 1024 + 512 + 300 - 512 + 40 + 77
    limits = {"fits": total, "does not": total - 1}
    measured = {
        name: estimate.measure(program, dataclasses.replace(CHIP, hbm=limit / 2**20))
        for name, limit in limits.items()
    }
    assert [result["fits"] for result in measured.values()] == [True, False]
    assert measured["fits"]["bytes"] == {
        "parameters": 600,
        "frozen": 77,
        "temporary": 1024 + 300 - 600,
        "code": 40,
        "total": total,
    }


def test_a_step_of_edits_holds_their_sources():
    """Without a cache: two images a row, and the connector of the sources among what is trained."""
    run = read_config("edit_3b", [])
    data = dataclasses.replace(run.data, row_length=256)
    cfg = small(model=SMALL | run.model, data=data, mesh={"fsdp": 8})
    program = programs.lower_step(cfg, make_mesh(cfg.mesh))
    size = cfg.blip3o().image_size
    assert {name: x.shape[1:] for name, x in program.arguments[2].items()} == {
        "images": (size, size, 3),
        "sources": (1, size, size, 3),
        "tokens": (256,),
        "start": (),
        "num_sources": (),
    }
    assert set(program.kinds["parameters"]) - set(small().trained_parts) == {
        "und_image_vae_connector"
    }
    edits = flops.joint_step(cfg.blip3o(), 16, 256, whole_sana=False, sources=1)
    assert program.flops == edits > flops.joint_step(cfg.blip3o(), 16, 256, whole_sana=False)


def test_a_device_that_is_too_small(sharded):
    assert estimate.measure(sharded, CHIP)["fits"]
    assert not estimate.measure(sharded, dataclasses.replace(CHIP, hbm=0))["fits"]


def test_a_cut_model_that_does_not_fit_answers_for_the_whole_one(sharded):
    small_chip = dataclasses.replace(CHIP, hbm=0)
    result = estimate.of_cut(estimate.measure(sharded, small_chip))
    assert result["fits"] is False
    assert "DOES NOT FIT: more than that" in estimate.table(result, small_chip)


def test_time_and_cost_are_arithmetic():
    program = programs.Program(None, (), {}, 8 * 10**12, 16)
    found = estimate.price(
        program, jax.devices(), dataclasses.replace(CHIP, devices=2), 0.5, 3600, 2.5
    )
    assert (found["seconds"], found["images_per_second"], found["hours"]) == (2.0, 8.0, 2.0)
    assert (found["chip_hours"], found["dollars"]) == (8.0, 20.0)
    assert "dollars" not in estimate.price(program, jax.devices(), CHIP, 0.5, 1, None)
    assert "8 chip-hours, $20" in estimate.table({"bytes": {}, "fits": True, **found}, CHIP)


def test_a_quick_look_has_every_kind_of_block():
    cfg = TrainConfig("joint", batch_size=16)
    model = programs.shallow(cfg, 1).blip3o()
    assert (
        model.qwen3.num_hidden_layers,
        model.sana.num_layers,
        model.ta_tok.num_encoder_layers,
    ) == (1, 1, 1)
    assert model.dc_ae.encoder_layers_per_block == (0, 1, 1, 1)
    assert model.dc_ae.decoder_layers_per_block == (0, 1, 1, 1)
    assert programs.shallow(cfg, 9).blip3o().dc_ae == cfg.blip3o().dc_ae


def test_search_prefers_less_computed_again_and_then_more_rows(monkeypatch):
    """Which of (remat, rows a device) fit is given; nothing is compiled."""
    tried, fitting = [], {("dots", 1), ("dots", 2), ("full", 1), ("full", 2), ("full", 4)}

    def estimated(program, *rest):
        tried.append(program)
        return {"bytes": {"total": 1 << 30}, "fits": program in fitting}

    monkeypatch.setattr(estimate, "estimate", estimated)
    monkeypatch.setattr(
        programs, "lower_step", lambda cfg, mesh: (cfg.remat, cfg.batch_size // 8 // cfg.accumulate)
    )
    cfg, _ = estimate.search(small(batch_size=64), make_mesh({"fsdp": 8}), [], CHIP, 0.4, None)
    assert (cfg.remat, cfg.accumulate, cfg.batch_size) == ("dots", 4, 64)
    assert tried == [("none", 1), ("dots", 1), ("dots", 2), ("dots", 4)]
    fitting.clear()
    with pytest.raises(InputError, match="Nothing fits"):
        estimate.search(small(batch_size=64), make_mesh({"fsdp": 8}), [], CHIP, 0.4, None)


@pytest.mark.parametrize("name", POD_CONFIGS)
def test_pods_divide_the_batch_and_every_parameter(name):
    """On meshes as large as the pods, without their devices."""
    params = flatten_dict(Blip3o(read_config(name, []).blip3o()).abstract(), sep="/")
    unplanned = read_config(f"{name}:v5e:8x8", [])
    for topology in PODS:
        cfg = read_config(f"{name}:{topology}", [])
        assert cfg.topology == topology
        # The config says something of each of these pods.
        ways = [(run.mesh, run.remat, run.accumulate) for run in (cfg, unplanned)]
        assert ways[0] != ways[1]
        _, count = parse_topology(topology)
        mesh = jax.sharding.AbstractMesh(mesh_shape(cfg.mesh, count), AXES)
        start.check_batches(cfg, mesh)
        for path, leaf in params.items():
            spec(path, leaf.shape, mesh)
        assert cfg.data.row_length % 128 == 0  # the TPU's attention kernel
        images = cfg.blip3o().max_sources + 1
        tokens = cfg.blip3o().max_prompt_tokens + images * cfg.blip3o().ta_tok.num_tokens + 3
        assert cfg.data.row_length >= tokens


@pytest.mark.parametrize("topology", PODS)
def test_pods_divide_the_pieces_of_a_rollout(topology):
    cfg = read_config(f"grpo_3b:{topology}", [])
    mesh = mesh_shape(cfg.mesh, parse_topology(topology)[1])
    start.check_batches(cfg, jax.sharding.AbstractMesh(mesh, AXES))
    assert cfg.grpo.pieces > 1 or mesh[0] * mesh[1] == cfg.batch_size


def test_a_mesh_that_does_not_divide_says_which_does():
    mesh = jax.sharding.AbstractMesh((1, 128, 1), AXES)
    with pytest.raises(
        InputError,
        match=r"an axis of 2240 does not divide by the mesh's fsdp=128; take fsdp=64, and more "
        r"data",
    ):
        spec("sana/transformer_blocks/attn1/to_q/kernel", (20, 2240, 70, 32), mesh)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--config", "pretrain_3b", "--topology", "v5e:3x5"],
            "Unknown topology 'v5e:3x5'; known: v5e:2x2,",
        ),
        (["--config", "pretrain_3b:v9:2x2"], "Unknown topology 'v9:2x2'"),
        (["--config", "emoji_joint"], "names no topology"),
        (["--config", "emoji_joint:v5e:2x2"], "is the same on all topologies"),
        (["--config", "pretrain_3"], "did you mean 'pretrain_3b'"),
        (["--config", "pretrain_3b", "--mfu", "2"], "in (0, 1]"),
        (["--config", "pretrain_3b", "--price", "-1"], "at least 0"),
        (["--config", "pretrain_3b", "--depth", "0"], "at least 1"),
        (["--config", "pretrain_3b", "--depth", "99"], "cuts no part of this model"),
        (["--config", "pretrain_3b", "--depth", "2", "--price", "1"], "--price is of the whole"),
        (["--config", "pretrain_3b", "--search", "--generate", "1"], "leave --generate out"),
        (["--config", "pretrain_3b", "--generate", "0"], "at least 1"),
        (["--config", "pretrain_3b", "--mesh", "fsdp=8"], "--mesh is that of --generate"),
        (["--config", "pretrain_3b", "--config.batch_sise=4"], "did you mean 'batch_size'"),
    ],
)
def test_a_wrong_question_is_answered_in_a_sentence(argv, sentence, capsys):
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "\n" not in error


def test_without_libtpu_the_extra_is_named(monkeypatch, capsys):
    from jax.experimental import topologies

    def missing(*args, **kwargs):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    assert main(["plan", "--config", "pretrain_3b"]) == 2
    assert "pip install 'blip3o-jax[tpu]'" in capsys.readouterr().err


def test_the_last_line_is_json(monkeypatch, capsys):
    monkeypatch.setattr(programs, "open_topology", lambda name: (jax.devices(), CHIP))
    argv = ["plan", "--config", "emoji_joint", "--topology", "v5e:2x4", "--config.dtype=float32"]
    shallow = programs.shallow(read_config("emoji_joint", []), 1).model
    layers = [f"--config.model.{key}={json.dumps(value)}" for key, value in shallow.items()]
    assert main([*argv, *layers, "--price", "1.0"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["topology"], last["depth"], last["fits"]) == ("v5e:2x4", None, True)
    assert last["dollars"] == pytest.approx(last["chip_hours"])
    assert build_parser().parse_args(argv[:5]).mfu == 0.4

    # The same program as a quick look: no verdict on the run, and no price.
    assert main([*argv, "--depth", "1"]) == 0
    printed = capsys.readouterr().out
    cut = json.loads(printed.splitlines()[-1])
    assert (cut["depth"], cut["fits"]) == (1, None)
    assert cut["bytes"] == last["bytes"]
    priced = {"flops", "flops_per_image", "mfu", "seconds", "images_per_second", "runs", "hours"}
    priced |= {"chip_hours", "dollars"}
    assert last.keys() - cut.keys() == priced
    assert printed.startswith("emoji_joint, CUT to depth 1, on v5e:2x4")
    assert "a CUT model fits, which the whole one need not" in printed
    assert " of peak" not in printed
    assert "chip-hours" not in printed
