"""`blip3o-jax edit` and `Pipeline.edit` with a tiny random checkpoint: sizes, what an image depends
on, turns, what is written, and every refusal."""

import hashlib
import json
import zlib
from dataclasses import asdict

import jax
import numpy as np
import pytest
from editing import FLAGS, QUICK, TOKENS, checkpoint, edits, half, picture, save_mask
from PIL import Image

import blip3o_jax
from blip3o_jax import geometry
from blip3o_jax.cli import main
from blip3o_jax.errors import InputError
from blip3o_jax.pictures import array
from blip3o_jax.sample.condition import edit_options
from blip3o_jax.sample.settings import EditSettings, Settings

pytestmark = pytest.mark.usefixtures("loaded")


def bytes_of(sample):
    return [getattr(sample, n).tobytes() for n in ("image", "square", "tokens", "latents")]


def test_an_edit_has_its_sources_size_and_depends_on_nothing_of_its_batch(pipeline):
    images = [picture(20, 30), picture(16, 16, 1), picture(33, 7, 2)]
    texts = ["make it blue", "remove the cat", "make it blue"]
    settings = EditSettings(**QUICK, image_guidance_scale=1.5)
    together = edits(pipeline, images, [[text] for text in texts], seed=3, settings=settings)
    assert [s.image.shape for s in together] == [(20, 30, 3), (16, 16, 3), (33, 7, 3)]
    assert [(s.prompt, s.index, s.turn, s.seed, s.mask) for s in together] == [
        (text, 0, 0, 3, None) for text in texts
    ]
    for sample, image, text in zip(together, images, texts, strict=True):
        (alone,) = edits(pipeline, [image], [[text]], seed=3, settings=settings)
        assert bytes_of(alone) == bytes_of(sample)
        place = geometry.placement(image)
        np.testing.assert_array_equal(sample.image, geometry.from_square(sample.square, place))
    # It does depend on source, instruction, seed and index.
    base = {"images": [images[0]], "turns": [[texts[0]]], "seed": 3, "settings": settings}
    for change in ({"images": [images[1]]}, {"turns": [["x"]]}, {"seed": 4}):
        (other,) = edits(pipeline, **base | change)
        assert other.latents.tobytes() != together[0].latents.tobytes()
    first, second = edits(pipeline, **base, num_images=2)
    assert bytes_of(first) == bytes_of(together[0])
    assert second.index == 1
    assert second.latents.tobytes() != first.latents.tobytes()


def test_words_outside_the_embedded_world_are_named(pipeline, monkeypatch, caplog):
    monkeypatch.setattr(pipeline, "run", lambda *_: iter(()))
    images, then = [picture(20, 30)], ["put a dragon in two places"]
    pipeline.edit(images, ["make it silver"], then=then)
    assert caplog.messages == []  # of a checkpoint of one's own
    monkeypatch.setattr(pipeline, "embedded", "emoji_64")
    pipeline.edit(images, ["make the apple natural and then move the cat up"])
    pipeline.edit(images, ["make it silver"], then=then)
    (sentence,) = caplog.messages
    assert sentence.startswith("emoji_64 does not know it, silver, dragon, two, places and draws ")


def test_a_further_turn_edits_the_last_square_from_its_latents(pipeline, monkeypatch):
    given = []
    edit = pipeline._edit

    def spy(params, *inputs, **options):
        given.append(jax.device_get(inputs))
        return edit(params, *inputs, **options)

    monkeypatch.setattr(pipeline, "_edit", spy)
    image = picture(20, 30)
    turns = edits(pipeline, [image], [["blue", "red", "green"]], settings=EditSettings(**QUICK))
    assert [(s.prompt, s.turn) for s in turns] == [("blue", 0), ("red", 1), ("green", 2)]
    assert all(s.image.shape == (20, 30, 3) for s in turns)
    *_, squares, exists, latents = given[0]
    np.testing.assert_array_equal(squares[0, 0], geometry.to_square(image, 16)[0])
    assert (exists[0].tolist(), latents) == ([True], None)
    for before, (*_, squares, exists, latents) in zip(turns, given[1:], strict=False):
        np.testing.assert_array_equal(squares[0, 0], before.square)
        np.testing.assert_array_equal(latents[0, 0], before.latents)
        assert exists[0].tolist() == [True]


