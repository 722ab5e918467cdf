"""Small sources on disk: picture i is a plain field whose colour says i."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


def picture(i: int, size=(64, 64), kind: str = "png") -> bytes:
    """The field's red is i; a lossless format unless asked."""
    file = io.BytesIO()
    Image.new("RGB", size, (i, 255 - i, 7)).save(file, kind)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path, numbers, changes=()) -> None:
    """KEY.png + KEY.txt of each number; `changes` {number: {extension: bytes or None}}."""
    changes = dict(changes)
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            parts = {"png": picture(i), "txt": f"a red heart {i}".encode()} | changes.get(i, {})
            for extension, data in parts.items():
                if data is not None:
                    add(tar, f"{i:05d}.{extension}", data)


def write_parquet(path, numbers, rows_per_group=4) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in numbers]
    table = pa.table({"image": images, "text": [f"a red heart {i}" for i in numbers]})
    pq.write_table(table, path, row_group_size=rows_per_group)


def write_jsonl(path, numbers, lines=()) -> None:
    """Images beside the file, a line of image and caption each, then `lines` as they are."""
    rows = []
    for i in numbers:
        (path.parent / f"{i}.png").write_bytes(picture(i))
        rows.append(json.dumps({"image": f"{i}.png", "caption": f"a red heart {i}"}))
    path.write_text("\n".join([*rows, *lines]) + "\n")


def number(image) -> int:
    """Which picture it is: of encoded bytes or pixels."""
    pixels = (
        np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        if isinstance(image, bytes)
        else image
    )
    return int(pixels[0, 0, 0])


@pytest.fixture(scope="session")
def made():
    return SimpleNamespace(
        picture=picture,
        add=add,
        tar=write_tar,
        parquet=write_parquet,
        jsonl=write_jsonl,
        number=number,
    )
