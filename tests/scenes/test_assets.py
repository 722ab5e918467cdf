"""The committed art and held-out combinations are what their scripts make."""

import io
import json
import tarfile

import numpy as np
from PIL import Image
from scenes import make_atlas, make_heldout

from blip3o_jax.resources import ASSETS


def test_the_atlas_is_what_the_script_makes_of_its_sprites(tmp_path):
    """Each sprite in the middle of a larger transparent picture, as the package has them, comes
    back in its place and with its names."""
    atlas = Image.open(ASSETS / "sprites.png")
    index = json.loads((ASSETS / "sprites.json").read_text())
    files = {"package.json": json.dumps({"version": index["version"]}).encode()}
    emoji = []
    for i, entry in enumerate(index["sprites"]):
        x, y = i % 7 * 24, i // 7 * 24
        canvas = Image.new("RGBA", (64, 64))
        canvas.paste(atlas.crop((x, y, x + 24, y + 24)), (20, 20))
        picture = io.BytesIO()
        canvas.save(picture, "png")
        files[f"img/google/64/{i}.png"] = picture.getvalue()
        names = {"short_name": entry["source"], "unified": entry["code_points"]}
        emoji.append(names | {"image": f"{i}.png"})
    files["emoji.json"] = json.dumps(emoji[::-1]).encode()
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    make_atlas.make_sprites(tmp_path / "package.tgz", tmp_path)
    again = Image.open(tmp_path / "sprites.png")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(atlas))
    assert (tmp_path / "sprites.json").read_bytes() == (ASSETS / "sprites.json").read_bytes()


def test_the_held_out_combinations_are_those_that_the_script_draws():
    assert (ASSETS / "heldout.json").read_text() == make_heldout.written()