def test_several_sources_and_then_one(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "tokens", TOKENS)
    two = blip3o_jax.load(folder, devices=jax.devices()[:1], batch_size=2)
    a, b = picture(20, 30), picture(16, 16, 1)
    settings = EditSettings(**QUICK)

    def latents(*sources):
        (sample,) = edits(two, [list(sources)], [["put both together"]], settings=settings)
        return sample.latents

    pair = latents(a, b)
    assert (pair != latents(b, a)).any()
    assert (pair != latents(a)).any()
    first, second = edits(two, [[a, b]], [["together", "blue"]], settings=settings)
    assert first.image.shape == second.image.shape == (20, 30, 3)
    assert np.isfinite(second.latents).all()
    with pytest.raises(InputError, match=r"Edit 2: 3 source images .* takes 1 to 2"):
        two.edit([a, [a, b, a]], ["x", "y"])
    # Edits of other numbers of turns and sources run beside each other.
    mixed = edits(two, [a, [a, b]], [["x"], ["together", "blue"]], settings=settings)
    assert [(s.prompt, s.turn) for s in mixed] == [("x", 0), ("together", 0), ("blue", 1)]
    assert bytes_of(mixed[2]) == bytes_of(second)


def test_unchanged_pixels_are_kept_over_all_turns(pipeline, monkeypatch):
    """Nothing is new below a threshold that no change reaches, and everything above 0."""
    image = picture(20, 30)
    given = [image], [["blue", "red"]]
    settings = EditSettings(**QUICK)
    for sample in edits(pipeline, *given, settings=settings, keep_unchanged=255):
        np.testing.assert_array_equal(sample.image, image)
        assert not sample.mask.any()
    for sample in edits(pipeline, *given, settings=settings, keep_unchanged=0.0):
        place = geometry.placement(image)
        np.testing.assert_array_equal(sample.image, geometry.from_square(sample.square, place))
        assert (sample.mask == 255).all()
    # What the model makes of the source is compared, not the source: equal to it nothing is new.
    monkeypatch.setattr(
        pipeline,
        "_edit",
        lambda params, ids, valid, keys, squares, exists, latents, **options: {
            "images": pipeline._round_trip(params, squares[:, 0]),
            "latents": np.zeros((2, 2, 2, 16), np.float32),
            "tokens": np.zeros((2, 4), np.int32),
        },
    )
    (sample,) = edits(pipeline, [image], [["blue"]], keep_unchanged=1.0)
    assert np.abs(sample.square.astype(int) - geometry.to_square(image, 16)[0]).mean() > 2
    np.testing.assert_array_equal(sample.image, image)


def test_images_of_any_kind_are_edited_alike(pipeline):
    expected = pipeline.edit("a.png", "make it blue", **QUICK)[0]
    assert expected.size == (30, 20)
    for source in (Image.open("a.png"), picture(20, 30)):
        (image,) = pipeline.edit([source], ["make it blue"], **QUICK)
        assert image.tobytes() == expected.tobytes()


def test_one_pipeline_that_generates_and_edits_compiles_its_decoder_once(pipeline):
    pipeline.generate("a cat", **QUICK)
    pipeline.edit("a.png", "make it blue", keep_unchanged=9.0, **QUICK)
    functions = (pipeline._run, pipeline._edit, pipeline._round_trip)
    pictures = {function.args[0].pictures for function in functions}
    assert [len(program.programs) for program in pictures] == [1]


