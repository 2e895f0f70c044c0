"""Files of tensors against torch itself: what torch.save writes is read here, what is written here torch.load reads."""

import collections

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from latent_diffusion import tensor_files  # noqa: E402
from latent_diffusion.errors import UserError  # noqa: E402


def _tensors():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, generator=generator)
    found = {str(kind).removeprefix("torch."): (x * 10).to(kind) for kind in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.uint16)}
    return found | {
        "parameter": torch.nn.Parameter(x), "buffer": torch.nn.Parameter(x, requires_grad=False),
        "transposed": x.permute(2, 0, 1), "expanded": x[:1].expand(5, 3, 2), "part": x[1:3, ::2], "last": x[3, 2, 1],
        "scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "flat": x.flatten(),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)}


def _numpy(tensor):
    tensor = tensor.detach()
    return (tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            if tensor.dtype == torch.bfloat16 else tensor.numpy())


def _assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        value = _numpy(tensor)
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert np.ascontiguousarray(found[name]).tobytes() == np.ascontiguousarray(value).tobytes(), name


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves(tmp_path, zipped):
    tensors = _tensors()
    if not zipped:
        tensors.pop("uint16")  # the older format has none
    torch.save(tensors, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    _assert_same(tensor_files.open_tensors(tmp_path / "model.pt")[0], tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Embedding(5, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 2,
                "global_step": 1234, "lr": 1e-3, "size": torch.Size([1, 2]), "device": torch.device("cpu"),
                "dtype": torch.float16, "names": collections.OrderedDict(a=[1, (2.5, None)])},
               tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    tensors, rest = tensor_files.open_tensors(tmp_path / "last.ckpt")
    _assert_same(tensors, dict(model.state_dict()))
    assert rest == {"epoch": 2, "global_step": 1234, "lr": 1e-3}


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"module\.pt: the file asks for torch\.nn\.modules\.linear\.Linear"):
        tensor_files.open_tensors(tmp_path / "module.pt")


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_what_is_saved_here(tmp_path, ending):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 2)).astype(np.float32)
    given = {name: (10 * x).astype(kind) for name, kind in (
        ("f32", np.float32), ("f64", np.float64), ("f16", np.float16), ("bf16", ml_dtypes.bfloat16), ("i64", np.int64),
        ("i32", np.int32), ("i16", np.int16), ("i8", np.int8), ("u8", np.uint8), ("bool", np.bool_))}
    given |= {"transposed": x.transpose(2, 0, 1), "scalar": np.array(1.5, np.float32), "empty": np.zeros((0, 3)),
              "count": np.array(-(2**40)), "spread": np.broadcast_to(np.float32(3), (4, 5)), "ü" * 300: x[0]}
    path = tmp_path / f"model.{ending}"
    tensor_files.save_tensors(path, given, step=300_000)
    if ending == "ckpt":
        loaded = torch.load(path, weights_only=True)
        assert loaded["global_step"] == 300_000 and list(loaded["state_dict"]) == list(given)
        assert isinstance(loaded["state_dict"], collections.OrderedDict)
        loaded = loaded["state_dict"]
        assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in loaded.values())
    else:
        import safetensors.torch

        loaded = safetensors.torch.load_file(path)
    _assert_same(given, loaded)
