#!/usr/bin/env bash
# fsspec's recursive rm takes a folder's name for a pattern: told to remove run[1], it removes run1,
# and leaves run[1]. What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --no-compile \
  fsspec==2026.9.0 s3fs==2026.9.0 'moto[server,s3]==5.2.5' boto3==1.43.117 etils[epath]==1.15.0
venv/bin/python - 2>log <<'EOF' || { status=$?; tail -n 5 log; exit "$status"; }
import os

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
os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
os.environ |= {"AWS_ENDPOINT_URL": url, "EPATH_USE_TF": "false"}
from etils import epath

s3 = s3fs.S3FileSystem(use_listings_cache=False)
s3.mkdir("bucket")
WAYS = {
    "s3fs rm(recursive=True)": lambda: s3.rm("bucket/run[1]", recursive=True),
    "etils epath rmtree": lambda: epath.Path("s3://bucket/run[1]").rmtree(),
}
for label, remove in WAYS.items():
    for name in ("run1", "run[1]"):
        s3.pipe(f"bucket/{name}/weights", b"x")
    remove()
    s3.invalidate_cache()
    left = sorted(s3.find("bucket"))
    print(f"{label} of run[1] leaves {left}")
    expect(f"{label}: run1, which was not named, is gone", "bucket/run1/weights" not in left)
    expect(f"{label}: run[1], which was named, is there", "bucket/run[1]/weights" in left)
    for name in left:
        s3.rm_file(name)
server.stop()
raise SystemExit(bool(changed))
EOF
