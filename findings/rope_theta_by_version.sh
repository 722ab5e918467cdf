#!/usr/bin/env bash
# transformers 5 writes the base of the rotary embedding where transformers 4 does not look, and 4
# takes 10000 without a word. What it means for you: findings/README.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv five
python3 -m venv four
five/bin/pip install -qq --no-compile transformers==5.24.0
four/bin/pip install -qq --no-compile transformers==4.57.1
export HF_HUB_OFFLINE=1
five/bin/python - 2>log <<'EOF' || { status=$?; tail -n 5 log; exit "$status"; }
import transformers

print("written by transformers", transformers.__version__)
config = transformers.Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
config.save_pretrained("model")
# The same base as transformers 4 writes it.
transformers.Qwen3Config(rope_theta=1e6).save_pretrained("old_style")
EOF
four/bin/python - 2>log <<'EOF' || { status=$?; tail -n 5 log; exit "$status"; }
import json
import pathlib
import warnings

import transformers

changed = []


def expect(what, holds):
    print("as found:" if holds else "CHANGED: ", what)
    changed.extend([] if holds else [what])


print("read by transformers", transformers.__version__)
said = []
transformers.logging.set_verbosity_warning()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    config = transformers.AutoConfig.from_pretrained("model")
    said += [str(w.message) for w in caught]
written = json.loads(pathlib.Path("model/config.json").read_text())
print("file:", {k: v for k, v in written.items() if "rope" in k}, "read:", config.rope_theta)
expect("transformers 5 writes no rope_theta beside rope_parameters", "rope_theta" not in written)
expect("its rope_parameters hold 1,000,000", written["rope_parameters"]["rope_theta"] == 1e6)
expect("transformers 4 reads the file as a base of 10,000", config.rope_theta == 10000.0)
expect("and warns of nothing", said == [])
# 5 takes the old name as well, and writes the new one.
old_style = json.loads(pathlib.Path("old_style/config.json").read_text())
expect("a base given by its old name is written by the new one", "rope_theta" not in old_style)
# What works for both: the base by both names.
pathlib.Path("model/config.json").write_text(json.dumps(written | {"rope_theta": 1e6}))
again = transformers.AutoConfig.from_pretrained("model")
expect("with rope_theta added to the file, 4 reads 1,000,000", again.rope_theta == 1e6)
raise SystemExit(bool(changed))
EOF
grep -i rope log && { echo "CHANGED:  transformers 4 says something about rope"; exit 1; } || true
