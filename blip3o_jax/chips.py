"""One table of accelerators: what a chip is called, and what it has."""

import math
from dataclasses import dataclass

from blip3o_jax.errors import require

_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")


@dataclass(frozen=True)
class Chip:
    """An accelerator, from its vendor's data sheet.

    `kind` is how JAX's `device_kind` begins; `peak` the dense bfloat16 FLOP/s and `hbm` the GiB of
    a JAX device, of which a chip may be several; `layouts` the topologies that can be compiled for.
    """

    kind: str
    peak: float
    hbm: int
    devices: int = 1
    layouts: tuple[str, ...] = ()


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32),
    "v5e": Chip("TPU v5 lite", 197e12, 16, 1, _2D),
    "v5p": Chip("TPU v5", 459e12, 95, 1, _3D),
    "v6e": Chip("TPU v6", 918e12, 32, 1, _2D),
    "tpu7x": Chip("TPU7x", 2307e12 / 2, 96, 2, _3D),
    "a100": Chip("NVIDIA A100", 312e12, 80),
    "h100": Chip("NVIDIA H100", 989e12, 80),
    "h200": Chip("NVIDIA H200", 989e12, 141),
}


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
