"""plan --generate on the simulated CPU devices: the programs, their bytes, and what fits."""

import dataclasses
import json

import jax
import pytest
from editing import CHANNELS
from tiny import SMALL

from blip3o_jax import flops
from blip3o_jax.chips import CHIPS, Chip
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.errors import InputError
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.plan import estimate, generation, programs
from blip3o_jax.presets import preset
from blip3o_jax.sample.settings import EditSettings, Settings
from blip3o_jax.train.config import TrainConfig

CHIP = Chip("", 1e12, 16 * 1024)
SETTINGS = Settings(num_inference_steps=2)


def config():
    return TrainConfig("joint", model=SMALL, batch_size=16).blip3o()


@pytest.fixture(scope="module")
def whole():
    """All programs of eight images, with sharded weights."""
    return generation.lower(config(), make_mesh({"fsdp": 8}), SETTINGS, "bfloat16", 8)


def test_generation_is_lowered_whole(whole):
    assert tuple(whole) == ("write_tokens", "draw_latents", "pictures")
    count = sum(leaf.size for leaf in jax.tree.leaves(Blip3o(config()).abstract()))
    for program in whole.values():
        leaves = jax.tree.leaves(program.kinds["parameters"])
        assert sum(x.size for x in leaves) == count
        assert {str(x.dtype) for x in leaves} == {"bfloat16"}
        length = config().max_prompt_tokens
        assert program.flops == flops.text_to_image(config(), 8, length, 2)
    unsharded = generation.lower(config(), make_mesh({"data": 8}), SETTINGS, "bfloat16", 8)
    assert unsharded["pictures"].kinds["parameters"]
    with pytest.raises(InputError, match="does not divide"):
        generation.lower(config(), make_mesh({"fsdp": 8}), SETTINGS, "bfloat16", 12)


def test_what_a_program_is_given_is_what_the_one_before_it_makes(whole):
    """Else another program than that of `generate` would be planned."""

    def shapes(tree):
        return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    written, latents, images = (program.lowered.out_info for program in whole.values())
    assert shapes(written["hidden"]) == shapes(whole["draw_latents"].arguments[1])
    assert shapes(latents) == shapes(whole["pictures"].arguments[1])
    size = config().image_size
    assert shapes(images) == [((8, size, size, 3), jax.numpy.uint8)]


def test_editing_is_lowered_whole():
    """Its programs fit each other, and know the sources' places among the prompt's tokens."""
    cfg, mesh = replace(config(), **CHANNELS), make_mesh({"data": 8})
    edits = generation.lower(cfg, mesh, EditSettings(num_inference_steps=2), "bfloat16", 8)
    assert tuple(edits) == ("encode_sources", *generation.PROGRAMS)
    (codes, sources), written = edits["encode_sources"].lowered.out_info, edits["write_tokens"]

    def shapes(tree):
        return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    assert shapes(written.arguments[-1]) == shapes(codes) == [((8, 4), jax.numpy.int32)]
    assert shapes(edits["draw_latents"].arguments[3]) == shapes(sources)
    length = cfg.max_prompt_tokens + cfg.max_sources * cfg.ta_tok.num_tokens
    assert written.arguments[1].shape == (8, length)
    for program in edits.values():
        assert program.flops == flops.edit(cfg, 8, length, 2)


def test_weights_of_eight_bits_are_planned_as_they_are_held():
    """A byte for each weight of the layers of Qwen3 and SANA, and a scale for each of their output
    channels."""
    mesh, cfg = make_mesh({"data": 8}), preset("blip3o_next_3b")
    model = Blip3o(cfg, jax.numpy.bfloat16)
    before, after = (
        jax.tree.leaves(generation.weights_of(model, mesh, name)) for name in ("bfloat16", "int8")
    )
    width, hidden, heads, kv_heads = 2048, 6144, 16 * 128, 8 * 128
    qwen3 = 2 * width * (heads + kv_heads) + 3 * width * hidden
    scales = heads + 2 * kv_heads + width + 2 * hidden + width
    wide, mlp = cfg.sana.hidden_size, cfg.sana.mlp_hidden
    sana = 8 * wide * wide + 3 * wide * mlp
    weights = 28 * qwen3 + cfg.sana.num_layers * sana
    scales = 28 * scales + cfg.sana.num_layers * (8 * wide + 2 * mlp + wide)
    assert sum(x.size for x in after if x.dtype == jax.numpy.int8) == weights
    sizes = [sum(x.size * x.dtype.itemsize for x in leaves) for leaves in (before, after)]
    assert sizes[0] - sizes[1] == weights - 2 * scales


def measured(monkeypatch, needs):
    """`estimate.measure` says what `needs` makes of (name of the program's inputs, images)."""

    def measure(program, chip):
        total = needs(program)
        if total > chip.hbm * estimate.MIB:
            return {"bytes": {"parameters": 1}, "fits": False, "reason": "out of HBM"}
        memory = {"parameters": 1, "code": 7, "total": total}
        sent = {"all-gather": {"calls": 2, "bytes": 5}}
        return {"bytes": memory, "fits": True, "communication": sent}

    monkeypatch.setattr(estimate, "measure", measure)


