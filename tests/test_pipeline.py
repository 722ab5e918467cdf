"""The embedded model, as a user meets it."""

import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.checkpoints import config_of
from blip3o_jax.cli import main
from blip3o_jax.config import replace
from blip3o_jax.errors import InputError
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import EditSettings, Settings, defaults
from blip3o_jax.scenes.config import TAGS
from blip3o_jax.scenes.judge import judge

PROMPTS = [
    "two red hearts",
    "a cat",
    "a photo of a blue fish left of a green tree on pink",
    "three stars",
]
QUICK = Settings(num_inference_steps=8)


@pytest.fixture(scope="module")
def pipeline():
    return blip3o_jax.load("emoji_64", devices=jax.devices()[:1], batch_size=4)


def samples(pipeline, prompts, seed=0, num_images=1, settings=QUICK):
    return list(pipeline.samples(prompts, seed, num_images, settings))


@pytest.fixture(scope="module")
def batch(pipeline):
    return samples(pipeline, PROMPTS, seed=3)


def test_images_and_tokens_have_their_shapes(batch):
    assert [s.prompt for s in batch] == PROMPTS
    for sample in batch:
        assert sample.image.shape == (64, 64, 3)
        assert sample.image.dtype == np.uint8
        assert sample.tokens.shape == (64,)
        assert 0 <= sample.tokens.min() <= sample.tokens.max() < 256


def test_a_ragged_batch_equals_single_runs_bit_for_bit(pipeline, batch):
    for sample in batch:
        (alone,) = samples(pipeline, [sample.prompt], seed=3)
        np.testing.assert_array_equal(alone.tokens, sample.tokens)
        np.testing.assert_array_equal(alone.image, sample.image)


def test_an_image_depends_on_prompt_seed_and_index_only(pipeline, batch):
    again = samples(pipeline, [PROMPTS[3], PROMPTS[0]], seed=3, num_images=2)
    assert [(s.prompt, s.index) for s in again] == [
        (PROMPTS[3], 0),
        (PROMPTS[3], 1),
        (PROMPTS[0], 0),
        (PROMPTS[0], 1),
    ]
    np.testing.assert_array_equal(again[0].image, batch[3].image)
    np.testing.assert_array_equal(again[2].image, batch[0].image)
    assert (again[1].tokens != again[0].tokens).any()
    (other,) = samples(pipeline, [PROMPTS[0]], seed=4)
    assert (other.tokens != batch[0].tokens).any()