def test_the_command_edits_a_photograph_as_it_is_shown(channels, tmp_path):
    """Upright, of its turned size; without colour, with a palette, on white."""
    exif = Image.Exif()
    exif[0x0112] = 8
    image = Image.open("a.png")
    files = {
        "turned.png": (image, {"exif": exif}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "palette.png": (image.convert("P"), {"transparency": 0}),
        "half.png": (image.convert("LA"), {}),
        "bit.png": (image.convert("1"), {}),
    }
    for name, (stored, options) in files.items():
        stored.save(name, **options)
    lines = [json.dumps({"image": name, "instruction": "blue"}) for name in files]
    (tmp_path / "kinds.jsonl").write_text("\n".join(lines))
    argv = ["edit", "--edits", "kinds.jsonl", "--keep-unchanged", "255", "--checkpoint", channels]
    assert main([*argv, *FLAGS, "--out", "made"]) == 0
    # With everything unchanged the result is the source.
    for number, name in enumerate(files):
        result = Image.open(tmp_path / f"made/{number:05d}-0-blue.png")
        assert result.size == ((20, 30) if name == "turned.png" else (30, 20))
        np.testing.assert_array_equal(np.asarray(result), array(name))
    turned = np.asarray(Image.open("made/00000-0-blue.png"))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image)))


