"""Proof that `plan` goes by what the TPU's compiler goes by: a shipped training step at the most
rows that the compiler takes, and at a few more, which it refuses.

    python tests/plan/compiler_limit.py [--config emoji_recital] [--topology v5e:2x2] [--depth N]
        [--low ROWS] [--step ROWS]

Rows a device are searched, each planned as `blip3o-jax plan` does, from --low, of which twice as
many must fit. The planned bytes of the most that fit must be below the chip's limit by less than a
hundredth, and the limit that of the compiler's refusal of at most --step rows more. One JSON line
last; exit code 1 if not.
"""

import argparse
import dataclasses
import json
import re
import sys
import time

from blip3o_jax.chips import Chip
from blip3o_jax.parallel.batches import batch_shards
from blip3o_jax.parallel.mesh import make_mesh
from blip3o_jax.plan import estimate, programs
from blip3o_jax.train.read_config import read_config

NEAR = 0.01  # of the limit: how near to it the most rows must come
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def asked(reason: str) -> tuple[float, float]:
    """(bytes that the program needs, bytes that there are) of the compiler's refusal."""
    amounts = re.findall(r"([\d.]+)([KMG])\b", reason)
    needs, limit = (float(number) * UNITS[unit] for number, unit in amounts[:2])
    return needs, limit


def planned(args: argparse.Namespace, devices: list, chip: Chip, rows: int) -> dict:
    """`plan` of the step with `rows` rows a device at once."""
    cfg = programs.on_accelerator(read_config(args.config, []))
    cfg = programs.shallow(cfg, args.depth) if args.depth else cfg
    mesh = make_mesh(cfg.mesh, devices)
    batch_size = rows * batch_shards(mesh)
    cfg = dataclasses.replace(cfg, batch_size=batch_size, accumulate=1)
    began = time.perf_counter()
    result = estimate.measure(programs.lower_step(cfg, mesh), chip)
    seconds = round(time.perf_counter() - began)
    print(json.dumps({"rows": rows, "seconds": seconds} | result), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--config", default="emoji_recital")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--low", type=int, default=1024)
    parser.add_argument("--step", type=int, default=32)
    args = parser.parse_args()
    devices, chip = programs.open_topology(args.topology)
    limit = chip.hbm * estimate.MIB
    # Two that fit say what a row needs, and so where to look; a refusal says where not to.
    before, low, high, refused = args.low, 2 * args.low, None, None
    fewer, taken = (planned(args, devices, chip, rows) for rows in (before, low))
    while high is None or high - low > args.step:
        total = taken["bytes"]["total"]
        row = (total - fewer["bytes"]["total"]) / (low - before)
        rows = low + max(args.step, int((limit - total) / row))
        rows = rows if high is None or rows < high else (low + high) // 2
        result = planned(args, devices, chip, rows)
        if "reason" in result:
            high, refused = rows, result
        else:
            before, fewer, low, taken = low, taken, rows, result
    # What is planned at the one, and what the compiler says of the other.
    total = taken["bytes"]["total"]
    needs, granted = asked(refused["reason"])
    summary = {"fits": low, "planned": total, "limit": limit, "refused": high, "needs": needs}
    agrees = taken["fits"] and limit - total < NEAR * limit and abs(granted - limit) < NEAR * limit
    print(json.dumps(summary | {"granted": granted, "agrees": agrees}))
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