def test_new_prompts_and_settings_compile_nothing(pipeline, batch):
    compiled = []

    def hear(name, *_, **__):
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        changed = Settings(
            num_inference_steps=8, guidance_scale=3.0, top_p=0.5, temperature=0.7, shift=2.0
        )
        samples(pipeline, ["a dog", "four yellow keys"], seed=9, settings=changed)
        assert [name for name in compiled if "backend_compile" in name] == []
        jax.jit(lambda x: x + 1)(1.0)  # the listener does see compilations
        assert [name for name in compiled if "backend_compile" in name]
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def test_eight_devices_give_the_same_tokens_and_pixels(batch):
    spread = blip3o_jax.load("emoji_64", mesh={"data": 2, "fsdp": 2, "tensor": 2}, batch_size=4)
    for one, other in zip(batch, samples(spread, PROMPTS, seed=3), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert np.abs(one.image.astype(int) - other.image).max() <= 2


def warnings(caplog):
    """What was logged since the last call."""
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return messages


def test_words_outside_the_embedded_world_are_named_once(pipeline, tmp_path, monkeypatch, caplog):
    known = ["a photo of an orange fish left of four cacti, a hat and a key on cream", "a cat."]
    monkeypatch.setattr(pipeline, "run", lambda *_: iter(()))
    pipeline.generate([*known, 'the word "WILD" on gray'])
    assert warnings(caplog) == []
    pipeline.generate(["a silver dragon", "a Red heart", "two dragons and a silver T-shirt"])
    sentence = (
        "emoji_64 does not know silver, dragon, Red, dragons, T-shirt and draws something else "
        "instead. Its words, all in lower case, are in docs/emoji.md."
    )
    assert warnings(caplog) == [sentence]
    pipeline.generate(
        ["one big dog sits under", "2 small old black shoes by an", "empty dusty road"]
    )
    (sentence,) = warnings(caplog)
    names = "one, big, sits, under, 2, small, old, black, shoes, by and 3 more and draws"
    assert sentence.startswith(f"emoji_64 does not know {names} something else instead.")
    # The command says the same; of another checkpoint, whose words may be any, nothing is said.
    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", lambda _: pipeline)
    command = ["generate", "a silver heart", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 0
    assert [text[:31] for text in warnings(caplog)] == ["emoji_64 does not know silver a"]
    monkeypatch.setattr(pipeline, "embedded", "")
    assert main([*command, str(tmp_path / "b")]) == 0
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("options", "width", "asked"),
    [
        ([], 192, [4]),
        (["--batch-size", "6"], 192, [6]),
        ([], 2048, []),
        (["--mesh", "data=1"], 192, []),
    ],
)
def test_a_narrow_model_takes_a_device_per_core_unless_a_mesh_is_named(
    options, width, asked, pipeline, tmp_path, monkeypatch
):
    counted = []
    monkeypatch.setattr("blip3o_jax.parallel.mesh.split_cpu_into_devices", counted.append)
    monkeypatch.setattr(
        "blip3o_jax.checkpoints.config_of",
        lambda name: replace(config_of(name), **{"qwen3.hidden_size": width}),
    )
    monkeypatch.setattr("blip3o_jax.pipeline.load", lambda *_, **__: pipeline)
    assert (
        main(
            [
                "generate",
                "a cat",
                "--num-inference-steps",
                "8",
                "--out",
                str(tmp_path / "made"),
                *options,
            ]
        )
        == 0
    )
    assert counted == asked


def test_by_default_a_cpu_makes_four_images_at_once_whatever_its_devices():
    assert blip3o_jax.load("emoji_64").batch_size == len(jax.devices())
    assert blip3o_jax.load("emoji_64", devices=jax.devices()[:1]).batch_size == 4
    assert blip3o_jax.load("emoji_64", devices=jax.devices()[:3]).batch_size == 6


def test_the_model_draws_what_is_asked(pipeline):
    """Training prompts that any working model gets right; the score itself is `blip3o-jax evaluate
    scenes`."""
    asked = {
        name: {"tag": "single_object", "include": [{"class": name, "count": 1}]}
        for name in ("apple", "heart", "tree", "key")
    }
    prompts = [f"a photo of {'an' if name == 'apple' else 'a'} {name}" for name in asked]
    drawn = zip(samples(pipeline, prompts), asked.values(), strict=True)
    right = [judge(sample.image, meta)["correct"] for sample, meta in drawn]
    assert sum(right) >= 3


def test_python_and_command_line_give_the_same_image(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("blip3o_jax.pipeline.load", lambda *_, **__: pipeline)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS[:2])
    )
    argv = [
        "generate",
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--seed",
        "3",
        "--num-images",
        "2",
        "--num-inference-steps",
        "8",
    ]
    assert main([*argv, "--out", str(tmp_path / "made")]) == 0
    manifest = [
        json.loads(line) for line in (tmp_path / "made" / "manifest.jsonl").read_text().splitlines()
    ]
    assert [(line["prompt"], line["index"]) for line in manifest] == [
        (p, i) for p in PROMPTS[:2] for i in (0, 1)
    ]
    images = pipeline.generate(PROMPTS[:2], seed=3, num_images=2, num_inference_steps=8)
    for line, image in zip(manifest, images, strict=True):
        kept = Image.open(tmp_path / "made" / line["file"])
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(image))
        assert kept.text["prompt"] == line["prompt"]
        assert kept.text["seed"] == "3"
        assert kept.text["index"] == str(line["index"])
        assert kept.text["checkpoint"] == pipeline.identity == line["checkpoint"]
        assert json.loads(kept.text["settings"])["num_inference_steps"] == 8
        info = image.info
        assert (info["prompt"], info["seed"], info["index"]) == (line["prompt"], 3, line["index"])
        assert info["checkpoint"] == pipeline.identity
        assert info["settings"] == json.loads(kept.text["settings"])
    assert len(list((tmp_path / "made").iterdir())) == 6  # with the job's own folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "prompts.jsonl"]


def test_the_embedded_model_takes_its_four_steps_unless_it_is_told_otherwise(pipeline, tmp_path):
    """And says so, in Python and in the files of the command."""
    (image,) = pipeline.generate("a cat", seed=3)
    (edited,) = pipeline.edit(image, "make the cat blue", seed=3)
    (sample,) = pipeline.run([Request("a cat", seed=3)])
    assert np.array_equal(sample.image, np.asarray(image))
    assert sample.request.settings == Settings(num_inference_steps=4)
    image.save(tmp_path / "cat.png")
    words = {"generate": ["a cat"], "edit": [str(tmp_path / "cat.png"), "make the cat blue"]}
    for job, own in (("generate", image), ("edit", edited)):
        out = tmp_path / f"{job}.png"
        assert main([job, *words[job], "--seed", "3", "--out", str(out)]) == 0
        with Image.open(out) as kept:
            np.testing.assert_array_equal(np.asarray(kept), np.asarray(own))
            assert json.loads(kept.text["settings"]) == own.info["settings"]
        assert own.info["settings"]["num_inference_steps"] == 4


@pytest.mark.parametrize(
    ("platform", "order"),
    [("cpu", "start end start end start end"), ("tpu", "start start end start end end")],
)
def test_an_accelerator_begins_a_batch_ahead_and_a_cpu_none(platform, order, pipeline, monkeypatch):
    events = []
    monkeypatch.setattr(pipeline, "_start", lambda rows: events.append("start"))
    monkeypatch.setattr(pipeline, "_finish", lambda rows, _: events.append("end") or rows)
    devices = np.array([SimpleNamespace(platform=platform)])
    monkeypatch.setattr(pipeline, "mesh", SimpleNamespace(devices=devices))
    assert list(pipeline.run([Request("a cat", index=index) for index in range(12)])) == []
    assert events == order.split()


