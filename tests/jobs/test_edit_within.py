"""Edits within a mask: what is kept, over turns and beside other choices, and the mask's name."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
from editing import FLAGS, QUICK, edits, half, picture, save_mask
from PIL import Image

from blip3o_jax.cli import main
from blip3o_jax.errors import InputError
from blip3o_jax.pictures import array
from blip3o_jax.request import Request
from blip3o_jax.sample.settings import EditSettings

pytestmark = pytest.mark.usefixtures("loaded")


@pytest.mark.parametrize("keep_unchanged", [None, 0.0, 20.0])
def test_an_edit_within_a_mask_keeps_the_rest_over_all_turns(pipeline, keep_unchanged):
    image, alpha = picture(20, 30), half()
    given = [image], [["blue", "red"]]
    how = {"settings": EditSettings(**QUICK), "keep_unchanged": keep_unchanged}
    plain = edits(pipeline, *given, **how)
    before = image
    for sample, whole in zip(edits(pipeline, *given, within=alpha, **how), plain, strict=True):
        # The model makes the same; it is mixed with what each turn edits.
        assert sample.square.tobytes() == whole.square.tobytes()
        np.testing.assert_array_equal(sample.image[:, :15], image[:, :15])
        new = np.full((20, 30), 255) if keep_unchanged is None else whole.mask
        np.testing.assert_array_equal(sample.mask[:, :15], 0)
        np.testing.assert_array_equal(sample.mask[:, 15], np.rint(new[:, 15] * (155 / 255)))
        np.testing.assert_array_equal(sample.mask[:, 16:], new[:, 16:])
        if keep_unchanged != 20:
            np.testing.assert_array_equal(sample.image[:, 16:], whole.image[:, 16:])
            edge = before[:, 15] + 155 / 255 * (whole.image[:, 15].astype(float) - before[:, 15])
            assert np.abs(sample.image[:, 15] - edge).max() <= 0.51
        before = sample.image
    assert (before[:, 16:] != image[:, 16:]).any()


def test_a_mask_is_a_path_a_picture_or_an_alpha_for_all_or_for_each(pipeline):
    save_mask("mask.png", half())
    image, other = picture(20, 30), picture(20, 30, 1)
    (expected,) = pipeline.edit(image, "blue", within=half(), **QUICK)
    (plain,) = pipeline.edit(image, "blue", **QUICK)
    assert expected.tobytes() != plain.tobytes()
    for mask in ("mask.png", pathlib.Path("mask.png"), Image.open("mask.png"), [half()]):
        (made,) = pipeline.edit(image, "blue", within=mask, **QUICK)
        assert made.tobytes() == expected.tobytes()
    first, second = pipeline.edit([image, other], ["blue", "x"], within=[half(), None], **QUICK)
    both = pipeline.edit([image, other], ["blue", "x"], within=half(), **QUICK)
    assert first.tobytes() == both[0].tobytes() == expected.tobytes()
    assert second.tobytes() == pipeline.edit(other, "x", **QUICK)[0].tobytes()
    np.testing.assert_array_equal(np.asarray(both[1])[:, :15], other[:, :15])
    nothing = np.full((20, 30), 255, np.uint8)
    np.testing.assert_array_equal(pipeline.edit(image, "blue", within=nothing)[0], image)


def test_a_mask_that_does_not_fit_is_refused_in_python(pipeline):
    image = picture(20, 30)
    for mask, sentence in {
        "few": ([half(), half()], "1 images need as many masks, not 2."),
        "size": (half(30, 20), "The mask is 20 x 30 pixels and the first image 30 x 20 pixels;"),
        "form": (image, r"A mask cannot be used: it is uint8 \[20,30,3\], not uint8 \[h,w\]."),
        "plain": (Image.fromarray(image), "A mask cannot be used: it has no alpha channel."),
    }.values():
        with pytest.raises(InputError, match=sentence):
            pipeline.edit(image, "blue", within=mask)
    with pytest.raises(InputError, match=r"`within` belong to an edit, which has source"):
        Request("blue", within=half())


def test_the_command_edits_within_a_mask_and_names_it(pipeline, channels):
    save_mask("m.png", half())
    argv = ["edit", "a.png", "make it blue", "--within", "m.png", "--mask", "--seed", "3", *FLAGS]
    assert main([*argv, "--checkpoint", channels, "--out", "made/one.png"]) == 0
    how = {"seed": 3, "settings": EditSettings(**QUICK), "within": half()}
    (sample,) = edits(pipeline, [picture(20, 30)], [["make it blue"]], **how)
    image = Image.open("made/one.png")
    np.testing.assert_array_equal(np.asarray(image), sample.image)
    np.testing.assert_array_equal(np.asarray(Image.open("made/one.mask.png")), 255 - half())
    digest = hashlib.sha256(pathlib.Path("m.png").read_bytes()).hexdigest()
    assert json.loads(image.text["within"]) == {"file": "m.png", "sha256": digest}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_a_file_have_masks_of_their_own(kind, pipeline, channels, tmp_path):
    (tmp_path / "lists").mkdir()
    save_mask("m.png", half())
    save_mask("small.png", half(9, 9))
    masks = ["../m.png", None, "../small.png", "../gone.png"]
    rows = [{"image": "../a.png", "instruction": "blue", "within": mask} for mask in masks]
    file = tmp_path / f"lists/edits.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        lines = [",".join([row["image"], "blue", row["within"] or ""]) for row in rows]
        file.write_text("\n".join(["image,instruction,within", *lines]))
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        pq.write_table(pyarrow.Table.from_pylist(rows), file)
    argv = ["edit", "--edits", str(file), "--checkpoint", channels, *FLAGS, "--out", "made"]
    assert main(argv) == 1
    manifest = [json.loads(x) for x in (tmp_path / "made/manifest.jsonl").read_text().splitlines()]
    for row, mask in zip(manifest[:2], (half(), None), strict=True):
        settings = EditSettings(**QUICK)
        (sample,) = edits(pipeline, [array("a.png")], [["blue"]], settings=settings, within=mask)
        made = np.asarray(Image.open(tmp_path / "made" / row["file"]))
        np.testing.assert_array_equal(made, sample.image)
    digest = hashlib.sha256(pathlib.Path("m.png").read_bytes()).hexdigest()
    assert manifest[0]["within"] == {"file": "m.png", "sha256": digest}
    assert "within" not in manifest[1]
    sizes = "The mask is 9 x 9 pixels and the first image 30 x 20 pixels; make them the same size."
    assert manifest[2]["error"].endswith(sizes)
    assert "gone.png cannot be read: No such file or directory." in manifest[3]["error"]


def test_a_mask_that_is_another_one_than_before_is_refused(channels, capsys):
    mask = Image.new("RGBA", (30, 20))
    mask.save("m.png")
    row = {"image": "a.png", "instruction": "make it blue", "within": "m.png"}
    pathlib.Path("edits.jsonl").write_text(json.dumps(row))
    argv = ["edit", "--edits", "edits.jsonl", "--checkpoint", channels, *FLAGS, "--out", "made"]
    assert main(argv) == 0
    before = pathlib.Path("made/manifest.jsonl").read_bytes()
    assert main(argv) == 0
    old = hashlib.sha256(pathlib.Path("m.png").read_bytes()).hexdigest()
    mask.putpixel((3, 3), (0, 0, 0, 255))
    mask.save("m.png")
    new = hashlib.sha256(pathlib.Path("m.png").read_bytes()).hexdigest()
    assert main(argv) == 2
    was, now = capsys.readouterr().err.split(", and these are now ")
    assert f'{{"file": "m.png", "sha256": "{old}"}}]' in was
    assert f'{{"file": "m.png", "sha256": "{new}"}}]: put them back, name' in now
    # Another name, or none, is another job.
    mask.save("n.png")
    for other in ({"within": None}, {"within": "n.png"}):
        pathlib.Path("edits.jsonl").write_text(json.dumps(row | other))
        assert main(argv) == 2
        assert "put them back" not in capsys.readouterr().err
    assert pathlib.Path("made/manifest.jsonl").read_bytes() == before
