"""Files of the real torch.save, read without torch."""

import numpy as np
import pytest

from blip3o_jax.config import ConfigError
from blip3o_jax.convert.pth import open_ta_tok

pytestmark = pytest.mark.parity


def test_what_torch_saves_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5))
    tensors = module.state_dict()
    whole = torch.randn(6, 7)
    tensors |= {"half": torch.randn(3).half(), "brain": torch.randn(2, 2).bfloat16(), "parameter": torch.nn.Parameter(torch.randn(4))}
    tensors |= {"a part": whole[2:4], "the whole": whole, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    args = {"input_size": 384, "bottleneck": {"args": {"bottleneck_dim": 16, "regularizer": {"args": {"stochastic_temperature": 0.03}}}}}
    torch.save({"model": {"args": args, "sd": tensors}, "epoch": 3}, tmp_path / "x.pth")
    read, found = open_ta_tok(tmp_path / "x.pth")
    assert read == {"input_size": 384, "bottleneck_dim": 16, "stochastic_temperature": 0.03}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            assert found[name].code == "I64"
            continue
        assert found[name].shape == tuple(tensor.shape)
        expected = tensor.detach()
        assert found[name].raw().dtype.name == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].read(np.float32), expected.float().numpy())


def test_what_is_no_plain_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch")

    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    for content in ({"a": torch.randn(3, 4).T}, {"sd": {}, "x": Opens()}, {"sd": {}, "x": torch.nn.Linear(1, 1)}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ConfigError, match="is refused"):
            open_ta_tok(tmp_path / "x.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"since PyTorch 1\.6"):
        open_ta_tok(tmp_path / "x.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]