def test_a_row_that_is_done_holds_no_picture_and_one_that_was_given_nothing(pipeline, monkeypatch):
    """A window of photographs would fill the memory."""
    rows, start = [], pipeline._start
    monkeypatch.setattr(pipeline, "_start", lambda batch: rows.extend(batch) or start(batch))
    source, mask = np.full((20, 30, 3), 90, np.uint8), np.full((20, 30), 255, np.uint8)
    how = defaults(pipeline.model.config, EditSettings)
    edit = functools.partial(Request, "make it blue", (source,), settings=how)
    requests = [edit(keep_unchanged=16.0), edit(within=mask), edit(within=mask[1:])]
    requests += [edit(), edit(keep_unchanged=16.0, then=("make it red",)), requests[0]]
    refused, given = [], pipeline.run(requests, lambda request, _: refused.append(request))
    for number, sample in enumerate(given):
        assert [(row.pictures, row.within) for row in rows] == [([], None)] * len(rows)
        # The first batch has the first row and the last one, which waits.
        assert [len(row.samples) for row in rows[:2]] == [number < 1, 1]
        assert (sample.mask is None) == (sample.request is requests[3])
    assert number == 5
    assert refused == requests[2:3]
    assert [(row.samples, row.error) for row in rows] == [([], None)] * 6


def test_no_images_at_once_are_refused(pipeline):
    for size in (0, -4):
        with pytest.raises(InputError, match=f"batch_size is at least 1, not {size}."):
            blip3o_jax.load("emoji_64", batch_size=size)


def test_a_dtype_that_there_is_not_is_named_with_those_that_are():
    with pytest.raises(InputError) as error:
        blip3o_jax.load("emoji_64", dtype="int4")
    known = "auto, int8, float16, bfloat16, float32"
    assert str(error.value) == f"There is no dtype 'int4'; known: {known}."


def test_a_failure_half_way_is_told_and_gives_no_manifest(pipeline, tmp_path, monkeypatch):
    whole = pipeline.run

    def broken(requests, failed=None):
        yield next(whole(list(requests)[:1]))
        raise InputError("The device is gone.")

    monkeypatch.setattr(pipeline, "run", broken)
    monkeypatch.setattr("blip3o_jax.pipeline.load", lambda *_, **__: pipeline)
    command = ["generate", *PROMPTS[:2], "--num-inference-steps", "8", "--out"]
    assert main([*command, str(tmp_path / "made")]) == 2
    assert not (tmp_path / "made/manifest.jsonl").exists()
    assert main([*command, str(tmp_path / "one.png")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_embedded_files_are_complete_and_small():
    from blip3o_jax.resources import ASSETS

    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    assert size < 30e6
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (ASSETS / "emoji_64").iterdir()
    }


def test_evaluation_writes_scores_ceilings_and_a_sheet(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", lambda _: pipeline)
    argv = [
        "evaluate",
        "scenes",
        "--num-prompts",
        "6",
        "--num-words",
        "1",
        "--seeds",
        "2",
        "--num-inference-steps",
        "8",
        "--out",
        str(tmp_path / "made"),
    ]
    assert main(argv) == 0
    *table, line = capsys.readouterr().out.strip().splitlines()
    result = json.loads(line)
    assert result == json.loads((tmp_path / "made" / "result.json").read_text())
    rules = [f"{name}, {rule}" for name in list(result)[-4:] for rule in ("correct", "strict")]
    assert [line.split("  ")[0] for line in table[2:]] == rules
    strict = [f"{rate:.2f}" for rate in result["scores"]["strict"].values()]
    assert table[3].split() == ["scores,", "strict", *strict]
    assert set(result["scores"]["correct"]) == {
        "overall",
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
        "three_object",
        "one_color",
        "text",  # the embedded model never saw one
    }
    assert result["judge_on_true_renders"]["correct"]["text"] == 1.0
    assert result["judge_on_true_renders"]["strict"]["overall"] == 1.0
    for rule in ("correct", "strict"):
        tags = {k: v for k, v in result["scores"][rule].items() if k in TAGS}  # GenEval's
        assert result["scores"][rule]["overall"] == pytest.approx(
            np.mean(list(tags.values())), abs=1e-3
        )
    lines = [
        json.loads(line) for line in (tmp_path / "made" / "images.jsonl").read_text().splitlines()
    ]
    assert [line["index"] for line in lines] == [0, 1] * 9
    assert np.mean([line["correct"] for line in lines[:12]]) == pytest.approx(
        result["scores"]["correct"]["overall"], abs=1e-3
    )
    assert Image.open(tmp_path / "made" / "sheet.png").size[0] > 1000


def test_a_damaged_config_is_named_once(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert (
        main(["generate", "a cat", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "made")])
        == 2
    )
    assert capsys.readouterr().err.count(f"{tmp_path / 'config.json'}") == 1
