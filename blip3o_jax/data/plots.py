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
    scale = np.log2 if log else np.asarray
    ends = [*values, *([] if mark is None else [mark])] or [1.0]
    low, high = (float(scale(max(end, 1e-9) if log else end)) for end in (min(ends), max(ends)))
    high = high if high > low else low + 1
    counts, edges = np.histogram(scale(np.asarray(values, float)), bins=40, range=(low, high))
    top = max(int(counts.max(initial=0)), 1)
    # The paper.
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    right, floor = WIDTH - 24, HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (right - LEFT)

    def y(share: float) -> float:
        return floor - share * (floor - TOP)

    # The axes, the bars and the mark.
    for share in (0, 0.5, 1):
        draw.line((LEFT, y(share), right, y(share)), GRID)
        draw.text((LEFT - 8, y(share)), _short(share * top), INK, font, anchor="rm")
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            draw.rectangle((x(start) + 1, y(count / top), x(end) - 1, floor), BAR)
    for value in np.linspace(low, high, 6):
        draw.text((x(value), floor + 8), _short(2**value if log else value), INK, font, anchor="ma")
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
    size = "pixels, in octaves", image_size, "the run's"
    shape = "width / height, in octaves", 1.0, "square,"
    length = "tokens", max_prompt_tokens, "the longest allowed,"
    return {
        "sizes": histogram(sides, "Shorter side", *size, log=True),
        "aspect_ratios": histogram(ratios, "Aspect ratio", *shape, log=True),
        "prompt_tokens": histogram(tokens, "Prompt", *length),
    }