def test_the_largest_program_counts_with_the_code_of_all(monkeypatch):
    measured(monkeypatch, lambda program: program.images)
    sizes = {"write_tokens": 100, "draw_latents": 300, "pictures": 200}
    lowered = {name: programs.Program(None, (), {}, 1, size) for name, size in sizes.items()}
    result = generation.measure(lowered, CHIP)
    assert result["bytes"] == {"parameters": 1, "code": 21, "total": 314}
    assert result["programs"] == sizes
    assert result["communication"] == {"all-gather": {"calls": 6, "bytes": 15}}
    chip = dataclasses.replace(CHIP, hbm=313 / 2**20)
    assert generation.measure(lowered, chip)["fits"] is False
    lowered["draw_latents"] = programs.Program(None, (), {}, 1, 1 << 60)
    assert generation.measure(lowered, CHIP)["reason"] == "draw_latents: out of HBM"


def test_what_is_sent_is_unknown_where_one_program_is_not_printed(monkeypatch):
    """Also if it is not the largest; and no reason why something would not fit."""
    measured(monkeypatch, lambda program: program.images)
    whole = estimate.measure

    def measure(program, chip):
        silent = {"communication": None, "unknown": "it is not printed"}
        return whole(program, chip) | (silent if program.images == 100 else {})

    monkeypatch.setattr(estimate, "measure", measure)
    sizes = {"write_tokens": 100, "draw_latents": 300}
    lowered = {name: programs.Program(None, (), {}, 1, size) for name, size in sizes.items()}
    result = generation.measure(lowered, CHIP)
    assert result["communication"] is None
    assert estimate.table(result, CHIP).splitlines()[-1].split(maxsplit=2) == [
        *("sent", "?", "it is not printed")
    ]
    assert estimate.verdict(result | {"fits": False}) == "DOES NOT FIT: more than that"


def planned(monkeypatch, capsys, *options: str, chip: Chip = CHIP) -> dict:
    monkeypatch.setattr(programs, "open_topology", lambda name: (jax.devices(), chip))
    code = main(["plan", "--topology", "v5e:2x4", *options])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == (0 if result["fits"] else 1)
    return result


@pytest.mark.parametrize(
    ("options", "sizes"), [([], (8, 1, 1)), (["--mesh", "data=2,fsdp=4"], (2, 4, 1))]
)
def test_generation_is_planned_on_the_mesh_that_generate_takes(options, sizes, monkeypatch, capsys):
    """And for a million images, whatever the run's mesh."""
    asked = []
    measured(monkeypatch, lambda program: asked.append(program.kinds["parameters"]) or 1)
    argv = ["--config", "emoji_joint", "--config.mesh.tensor=2", "--generate", "3", *options]
    found = planned(monkeypatch, capsys, *argv)
    assert tuple(found["mesh"].values()) == sizes
    assert (found["images_at_once"], found["images_in_all"]) == (24, 1_000_000)
    assert found["runs"] == 41_667
    for parameters in asked:
        assert {leaf.sharding.mesh.shape_tuple for leaf in jax.tree.leaves(parameters)} == {
            tuple(found["mesh"].items())
        }


