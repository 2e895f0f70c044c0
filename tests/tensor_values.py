"""Tensors of every type, and what is said of a file: that they came through it, or that it is refused."""

import ml_dtypes
import numpy as np
import pytest

from latent_diffusion import tensor_files
from latent_diffusion.errors import UserError

RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal((2, 3, 4)).astype(np.float32)
OF_EVERY_TYPE = {
    "float32": FLOATS, "float64": FLOATS.astype(np.float64), "float16": FLOATS.astype(np.float16),
    "bfloat16": FLOATS.astype(ml_dtypes.bfloat16), "bool": FLOATS > 0,
    "int64": np.array([-(2**60), 2**60]), "int32": np.array([[-(2**30)], [7]], np.int32),
    "int16": np.array([-300, 300], np.int16), "int8": np.array([-128, 127], np.int8),
    "uint8": np.array([0, 255], np.uint8), "scalar": np.array(2.5, np.float32), "count": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_same(tensors, expected):
    assert sorted(tensors) == sorted(expected)
    for name, value in expected.items():
        found, value = np.asarray(tensors[name]), np.asarray(value)
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes()), name


def refused(path, *needles):
    """The one line that refuses a file; it names the file and each of `needles`."""
    with pytest.raises(UserError) as caught:
        tensor_files.open_tensors(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message, message
    for needle in needles:
        assert needle in message, message
    return message
