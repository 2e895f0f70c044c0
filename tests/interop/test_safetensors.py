"""Files of safetensors: the numbers come out as they went in, and a damaged file is refused."""

import struct

import numpy as np
import pytest
import safetensors.numpy
from tensor_values import FLOATS, OF_EVERY_TYPE, assert_same, refused

from latent_diffusion import tensor_files


@pytest.mark.parametrize("name", list(OF_EVERY_TYPE))
def test_safetensors(tmp_path, name):
    path, value = tmp_path / "x.safetensors", OF_EVERY_TYPE[name]
    safetensors.numpy.save_file({"x": value, "y": np.ones(1)}, path, {"format": "pt"})
    tensors, rest = tensor_files.open_tensors(path)
    assert_same(tensors, {"x": value, "y": np.ones(1)})
    assert len(tensors) == 2 and "z" not in tensors and rest == {"format": "pt"}


def test_safetensors_written_by_hand(tmp_path):
    header = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f\x20\xc0")
    np.testing.assert_array_equal(tensor_files.open_tensors(tmp_path / "x")[0]["x"].astype(np.float32), [1.0, -2.5])


def test_cut_safetensors(tmp_path):
    safetensors.numpy.save_file({"x": FLOATS}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in (12, 40, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        refused(tmp_path / "cut", "damaged")
    (tmp_path / "cut").write_bytes(struct.pack("<Q", 2**60) + b'{"x":1}')
    refused(tmp_path / "cut", "damaged")
