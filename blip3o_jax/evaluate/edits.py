"""Edits of the embedded world measured: held-out ones, what an edit did to the rest of the picture,
tables and sheets of verdicts.

    edits = heldout(300)
    before, after = pictures(edits)
    images = ...  # uint8 like `after`, made from `before` and the instructions
    roundtrips = ceilings.autoencoded(pipeline, after)
    verdicts = [judge_edit(image, edit) for image, edit in zip(images, edits)]
    measures = [measure(image, edit) for image, edit in zip(images, edits)]
"""

from collections.abc import Mapping, Sequence

import numpy as np

from blip3o_jax.evaluate.scenes import DATA_SEED
from blip3o_jax.pixels import contact_sheet, labelled_sheet, with_legend
from blip3o_jax.registration import shift
from blip3o_jax.scenes.config import WorldConfig
from blip3o_jax.scenes.edits import KINDS, Edit, chain, region, sample
from blip3o_jax.scenes.judge import judge_edit
from blip3o_jax.scenes.scene import compose

SHEET = 48  # edits shown
LEGEND = (
    "Before, result and true picture after. + done, and everything else kept; o done, but "
    "something else changed; - not done"
)
DRIFT_LEGEND = "The picture and what each edit makes of the last result; below, the true pictures."
GAP = 4  # px between the pictures of an edit on the sheet
LEAST_ERROR = 1 / 12  # of pixels, squared: what rounding to whole levels costs, 58.9 dB


def heldout(count: int) -> list[Edit]:
    """`count` edits that ask for held-out combinations, spread evenly over the kinds."""
    world = WorldConfig(seed=DATA_SEED)
    return [sample(world, i, "heldout", {KINDS[i % len(KINDS)]: 1.0}) for i in range(count)]


def pictures(edits: Sequence[Edit]) -> tuple[np.ndarray, np.ndarray]:
    """The true pictures before and after each edit, uint8 [B,64,64,3] twice."""
    before = np.stack([compose(edit.before) for edit in edits])
    return before, np.stack([compose(edit.after) for edit in edits])