def test_the_command_writes_what_python_gives_with_its_origin(pipeline, channels, capsys):
    argv = ["edit", "a.png", "make it blue", "--seed", "3", *FLAGS, "--checkpoint", channels]
    argv += ["--keep-unchanged", "9", "--mask", "--image-guidance-scale", "1.5"]
    assert main([*argv, "--out", "made/one.png"]) == 0
    settings = EditSettings(**QUICK, image_guidance_scale=1.5)
    how = {"seed": 3, "settings": settings, "keep_unchanged": 9.0}
    (sample,) = edits(pipeline, [picture(20, 30)], [["make it blue"]], **how)
    image = Image.open("made/one.png")
    np.testing.assert_array_equal(np.asarray(image), sample.image)
    np.testing.assert_array_equal(np.asarray(Image.open("made/one.mask.png")), sample.mask)
    with open("a.png", "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert json.loads(image.text["sources"]) == [{"file": "a.png", "sha256": digest}]
    text = {"instruction": "make it blue", "seed": "3", "turn": "0", "keep_unchanged": "9.0"}
    assert image.text | text == image.text
    assert image.text["checkpoint"] == pipeline.identity
    assert json.loads(image.text["settings"])["image_guidance_scale"] == 1.5
    # The same seed gives the same bytes.
    with open("made/one.png", "rb") as file:
        before = file.read()
    assert main([*argv, "--out", "made/one.png", "--overwrite"]) == 0
    with open("made/one.png", "rb") as file:
        assert file.read() == before


def test_edits_of_a_file_and_their_turns_fill_a_folder(channels, tmp_path):
    (tmp_path / "lists").mkdir()
    rows = [{"image": "../a.png", "instruction": "Blue!"}]
    rows += [{"image": ["../b.png"], "instruction": "remove"}]
    (tmp_path / "lists/a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    argv = ["edit", "--edits", "lists/a.jsonl", "--then", "red", "--checkpoint", channels, *FLAGS]
    assert main([*argv, "--out", "made"]) == 0
    manifest = [json.loads(x) for x in (tmp_path / "made/manifest.jsonl").read_text().splitlines()]
    names = ["00000-0-0-blue", "00000-0-1-red", "00001-0-0-remove", "00001-0-1-red"]
    assert [row["file"] for row in manifest] == [f"{name}.png" for name in names]
    assert len(list((tmp_path / "made").iterdir())) == 6  # with the job's own folder
    assert [row["instructions"] for row in manifest[:2]] == [["Blue!"], ["Blue!", "red"]]
    assert [row["sources"][0]["file"] for row in manifest] == ["a.png"] * 2 + ["b.png"] * 2
    sizes = [Image.open(tmp_path / "made" / row["file"]).size for row in manifest]
    assert sizes == [(30, 20)] * 2 + [(16, 16)] * 2


def test_scales_become_no_more_guidance_than_they_need():
    nulls = {
        (("guidance_scale", 2.0),): ("source",),
        (("guidance_scale", 2.0), ("image_guidance_scale", 1.5)): ("nothing", "source"),
        (): (),
        (("guidance_scale", 2.0), ("reference_quirks", True)): ("original",),
    }
    for changes, expected in nulls.items():
        settings = EditSettings(**dict(changes))
        options = edit_options(settings)
        assert options["guidance_scale"].nulls == expected
        assert options.keys() == asdict(Settings()).keys()


LONG = "make the heart blue and " * 40


def spoilt(tmp_path):
    """Files that cannot be edited."""
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    frames = [Image.new("L", (4, 4), i) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    header = bytearray(whole)
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(header)
    frames = [Image.fromarray(picture(16, 16, seed)) for seed in range(3)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    Image.new("L", (8200, 1)).save(tmp_path / "long.png")
    (tmp_path / "nothing.png").touch()
    save_mask(tmp_path / "m.png", half())
    save_mask(tmp_path / "small.png", half(9, 9))
    rows = ['{"image": "a.png", "instruction": "x"}']
    for name, line in {
        "no_image": '{"instruction": "x"}',
        "no_text": '{"image": "a.png"}',
        "no_json": "{",
        "no_object": "[]",
        "empty": '{"image": "a.png", "instruction": " "}',
        "number": '{"image": 3, "instruction": "x"}',
        "gone": '{"image": "c.png", "instruction": "x"}',
        "long_text": json.dumps({"image": "a.png", "instruction": LONG}),
        "control": '{"image": "a.png", "instruction": "x <S0>"}',
        "several": '{"image": ["a.png", "b.png"], "instruction": "x"}',
        "mask_number": '{"image": "a.png", "instruction": "x", "within": 3}',
        "mask_break": '{"image": "a.png", "instruction": "x", "within": "m\\n.png"}',
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*rows, line]))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "Give an image and an instruction"),
        (["a.png"], "Give an image and an instruction, not 'a.png' alone."),
        (["a.png", "x", "--edits", "empty.jsonl"], "one of the two"),
        (["a.png", " "], "edit: The instruction is empty; write what to change."),
        (["a.png", "x", "--then", ""], "--then: The instruction is empty"),
        (["a.png", LONG], "edit: The instruction 'make the heart blue and make ...' has"),
        (["a.png", "x", "--then", "y", "--then", LONG], "--then: The instruction 'make"),
        (["c.png", "x"], "c.png cannot be read: No such file or directory."),
        (["cut.png", "x"], "cut.png cannot be used: it is truncated."),
        (["text.png", "x"], "text.png cannot be used: its format is unknown."),
        (["nothing.png", "x"], "nothing.png cannot be used: it is empty."),
        ([".", "x"], "The picture . cannot be read: Is a directory."),
        (["moving.webp", "x"], "moving.webp cannot be used: it is animated (3 frames)."),
        (["moving.gif", "x"], "moving.gif cannot be used: it is animated (3 frames)."),
        (["bomb.png", "x"], "bomb.png cannot be used: it has more than 67,108,864 pixels."),
        (["long.png", "x"], "long.png: The picture is 8200 x 1 pixels, more than 8192"),
        (["a.png", "b.png", "x"], "2 source images for one edit; the checkpoint takes 1."),
        (["--edits", "no_image.jsonl"], "no_image.jsonl line 2 has no field `image`."),
        (["--edits", "no_text.jsonl"], "no_text.jsonl line 2 has no field `instruction`."),
        (["--edits", "no_json.jsonl"], "no_json.jsonl line 2 is not JSON: Expecting property"),
        (["--edits", "no_object.jsonl"], "no_object.jsonl line 2 is not a JSON object."),
        (["--edits", "number.jsonl"], "number.jsonl line 2: `image` is not a path"),
        (["--edits", "nowhere.jsonl"], "The edits file nowhere.jsonl cannot be read"),
        (["a.png", "x", "--out", "a.png", "--overwrite"], "would replace a.png"),
        (["a.png", "x", "--out", ".", "--overwrite"], "would replace a.png"),
        (["a.png", "x", "--mask"], "--mask needs --keep-unchanged, or --within"),
        (["--edits", "empty.jsonl", "--mask"], "--mask needs --keep-unchanged, or --within"),
        (["a.png", "x", "--within", "c.png"], "The mask c.png cannot be read: No such file"),
        (["a.png", "x", "--within", ""], "cannot be read: Is a directory."),
        (["a.png", "x", "--within", "b.png"], "The mask b.png cannot be used: it has no alpha"),
        (["a.png", "x", "--within", "cut.png"], "The mask cut.png cannot be used: it"),
        (["a.png", "x", "--within", "text.png"], "mask text.png cannot be used: its format is unk"),
        (
            ["a.png", "x", "--within", "small.png"],
            "small.png: The mask is 9 x 9 pixels and the first image 30 x 20 pixels; make",
        ),
        (["a.png", "x", "--within", "m.png", "--out", "m.png", "--overwrite"], "replace m.png"),
        (["--edits", "empty.jsonl", "--within", "m.png"], "--within is of one edit;"),
        (["--edits", "mask_number.jsonl"], "mask_number.jsonl line 2: `within` is not a path."),
        (["--edits", "mask_break.jsonl"], "line 2: `within` has a line break"),
        (
            ["a.png", "x", "--keep-unchanged", "-1"],
            "--keep-unchanged is a number from 0 to 255, not",
        ),
        (["a.png", "x", "--keep-unchanged", "999"], "is a number from 0 to 255, not 999.0."),
        (["a.png", "x", "--keep-unchanged", "nan"], "is a number from 0 to 255, not nan."),
        (
            ["a.png", "x", "--image-guidance-scale", "inf"],
            "image_guidance_scale is a number from 0",
        ),
        (["a.png", "x", "--renorm-min", "2"], "renorm_min is a number from 0 to 1, not 2.0."),
        (["a.png", "x", "--mesh", "data=0"], "Mesh 'data=0': 'data=0' is not one of data=N"),
        (["a.png", "x", "--mesh", "data=1,data=1"], "data is there twice."),
        (["a.png", "x", "--out", "a.png/b.png"], "blip3o-jax: a.png is not a folder."),
        (
            ["a.png", "x", "--out", f"{'x' * 300}.png"],
            ".png cannot be written: File name too long.",
        ),
        (["--edits", "gone.jsonl", "--out", "d.png"], "c.png cannot be read: No such file"),
        (["a.png", "x", "--reward", "http:///x"], "The reward server 'http:///x' names no host;"),
        (["a.png", "x", "--num-images", "0"], "--num-images is at least 1, not 0."),
        (["a.png", "x", "--then", "y", "--out", "c.png"], "you asked for 2 images"),
        (["a.png", "x", "--checkpoint", "emoji_46"], "did you mean 'emoji_64'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_loaded_or_written(
    argv, sentence, channels, tmp_path, capsys, monkeypatch
):
    def load_for(_):
        raise AssertionError("loaded")

    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", load_for)
    spoilt(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    defaults = [] if "--out" in argv else ["--out", "made"]
    defaults += [] if "--checkpoint" in argv else ["--checkpoint", channels]
    assert main(["edit", *argv, *defaults]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "\n" not in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("long_text", "line 2: The instruction 'make the"),
        ("control", "line 2: The instruction 'x <S0>' contains"),
        ("empty", "line 2: The instruction is empty"),
        ("gone", "line 2: The picture c.png cannot be read"),
        ("several", "line 2: 2 source images"),
    ],
)
def test_a_bad_row_of_a_file_fails_alone(file, reason, channels, loaded, tmp_path):
    spoilt(tmp_path)
    argv = ["edit", "--edits", f"{file}.jsonl", "--checkpoint", channels, *FLAGS, "--out", "made"]
    assert main(argv) == 1
    good, bad = map(json.loads, (tmp_path / "made/manifest.jsonl").read_text().splitlines())
    assert (tmp_path / "made" / good["file"]).is_file()
    assert bad["error"].startswith(f"{file}.jsonl {reason}")


def test_a_checkpoint_without_editing_weights_is_named_first(tmp_path, capsys, monkeypatch):
    def load_for(_):
        raise AssertionError("loaded")

    monkeypatch.setattr("blip3o_jax.jobs.work.load_for", load_for)
    plain = checkpoint(tmp_path / "plain", {})
    for command in (["edit", "a.png", "x"], ["evaluate", "edits"], ["evaluate", "drift"]):
        assert main([*command, "--checkpoint", plain, "--out", "made"]) == 2
        assert "has no editing weights" in capsys.readouterr().err
