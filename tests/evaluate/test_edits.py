"""Measures of edits: known errors and shifts come out as they are; held-out edits, table, sheet."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.evaluate import edits as measures
from blip3o_jax.pixels import with_legend
from blip3o_jax.scenes.edits import KINDS, Edit, region
from blip3o_jax.scenes.heldout import held_out
from blip3o_jax.scenes.judge import judge_edit
from blip3o_jax.scenes.scene import Scene, Thing, compose

NOWHERE = np.zeros((64, 64), bool)


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return measures.heldout(36)


def shifted(image: np.ndarray, down: float, right: float) -> np.ndarray:
    """The picture moved by fractions of a pixel, on its own ground."""
    ground = tuple(int(level) for level in np.median(image.reshape(-1, 3), axis=0))
    inverse = (1, 0, -right, 0, 1, -down)
    moved = Image.fromarray(image).transform(
        image.shape[:2], Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor=ground
    )
    return np.asarray(moved)


def test_held_out_edits_are_spread_over_the_kinds(edits):
    assert Counter(edit.kind for edit in edits) == dict.fromkeys(KINDS, 6)
    assert all(held_out().combinations(edit.after) for edit in edits)
    assert measures.heldout(7) == edits[:7]
    before, after = measures.pictures(edits)
    assert before.shape == after.shape == (36, 64, 64, 3)
    np.testing.assert_array_equal(after[5], compose(edits[5].after))


def test_psnr_counts_what_is_outside():
    target = np.full((64, 64, 3), 100, np.uint8)
    image = target + np.uint8(10)
    left = np.arange(64) < 32
    mask = np.broadcast_to(left, (64, 64))
    image[mask] = 250
    assert measures.psnr_outside(image, target, mask) == pytest.approx(28.131, abs=1e-3)
    assert measures.psnr_outside(image, target, NOWHERE) < 10
    # below the target as well as above it, although pixels are unsigned
    assert measures.psnr_outside(target, image, mask) == pytest.approx(28.131, abs=1e-3)
    assert measures.psnr_outside(target, target, mask) == pytest.approx(58.92, abs=0.01)
    assert np.isnan(measures.psnr_outside(image, target, ~NOWHERE))


@pytest.mark.parametrize(
    ("down", "right"), [(0, 0), (0.5, 0), (0, -0.5), (-1, 0), (0, 1), (2, 0), (-1.5, 2)]
)
def test_shifts_are_found(down, right):
    things = (Thing("key", None, 1, 1), Thing("cat", "red", 3, 4))
    image = compose(Scene(things, "pink"))
    found = measures.shift(shifted(image, down, right), image, NOWHERE)
    assert found == pytest.approx(np.hypot(down, right), abs=0.08)


def test_a_shift_is_that_of_what_is_outside_the_region():
    """One thing stays, one moves by two cells, which is the edit and no shift."""
    cat, key = Thing("cat", "red", 1, 1), Thing("key", None, 4, 4)
    moved = Thing("cat", "red", 1, 3)
    edit = Edit("move", "", "", Scene((cat, key), "gray"), Scene((moved, key), "gray"))
    before, after = compose(edit.before), compose(edit.after)
    assert measures.shift(after, before, region(edit)) == 0.0
    apart = measures.shift(shifted(after, 1, 0), before, region(edit))
    assert apart == pytest.approx(1, abs=0.1)
    # Of a whole picture, and of one where nothing is left.
    assert measures.shift(before, before, NOWHERE) == 0.0
    assert np.isnan(measures.shift(before, before, ~NOWHERE))
    empty = compose(Scene((), "gray"))
    assert np.isnan(measures.shift(after, empty, NOWHERE))


def test_noise_and_tint_are_no_shift():
    rng = np.random.default_rng(0)
    image = compose(Scene((Thing("dog", None, 1, 1), Thing("hat", "blue", 3, 4)), "cream"))
    worn = np.clip(image * 0.9 + 5 + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    assert measures.shift(worn, image, NOWHERE) <= 0.1


def test_measures_of_every_kind(edits):
    after = [compose(edit.after) for edit in edits]
    for image, edit in zip(after, edits, strict=True):
        perfect = measures.measure(image, edit)
        assert perfect["psnr"] == pytest.approx(58.92, abs=0.01)
        assert perfect["shift"] == 0 or np.isnan(perfect["shift"])
    off = [
        measures.measure(shifted(a, 0, 1), e)["shift"] for a, e in zip(after, edits, strict=True)
    ]
    assert np.nanmean(off) == pytest.approx(1, abs=0.1)
    # a new ground leaves something to measure always
    assert not any(np.isnan(x) for x, edit in zip(off, edits, strict=True) if edit.kind == "ground")


def test_table_and_records(edits):
    verdicts = [{"done": True, "kept": i % 2 == 0, "reason": ""} for i in range(36)]
    verdicts = [v | {"success": v["kept"]} for v in verdicts]
    shifts = [float("nan") if i == 0 else i / 100 for i in range(36)]
    psnrs = [float(i) for i in range(36)]
    table = measures.table(edits, verdicts, psnrs, [30.0] * 36, shifts)
    assert list(table) == ["overall", *KINDS]
    assert table["overall"] == {
        "count": 36,
        "success": 0.5,
        "done": 1.0,
        "kept": 0.5,
        "psnr": 17.5,
        "roundtrip_psnr": 30.0,
        "shift": 0.35,
    }
    # the first kind has the edits 0, 6, ... 30
    assert table["recolor"] | {"psnr": 15.0, "shift": 0.3, "success": 1.0} == table["recolor"]
    assert table["ground"]["success"] == 0.0
    # One line an edit, without NaN, which is not JSON.
    numbers = [{"psnr": p, "shift": s} for p, s in zip(psnrs, shifts, strict=True)]
    records = measures.records(edits, range(36), verdicts, numbers)
    lines = [json.loads(json.dumps(row, allow_nan=False)) for row in records]
    assert [line["instruction"] for line in lines] == [edit.instruction for edit in edits]
    assert lines[0]["shift"] is None
    assert (lines[7]["seed"], lines[7]["shift"], lines[7]["kept"]) == (7, 0.07, False)


def test_sheet_shows_before_result_and_true_after(edits, monkeypatch):
    labels = []
    sheet = measures.labelled_sheet

    def spy(rows, texts, columns):
        labels.extend(texts)
        return sheet(rows, texts, columns)

    monkeypatch.setattr(measures, "labelled_sheet", spy)
    before, after = measures.pictures(edits)
    images = after.copy()
    images[0] = before[0]
    extra = next(i for i, edit in enumerate(edits) if edit.kind == "add")
    images[extra, :12, :12] = 0
    images[extra, -12:, -12:] = 0
    verdicts = [judge_edit(image, edit) for image, edit in zip(images, edits, strict=True)]
    monkeypatch.setattr(measures, "SHEET", 18)
    shown = measures.sheet(images, edits, verdicts)
    # Eighteen of 36, three of a kind, in the order of the kinds.
    assert len(labels) == 18
    kinds = {edit.instruction: edit.kind for edit in edits}
    assert [kinds[label[2:]] for label in labels] == [kind for kind in KINDS for _ in range(3)]
    assert labels[0] == f"- {edits[0].instruction}"
    assert f"o {edits[extra].instruction}" in labels
    assert sum(label.startswith("+ ") for label in labels) == 16
    # The legend is below, on one line here and on several below a narrow sheet.
    cells = sheet(np.zeros((18, 64, 200, 3), np.uint8), [""] * 18, 3)
    assert shown.shape == (len(cells) + 13 + 4, cells.shape[1], 3)
    legend = shown[len(cells) :]
    assert 500 < (legend < 100).any(axis=(0, 2)).nonzero()[0].max() < 600
    assert len(with_legend(cells[:, :200], measures.LEGEND)) == len(cells) + 4 * 13 + 4
    # The first row's pictures at twice the size, with a margin of 2 and 16 beside them.
    cell = shown[2 : 2 + 128, 2 + 16 : 2 + 16 + 400]
    for i, picture in enumerate((before[0], images[0], after[0])):
        np.testing.assert_array_equal(cell[::2, 136 * i : 136 * i + 128 : 2], picture)


def test_drift_is_of_what_no_turn_changes():
    chains = measures.heldout_chains(4, 3)
    assert all(a.after == b.before for chain in chains for a, b in pairwise(chain))
    assert all(edit.kind != "ground" for chain in chains for edit in chain)
    images = np.stack([[compose(edit.after) for edit in chain] for chain in chains])
    perfect = [{"turn": turn, "success": 1.0, "psnr": 58.92} for turn in (1, 2, 3)]
    assert measures.drift(images, chains) == perfect
    # In the second turn, one picture is not edited, and the untouched part of all is 10 levels off.
    for image, chain in zip(images, chains, strict=True):
        untouched = ~np.logical_or.reduce([region(edit) for edit in chain])
        levels = image[1, untouched].astype(int)
        image[1, untouched] = np.where(levels > 127, levels - 10, levels + 10)
    images[0, 1][region(chains[0][1])] = images[0, 0][region(chains[0][1])]
    drift = measures.drift(images, chains)
    assert drift[0] == perfect[0]
    assert (drift[1]["success"], drift[2]["success"]) == (0.75, 0.75)
    assert drift[1]["psnr"] == pytest.approx(28.13, abs=0.01)
    assert drift[2]["psnr"] == 58.92