def searched(monkeypatch, needs) -> list[int]:
    """The numbers of images a device that are tried, where `needs` makes bytes of (program's name,
    images a device), or raises."""
    tried = []

    def lower(config, mesh, settings, weights, rows):
        tried.append((rows // 8, weights))
        names = generation.programs_of(settings)
        return {name: programs.Program(None, (), {name: None}, 10**13, rows) for name in names}

    monkeypatch.setattr(generation, "lower", lower)
    measured(monkeypatch, lambda program: needs(min(program.kinds), program.images // 8))
    return tried


def test_as_many_images_as_fit(monkeypatch, capsys):
    """Of 100 bytes and 10 an image, and 7 of code for each of two more programs."""
    chip = dataclasses.replace(CHIP, hbm=250 / 2**20)
    tried = searched(monkeypatch, lambda name, images: 100 + 10 * images)
    argv = ["--config", "blip3o_next_3b", "--generate", "--weights", "int8"]
    found = planned(monkeypatch, capsys, *argv, chip=chip)
    assert tried == [(images, "int8") for images in (4, 8, 13, 14)]
    assert (found["images_a_device"], found["images_at_once"], found["weights"]) == (
        13,
        104,
        "int8",
    )
    assert found["bytes"]["total"] == 230 + 14
    assert found["seconds"] == pytest.approx(10**13 / (0.4 * 8 * 1e12))


def test_as_many_edits_as_fit(monkeypatch, capsys):
    """By whichever program needs most: with few images the encoders, with many what writes."""
    chip = dataclasses.replace(CHIP, hbm=250 / 2**20)
    line = {"encode_sources": (140, 1), "write_tokens": (90, 10)}

    def needs(name, images):
        fixed, added = line.get(name, (50, 1))
        return fixed + added * images

    tried = searched(monkeypatch, needs)
    argv = ["--config", "emoji_joint", "--generate", "--edit"]
    found = planned(monkeypatch, capsys, *argv, chip=chip)
    assert [images for images, _ in tried] == [4, 8, 13, 14]
    assert (found["images_a_device"], found["edit"]) == (13, True)
    assert list(found["programs"]) == ["encode_sources", *generation.PROGRAMS]


@pytest.mark.parametrize(
    ("fits", "tried"),
    [
        # The line says 33, and the compiler's no not by how much it is.
        (18, [4, 8, 33, 20, 14, 17, 18, 19]),
        (8, [4, 8, 33, 20, 14, 11, 9]),
        (3, [4, 2, 3]),
        (1, [4, 2, 1]),
    ],
)
def test_the_search_ends_between_what_fits_and_what_does_not(fits, tried, monkeypatch, capsys):
    """However the compiler departs from the line that the fewest images promise."""
    chip = dataclasses.replace(CHIP, hbm=450 / 2**20)
    asked = searched(monkeypatch, lambda name, n: 100 + 10 * n if n <= fits else 1 << 60)
    found = planned(monkeypatch, capsys, "--config", "emoji_64", "--generate", chip=chip)
    assert [images for images, _ in asked] == tried
    assert found["images_a_device"] == fits


@pytest.mark.parametrize(
    ("needs", "most"),
    [
        (lambda n: 500 + 10 * n + n * n // 5, 30),
        (lambda n: 500 + n**3 // 50, 28),
        (lambda n: 500 + n if n <= 200 else 10**7, 200),
        (lambda n: min(500 + 100 * n, 980) if n <= 60 else 10**7, 60),
        (lambda n: 500 if n <= 4 else 900 + n // 100, 256),
    ],
)
def test_the_search_ends_soon_however_bytes_bend(needs, most, monkeypatch, capsys):
    """Where what is too large compiles, as for a GPU, whose memory is less than that of the TPU
    which is compiled for."""
    chip = dataclasses.replace(CHIP, hbm=1000 / 2**20)
    tried = searched(monkeypatch, lambda name, images: needs(images))
    known, vast = estimate.measure, dataclasses.replace(CHIP, hbm=1 << 20)
    monkeypatch.setattr(estimate, "measure", lambda program, chip: known(program, vast))
    found = planned(monkeypatch, capsys, "--config", "emoji_64", "--generate", chip=chip)
    assert found["images_a_device"] == most
    assert len(tried) <= generation.LINES + 8  # as often as 256 can be halved


def test_no_more_images_are_sought_than_are_of_use(monkeypatch, capsys):
    tried = searched(monkeypatch, lambda name, images: images)
    found = planned(monkeypatch, capsys, "--config", "emoji_64", "--generate")
    assert [images for images, _ in tried] == [4, 8, generation.ENOUGH]
    assert found["images_a_device"] == generation.ENOUGH


def test_where_not_one_image_fits_its_plan_says_so(monkeypatch, capsys, caplog):
    tried = searched(monkeypatch, lambda name, images: 1 << 60)
    found = planned(monkeypatch, capsys, "--config", "emoji_64", "--generate")
    assert [images for images, _ in tried] == [4, 2, 1]
    assert (found["images_a_device"], found["fits"]) == (1, False)
    assert found["reason"] == "write_tokens: out of HBM"
    assert "--mesh fsdp=N shards the weights" in caplog.text


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--config", "blip3o_next_3b", "--generate"], "names no topology"),
        (["--config", "blip3o_next_3b", "--topology", "v5e:2x2"], "blip3o_next_3b"),
        (["--config", "pretrain_3b", "--weights", "int8"], "--weights is of generation"),
        (["--config", "edit_3b", "--edit"], "--edit is of generation; add --generate."),
        (
            ["--config", "mid_128", "--topology", "h100", "--generate", "--edit"],
            "mid_128 has no editing weights (its max_sources is 0); edit_3b, for one, has.",
        ),
        (["--config", "grpo_3b", "--search"], "--search is over ways of supervised training"),
        (["--config", "emoji_joint", "--topology", "h100"], "Training is planned for TPUs alone"),
        (
            ["--config", "emoji_joint", "--topology", "h900", "--generate"],
            "Unknown topology 'h900'",
        ),
        (
            ["--config", "emoji_64", "--generate", "--config.preset=emoji_64"],
            "A preset has no --config.KEY",
        ),
    ],
)
def test_a_wrong_question_is_answered_in_a_sentence(argv, sentence, capsys):
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "\n" not in error


def test_a_gpu_is_one_device_with_its_own_memory(monkeypatch):
    from jax.experimental import topologies

    opened = []

    def describe(name, platform):
        opened.append(name)
        return dataclasses.make_dataclass("Topology", ["devices"])(jax.devices()[:4])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    devices, chip = programs.open_topology("h100")
    assert (len(devices), chip, opened) == (1, CHIPS["h100"], ["v5p:2x2x1"])
