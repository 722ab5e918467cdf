"""Builds the atlases in blip3o_jax/assets/ from their public sources; run once, the results are
committed.

    python tests/scenes/make_atlas.py emoji-datasource-google-16.0.0.tgz DejaVuSansMono-Bold.ttf
    OUT_DIR

sprites.png   RGBA, 24x24 sprites in rows of seven, in the order of OBJECTS; sprites.json names them
letters.png   greyscale coverage, A-Z in one row, 8x16 each
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE, COLUMNS = 24, 7
LETTER_WIDTH, LETTER_HEIGHT = 8, 16
PACKAGE = "emoji-datasource-google"
# name, plural, and the short name in the package where it is another
OBJECTS = """
apple apples | banana bananas | pineapple pineapples | carrot carrots | pizza pizzas
mushroom mushrooms | cat cats | dog dogs | bird birds | fish fish | butterfly butterflies
snail snails | tree trees evergreen_tree | cactus cacti | flower flowers tulip | star stars
heart hearts | moon moons crescent_moon | key keys | hat hats tophat | house houses | car cars
umbrella umbrellas | balloon balloons | chair chairs | book books closed_book | crown crowns
guitar guitars
"""


def objects() -> list[tuple[str, str, str]]:
    """(name, plural, short name in the package) of each object, in the atlas's order."""
    entries = [entry.split() for entry in OBJECTS.strip().replace("\n", "|").split("|")]
    return [(name, plural, *(source or [name])) for name, plural, *source in entries]


def fit(image: Image.Image) -> Image.Image:
    """Crops the transparent margin and fits the rest, centred, into SIZE x SIZE; Pillow resizes
    RGBA with premultiplied alpha."""
    image = image.crop(image.getchannel("A").getbbox())
    scale = SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(image, ((SIZE - width) // 2, (SIZE - height) // 2))
    return canvas


def make_sprites(package: Path, out: Path) -> None:
    """Writes sprites.png and sprites.json."""
    with tarfile.open(package) as tar:

        def read(name: str) -> bytes:
            return tar.extractfile(f"package/{name}").read()

        # Each object's picture, in rows.
        version = json.loads(read("package.json"))["version"]
        emoji = {e["short_name"]: e for e in json.loads(read("emoji.json"))}
        rows = -(-len(objects()) // COLUMNS)
        atlas = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE))
        entries = []
        for i, (name, plural, source) in enumerate(objects()):
            file = io.BytesIO(read(f"img/google/64/{emoji[source]['image']}"))
            image = fit(Image.open(file).convert("RGBA"))
            atlas.paste(image, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
            entry = {"name": name, "plural": plural, "source": source}
            entries.append(entry | {"code_points": emoji[source]["unified"]})
    atlas.save(out / "sprites.png", optimize=True)
    lines = ",\n".join("    " + json.dumps(entry) for entry in entries)
    header = f'"package": "{PACKAGE}", "version": "{version}", "size": {SIZE}, "columns": {COLUMNS}'
    (out / "sprites.json").write_text(f'{{\n  {header},\n  "sprites": [\n{lines}\n  ]\n}}\n')


def make_letters(font_path: Path, out: Path) -> None:
    """Writes letters.png: the largest size whose capitals, Q's tail too, fit into a cell."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for points in range(24, 4, -1):
        font = ImageFont.truetype(str(font_path), points)
        boxes = [font.getbbox(c) for c in letters]
        top, bottom = min(b[1] for b in boxes), max(b[3] for b in boxes)
        if bottom - top <= LETTER_HEIGHT and max(b[2] - b[0] for b in boxes) <= LETTER_WIDTH:
            break
    atlas = Image.new("L", (len(letters) * LETTER_WIDTH, LETTER_HEIGHT))
    for i, (letter, box) in enumerate(zip(letters, boxes, strict=True)):
        cell = Image.new("L", (LETTER_WIDTH, LETTER_HEIGHT))
        x = (LETTER_WIDTH - (box[2] - box[0])) // 2 - box[0]
        y = (LETTER_HEIGHT - (bottom - top)) // 2 - top
        ImageDraw.Draw(cell).text((x, y), letter, font=font, fill=255)
        atlas.paste(cell, (i * LETTER_WIDTH, 0))
    atlas.save(out / "letters.png", optimize=True)


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    for name in ("package", "font", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    make_sprites(arguments.package, arguments.out)
    make_letters(arguments.font, arguments.out)
