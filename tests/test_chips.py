import pytest

from blip3o_jax.chips import CHIPS, chip_of, parse_topology, peak_flops
from blip3o_jax.errors import InputError


def test_the_longest_name_of_a_device_kind_counts():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None


def test_a_kind_finds_its_chip():
    assert chip_of("TPU v6 lite") is CHIPS["v6e"]
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("TPU v9") is None


def test_a_topology_counts_devices_not_chips():
    assert parse_topology("v5p:4x4x8") == (CHIPS["v5p"], 128)
    assert parse_topology("tpu7x:2x2x1") == (CHIPS["tpu7x"], 8)  # a chip is two devices
    assert CHIPS["tpu7x"].peak * 2 == 2307e12


@pytest.mark.parametrize("name", ["v5e:3x5", "v9:2x2", "v5e", "v4:", "a100:1"])
def test_an_unknown_topology_names_the_known_ones(name):
    with pytest.raises(InputError, match=r"known: v5e:2x2, .*tpu7x:4x8x8"):
        parse_topology(name)
