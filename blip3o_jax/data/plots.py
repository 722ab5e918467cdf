"""Histograms, drawn with Pillow."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax.data.survey import Seen

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 360, 64, 40, 56
INK, BAR, MARK, GRID = (30, 30, 30), (70, 110, 170), (190, 60, 40), (222, 222, 222)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def histogram(
    values: Sequence[float],
    title: str,
    unit: str,
    mark: float | None = None,
    mark_name: str = "",
    log: bool = False,
) -> Image.Image:
    """Bars of counts over `values` [n], linear or in octaves; `mark` is a vertical line, e.g. a
    limit, named in the title's line."""
    # The range, and the counts in it.
    values = np.asarray(values, float)
    ends = [*values, *([] if mark is None else [mark])] or [1.0]
    low, high = min(ends), max(ends)
    scale = np.log2 if log else np.asarray
    low, high = float(scale(max(low, 1e-9) if log else low)), float(scale(high))
    high = high if high > low else low + 1
    counts, edges = np.histogram(scale(values), bins=40, range=(low, high))

    # The axes, the bars and the mark.
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    right, floor = WIDTH - 24, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (right - LEFT)

    top = max(int(counts.max(initial=0)), 1)
    for share in (0, 0.5, 1):
        y = floor - share * (floor - TOP)
        draw.line((LEFT, y, right, y), GRID)
        draw.text((LEFT - 8, y), _short(share * top), INK, font, anchor="rm")
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            draw.rectangle(
                (x(start) + 1, floor - count / top * (floor - TOP), x(end) - 1, floor), BAR
            )
    for value in np.linspace(low, high, 6):
        shown = 2**value if log else value
        draw.text((x(value), floor + 8), _short(shown), INK, font, anchor="ma")
    draw.text(((LEFT + right) / 2, HEIGHT - 10), unit, INK, font, anchor="ms")
    draw.text((LEFT, 12), f"{title}, n = {len(values):,}", INK, font)
    if mark is not None:
        at = x(float(scale(mark)))
        draw.line((at, TOP, at, floor), MARK, 2)
        draw.text((right, 12), f"red: {mark_name} {_short(mark)}", MARK, font, anchor="ra")
    return image


def survey_plots(
    records: list[Seen], image_size: int, max_prompt_tokens: int
) -> dict[str, Image.Image]:
    """Histograms of sizes, shapes and lengths, beside the run's own."""
    sides = [min(s.width, s.height) for s in records]
    ratios = [s.width / s.height for s in records]
    tokens = [s.tokens for s in records]
    octaves = "width / height, in octaves"
    return {
        "sizes": histogram(
            sides, "Shorter side", "pixels, in octaves", image_size, "the run's", log=True
        ),
        "aspect_ratios": histogram(ratios, "Aspect ratio", octaves, 1.0, "square,", log=True),
        "prompt_tokens": histogram(
            tokens, "Prompt", "tokens", max_prompt_tokens, "the longest allowed,"
        ),
    }
