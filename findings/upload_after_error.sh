#!/usr/bin/env bash
# fsspec ends an upload that an exception interrupts: half of the object stands under its name, as
# if it were whole. What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  fsspec==2026.9.0 s3fs==2026.9.0 'moto[server,s3]==5.2.5' boto3==1.43.117
venv/bin/python - 2>log <<'EOF' || { status=$?; tail -n 5 log; exit "$status"; }
import fsspec
import s3fs
from moto.server import ThreadedMotoServer

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


print("fsspec", fsspec.__version__, "s3fs", s3fs.__version__)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
url = "http://{}:{}".format(*server.get_host_and_port())
s3 = s3fs.S3FileSystem(key="key", secret="secret", endpoint_url=url)
s3.mkdir("bucket")


def half_written(filesystem, name, data):
    """Bytes of what stands under the name after a `with` block that raised halfway; None where
    nothing does."""
    try:
        with filesystem.open(name, "wb") as file:
            file.write(data)
            raise RuntimeError("the second half could not be made")
    except RuntimeError:
        pass
    return filesystem.size(name) if filesystem.exists(name) else None


few, many = b"x" * 1000, b"x" * (12 << 20)  # one request; an upload in parts
for filesystem, label in ((s3, "s3fs"), (fsspec.filesystem("memory"), "fsspec's memory")):
    for data in (few, many):
        size = half_written(filesystem, f"bucket/{len(data)}", data)
        print(f"{label}: {len(data)} bytes written, then an exception; the object has {size}")
        expect(f"{label}: what was written until then is the object", size == len(data))

try:
    with s3.transaction, s3.open("bucket/in-transaction", "wb") as file:
        file.write(few)
        raise RuntimeError("the second half could not be made")
except RuntimeError:
    pass
expect("s3fs: within `transaction` nothing is left", not s3.exists("bucket/in-transaction"))
server.stop()
raise SystemExit(bool(changed))
EOF
