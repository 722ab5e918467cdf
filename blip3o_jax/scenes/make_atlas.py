"""Builds the atlases in blip3o_jax/assets/ from their public sources; run once, the results are
committed.

    python -m blip3o_jax.scenes.make_atlas emoji-datasource-google-16.0.0.tgz
    DejaVuSansMono-Bold.ttf OUT_DIR

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
# our name: (plural, short name in the package)
OBJECTS = {
    "apple": ("apples", "apple"),
    "banana": ("bananas", "banana"),
    "pineapple": ("pineapples", "pineapple"),
    "carrot": ("carrots", "carrot"),
    "pizza": ("pizzas", "pizza"),
    "mushroom": ("mushrooms", "mushroom"),
    "cat": ("cats", "cat"),
    "dog": ("dogs", "dog"),
    "bird": ("birds", "bird"),
    "fish": ("fish", "fish"),
    "butterfly": ("butterflies", "butterfly"),
    "snail": ("snails", "snail"),
    "tree": ("trees", "evergreen_tree"),
    "cactus": ("cacti", "cactus"),
    "flower": ("flowers", "tulip"),
    "star": ("stars", "star"),
    "heart": ("hearts", "heart"),
    "moon": ("moons", "crescent_moon"),
    "key": ("keys", "key"),
    "hat": ("hats", "tophat"),
    "house": ("houses", "house"),
    "car": ("cars", "car"),
    "umbrella": ("umbrellas", "umbrella"),
    "balloon": ("balloons", "balloon"),
    "chair": ("chairs", "chair"),
    "book": ("books", "closed_book"),
    "crown": ("crowns", "crown"),
    "guitar": ("guitars", "guitar"),
}


def fit(image: Image.Image) -> Image.Image:
    """Crops the transparent margin and fits the rest, centred, into SIZE x SIZE; Pillow resizes
    RGBA with premultiplied alpha."""
    image = image.crop(image.getchannel("A").getbbox())
    scale = SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(
        image.resize((width, height), Image.Resampling.LANCZOS),
        ((SIZE - width) // 2, (SIZE - height) // 2),
    )
    return canvas


def make_sprites(package: Path, out: Path) -> None:
    """Writes sprites.png and sprites.json."""
    with tarfile.open(package) as tar:

        def read(name: str) -> bytes:
            return tar.extractfile(f"package/{name}").read()

        version = json.loads(read("package.json"))["version"]
        emoji = {e["short_name"]: e for e in json.loads(read("emoji.json"))}
        rows = -(-len(OBJECTS) // COLUMNS)
        atlas, entries = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE)), []
        for i, (name, (plural, source)) in enumerate(OBJECTS.items()):
            image = Image.open(io.BytesIO(read(f"img/google/64/{emoji[source]['image']}"))).convert(
                "RGBA"
            )
            atlas.paste(fit(image), (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
            entries.append(
                {
                    "name": name,
                    "plural": plural,
                    "source": source,
                    "code_points": emoji[source]["unified"],
                }
            )
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
        ImageDraw.Draw(cell).text(
            (x, (LETTER_HEIGHT - (bottom - top)) // 2 - top), letter, font=font, fill=255
        )
        atlas.paste(cell, (i * LETTER_WIDTH, 0))
    atlas.save(out / "letters.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path)
    parser.add_argument("font", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    make_sprites(arguments.package, arguments.out)
    make_letters(arguments.font, arguments.out)
