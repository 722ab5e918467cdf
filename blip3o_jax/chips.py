"""One table of accelerators: what a chip is called, and what it has."""

import math
from dataclasses import dataclass

from blip3o_jax.errors import require

_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")


@dataclass(frozen=True)
class Chip:
    """An accelerator, from its vendor's data sheet.

    `kind` is how JAX's `device_kind` begins; `peak` the dense bfloat16 FLOP/s of a JAX device, of
    which a chip may be several; `hbm` the MiB of a device that a program may have: where there are
    `layouts`, topologies that can be compiled for, those that the TPU's compiler grants, of a GPU
    the share of launch/env/gpu.env.
    """

    kind: str
    peak: float
    hbm: int
    devices: int = 1
    layouts: tuple[str, ...] = ()


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * 1024),
    "v5e": Chip("TPU v5 lite", 197e12, 16_126, 1, _2D),
    "v5p": Chip("TPU v5", 459e12, 98_025, 1, _3D),
    "v6e": Chip("TPU v6", 918e12, 31_992, 1, _2D),
    "tpu7x": Chip("TPU7x", 2307e12 / 2, 97_012, 2, _3D),
    "a100": Chip("NVIDIA A100", 312e12, 74_500),
    "h100": Chip("NVIDIA H100", 989e12, 74_500),
    "h200": Chip("NVIDIA H200", 989e12, 131_700),
}
GPUS = tuple(name for name, chip in CHIPS.items() if chip.kind.startswith("NVIDIA"))


def chip_of(kind: str) -> Chip | None:
    """The chip of a `device_kind`; "TPU v5 lite" begins like "TPU v5", so the longest match."""
    matches = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    return max(matches, key=lambda chip: len(chip.kind), default=None)


def peak_flops(kind: str) -> float | None:
    """bfloat16 FLOP/s of a device of this kind; None for an unknown one."""
    chip = chip_of(kind)
    return chip.peak if chip else None


def parse_topology(name: str) -> tuple[Chip, int]:
    """(chip, number of JAX devices) of e.g. "v5e:4x4"; InputError for an unknown one."""
    kind, _, layout = name.partition(":")
    known = [f"{kind}:{layout}" for kind, chip in CHIPS.items() for layout in chip.layouts]
    require(name in known, f"Unknown topology {name!r}; known: {', '.join(known)}.")
    chip = CHIPS[kind]
    return chip, chip.devices * math.prod(int(side) for side in layout.split("x"))