def psnr_outside(image: np.ndarray, target: np.ndarray, region: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 [H,W,3] outside a region, bool [H,W].

    At most 58.9, as if both were rounded from equal pictures; NaN where nothing is outside.
    """
    if region.all():
        return float("nan")
    difference = image[~region].astype(np.float64) - target[~region]
    return float(10 * np.log10(255**2 / max(np.square(difference).mean(), LEAST_ERROR)))


def measure(image: np.ndarray, edit: Edit) -> dict[str, float]:
    """psnr (outside the edited region) and shift of a result against the true picture after.

    The region of a new ground is nearly everything, so that its shift is that of the whole picture.
    """
    edited = region(edit)
    after = compose(edit.after)
    blended = np.zeros_like(edited) if edit.kind == "ground" else edited
    return {"psnr": psnr_outside(image, after, edited), "shift": shift(image, after, blended)}


def table(
    edits: Sequence[Edit],
    verdicts: Sequence[Mapping],
    psnrs: Sequence[float],
    roundtrip_psnrs: Sequence[float],
    shifts: Sequence[float],
) -> dict[str, dict[str, float | None]]:
    """By kind and overall: count; shares of success, done and kept; mean psnr and roundtrip_psnr
    (of the autoencoder alone) in dB; the largest shift in px; None where nothing is measured, as
    NaN is not JSON."""
    kinds = np.array([edit.kind for edit in edits])
    result = {}
    for kind in ("overall", *(kind for kind in KINDS if kind in kinds)):
        own = np.flatnonzero((kinds == kind) | (kind == "overall"))
        row: dict[str, float | None] = {"count": len(own)}
        for rule in ("success", "done", "kept"):
            row[rule] = round(float(np.mean([verdicts[i][rule] for i in own])), 4)
        # What cannot be measured is left out, not counted as perfect.
        numbers = {"psnr": psnrs, "roundtrip_psnr": roundtrip_psnrs, "shift": shifts}
        for name, values in numbers.items():
            measured = [values[i] for i in own if not np.isnan(values[i])]
            most = max if name == "shift" else np.mean
            row[name] = round(float(most(measured)), 2) if measured else None
        result[kind] = row
    return result


def heldout_chains(count: int, turns: int) -> list[list[Edit]]:
    """`count` chains of successive edits of scenes that training never drew."""
    return [chain(WorldConfig(seed=DATA_SEED), i, turns) for i in range(count)]


def drift(images: np.ndarray, chains: Sequence[Sequence[Edit]]) -> list[dict[str, float | None]]:
    """What is left of the pictures turn by turn, from the results uint8 [N,T,H,W,3] of N chains:
    psnr against the true picture in dB, where none of the chain's edits changes anything, on
    average (None where there is no such place); the share of chains right so far (success)."""
    rows = []
    changed = [np.logical_or.reduce([region(edit) for edit in edits]) for edits in chains]
    right = np.ones(len(chains), bool)
    for turn, edits in enumerate(zip(*chains, strict=True)):
        shown = list(zip(images[:, turn], edits, strict=True))
        right &= [judge_edit(*pair)["success"] for pair in shown]
        psnrs = [
            psnr_outside(image, compose(edit.after), own)
            for (image, edit), own in zip(shown, changed, strict=True)
            if not own.all()
        ]
        psnr = round(float(np.mean(psnrs)), 2) if psnrs else None
        rows.append({"turn": turn + 1, "success": round(float(right.mean()), 4), "psnr": psnr})
    return rows


def records(
    edits: Sequence[Edit],
    seeds: Sequence[int],
    verdicts: Sequence[Mapping],
    measures: Sequence[Mapping],
) -> list[dict]:
    """Of each edit what was asked, with which seed, the verdict and the measures."""
    rows = []
    for edit, seed, verdict, measured in zip(edits, seeds, verdicts, measures, strict=True):
        asked = {"kind": edit.kind, "instruction": edit.instruction, "seed": seed}
        numbers = {k: None if np.isnan(v) else round(v, 2) for k, v in measured.items()}
        rows.append(asked | dict(verdict) | numbers)
    return rows


def sheet(images: np.ndarray, edits: Sequence[Edit], verdicts: Sequence[Mapping]) -> np.ndarray:
    """`SHEET` edits, those of a kind together: before, result and the true picture after, above a
    sign of LEGEND and the instruction."""
    order = sorted(range(len(edits)), key=lambda i: KINDS.index(edits[i].kind))
    step = max(1, len(order) / SHEET)
    shown = [order[int(k * step)] for k in range(min(SHEET, len(order)))]
    before, after = pictures([edits[i] for i in shown])
    gap = np.full((len(shown), before.shape[1], GAP, 3), 255, np.uint8)
    rows = np.concatenate([before, gap, images[shown], gap, after], axis=2)
    signs = ["+" if v["success"] else "o" if v["done"] else "-" for v in verdicts]
    labels = [f"{signs[i]} {edits[i].instruction}" for i in shown]
    return with_legend(labelled_sheet(rows, labels, columns=3), LEGEND)


def drift_sheet(images: np.ndarray, chains: Sequence[Sequence[Edit]]) -> np.ndarray:
    """`SHEET` chains, a row each, of results uint8 [N,T,H,W,3]: the picture and what each turn made
    of it, the true pictures below, above the instructions."""
    chains, rows = chains[:SHEET], []
    for result, turns in zip(images, chains, strict=False):
        first = compose(turns[0].before)[None]
        truth = np.stack([compose(edit.after) for edit in turns])
        shown = np.concatenate([first, result, first, truth])
        rows.append(contact_sheet(shown, len(turns) + 1, GAP))
    labels = ["; ".join(edit.instruction for edit in turns) for turns in chains]
    return with_legend(labelled_sheet(np.stack(rows), labels, columns=1), DRIFT_LEGEND)
