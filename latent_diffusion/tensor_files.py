"""Files of tensors that other programs wrote: safetensors, and PyTorch's own (`torch.save`), without torch.

PyTorch's files are pickles, and a pickle is a program. Here it is interpreted with a table of the few names that
tensors need; whatever else it names is refused before it is looked up, so nothing in a file is ever executed. Arrays
are views of the file, which is mapped into memory: a file needs memory only for the parts that are looked at.
"""

import io
import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from latent_diffusion import pickles
from latent_diffusion.errors import UserError

# Element types by the names that PyTorch gives its storages.
_STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_, "UntypedStorage": np.uint8,
}
_DTYPES = {
    "float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "uint16": np.uint16,
    "uint32": np.uint32, "uint64": np.uint64, "bool": np.bool_,
}
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# Training programs leave their settings beside the weights, as objects of these packages. They are skipped.
_SKIPPED = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf")
_WHAT = "tensors, ordered dicts and plain numbers"
_UNREAD = "it was not read"

Storage = Callable[[str, np.dtype, int], np.ndarray | None]


def open_tensors(path: epath.PathLike) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file by name, and what else it holds.

    Args:
      path: a ``.safetensors`` file or what `torch.save` wrote (``.ckpt``, ``.pt``, ``.bin``, in either of its formats),
        told apart by their contents. If it has a ``state_dict``, as checkpoints of Lightning have, its tensors are
        meant.

    Returns:
      (tensors, rest): tensors are read-only views of the file, or read when asked for; of the types that they have
      there, float16 and bfloat16 too. ``rest`` has plain values beside them, such as ``global_step``.

    Raises:
      UserError: no such file, another format, a damaged file, or one that asks for anything but tensors, plain
        containers and numbers; the message names what it asks for.
    """
    path = epath.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is no file")
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start[8:9] == b"{":  # after the length of its header, whose first byte may be any
            return _safetensors(path)
        if start[:4] == _ZIP_MAGIC or start[:1] == b"\x80":  # an archive, or a pickle
            return _tensors_of(_load_torch(_mapped(path)))
        raise UserError(f"neither a safetensors file nor one that torch.save wrote; {_UNREAD}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged or hostile file may raise nearly anything
        reason = pickles.printable((str(error).strip() or "no reason given").splitlines()[0])
        raise UserError(f"{path} is damaged, or no file of tensors ({type(error).__name__}: {reason})") from error


def _mapped(path: epath.Path) -> bytes | mmap.mmap:
    """The contents of a file: those of a bucket in memory, those of a disk where they are."""
    if "://" in str(path):
        return path.read_bytes()
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _tensors_of(tree: Any) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    if not isinstance(tree, dict):
        raise UserError(f"the file holds a {type(tree).__name__} instead of a dict of tensors")
    state = tree.get("state_dict", tree)
    tensors = {name: value.array for name, value in (state.items() if isinstance(state, dict) else ())
               if isinstance(name, str) and isinstance(value, _Numbers)}
    if not tensors:
        raise UserError("the file holds no tensors, neither in its state_dict nor beside it")
    return tensors, {name: value for name, value in tree.items() if isinstance(value, bool | int | float | str)}


# --- safetensors -----------------------------------------------------------------------------------------------------


class _Lazy(Mapping):
    """Tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, file: Any):
        self.file, self.names = file, frozenset(file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


def _safetensors(path: epath.Path) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    import safetensors
    import safetensors.numpy

    if "://" in str(path):
        return safetensors.numpy.load(path.read_bytes()), {}
    file = safetensors.safe_open(path, framework="numpy")
    return _Lazy(file), dict(file.metadata() or {})


# --- PyTorch's files: the pickle -------------------------------------------------------------------------------------


class _Kind(pickles.Opaque):
    """Stands for a type of numbers, or of a storage of them."""

    __slots__ = ("dtype",)

    def __init__(self, kind: Any):
        self.dtype = np.dtype(kind)


class _Numbers(pickles.Opaque):
    """Stands for a storage or a tensor. The array stays out of the pickle's reach: what a tensor is a view of could be
    taken away from under it there. None where the numbers are not known yet."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray | None):
        self.array = array


def _view(storage: np.ndarray, offset: int, size: Any, stride: Any) -> np.ndarray:
    """A tensor: the numbers of its storage, by their places."""
    size, stride, offset = tuple(map(int, size)), tuple(map(int, stride)), int(offset)
    if len(size) != len(stride) or min(offset, *size, *stride, 0) < 0:
        raise UserError(f"a tensor of size {size}, strides {stride} and offset {offset} is impossible; {_UNREAD}")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= storage.size:
        raise UserError(f"a tensor of size {size} does not fit into its storage of {storage.size} numbers; {_UNREAD}")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _names() -> dict[tuple[str, str], Any]:
    """What a file may name. Made anew for each, so that none can change what the next one sees."""
    def tensor(storage: _Numbers, offset: int, size: Any, stride: Any, *_: Any) -> _Numbers:
        return _Numbers(None if storage.array is None else _view(storage.array, offset, size, stride))

    def tensor_v3(
        storage: _Numbers, offset: int, size: Any, stride: Any, _: Any, __: Any, kind: _Kind, *___: Any
    ) -> _Numbers:
        return tensor(_Numbers(None if storage.array is None else storage.array.view(kind.dtype)), offset, size, stride)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    def size(values: Any = ()) -> tuple:
        return tuple(values)

    def device(*_: Any) -> None:
        return None

    functions = {"_rebuild_tensor": tensor, "_rebuild_tensor_v2": tensor, "_rebuild_tensor_v3": tensor_v3,
                 "_rebuild_parameter": parameter, "_rebuild_parameter_with_state": parameter}
    return (
        {("collections", "OrderedDict"): OrderedDict, ("torch", "Size"): size, ("torch", "device"): device}
        | {("torch._utils", name): function for name, function in functions.items()}
        | {(module, name): _Kind(kind) for name, kind in _STORAGES.items() for module in ("torch", "torch.storage")}
        | {("torch", name): _Kind(kind) for name, kind in _DTYPES.items()}
        | pickles.numpy_names() | pickles.numpy_scalars()
    )


def _unpickle(file: Any, storage: Storage) -> Any:
    """The object of a pickle whose tensors' numbers come from `storage` (key, type, how many)."""
    def persistent(pid: Any) -> _Numbers:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _Kind)):
            raise UserError(f"the file refers to an object outside it that is no tensor's storage; {_UNREAD}")
        _, kind, key, _, count, *view = pid
        if not isinstance(count, int) or count < 0:
            raise UserError(f"the storage {key!r} has an impossible length; {_UNREAD}")
        if view and view[0] is not None:
            raise UserError(f"the storage {key!r} is a view of another one, as PyTorch wrote them before 0.4 only; "
                            "save the file again with a newer PyTorch")
        return _Numbers(storage(str(key), kind.dtype, count))

    return pickles.Unpickler(file, _names(), _WHAT, persistent, _SKIPPED).load()


# --- PyTorch's files: where the numbers are --------------------------------------------------------------------------


def _load_torch(buffer: bytes | mmap.mmap) -> Any:
    return _load_zip(buffer) if buffer[:4] == _ZIP_MAGIC else _load_legacy(buffer)


def _load_zip(buffer: bytes | mmap.mmap) -> Any:
    """The format since PyTorch 1.6: an archive of ``data.pkl`` and an uncompressed file for each storage."""
    archive = zipfile.ZipFile(io.BytesIO(buffer) if isinstance(buffer, bytes) else buffer)
    entries = {info.filename: info for info in archive.infolist()}
    roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise UserError(f"an archive without data.pkl, so torch.save did not write it; {_UNREAD}")

    def contents(name: str) -> memoryview:
        info = entries.get(roots[0] + name)
        if info is None:
            raise UserError(f"the archive lacks {name}, it is damaged; {_UNREAD}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(f"{name} is compressed in the archive, which torch.save never does; {_UNREAD}")
        header = info.header_offset
        begin = header + 30 + sum(int.from_bytes(buffer[header + at : header + at + 2], "little") for at in (26, 28))
        if buffer[header : header + 4] != _ZIP_MAGIC or begin + info.file_size > len(buffer):
            raise UserError(f"the archive is damaged at {name}; {_UNREAD}")
        return memoryview(buffer)[begin : begin + info.file_size]

    big_endian = roots[0] + "byteorder" in entries and bytes(contents("byteorder")) == b"big"

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        data = contents(f"data/{key}")
        if len(data) != count * dtype.itemsize:
            raise UserError(f"the storage {key!r} has {len(data)} bytes instead of {count * dtype.itemsize}; {_UNREAD}")
        values = np.frombuffer(data, dtype)
        return values.byteswap() if big_endian else values

    return _unpickle(io.BytesIO(contents("data.pkl")), storage)


def _load_legacy(buffer: bytes | mmap.mmap) -> Any:
    """The format before: pickles of a magic number, the protocol, the machine, the object and the storages' keys; then
    of each storage its length, eight bytes, and its numbers. The object is read twice, since it comes before its
    numbers."""
    file = io.BytesIO(buffer) if isinstance(buffer, bytes) else buffer
    declared: dict[str, tuple[np.dtype, int]] = {}
    arrays: dict[str, np.ndarray] = {}

    def declare(key: str, dtype: np.dtype, count: int) -> None:
        if declared.setdefault(key, (dtype, count)) != (dtype, count):
            raise UserError(f"the storage {key!r} has two types or two lengths; {_UNREAD}")

    if _unpickle(file, declare) != _LEGACY_MAGIC:
        raise UserError(f"the pickle does not begin with the magic number of torch.save; {_UNREAD}")
    if (protocol := _unpickle(file, declare)) != _LEGACY_PROTOCOL:
        raise UserError(f"protocol {protocol!r} of torch.save is unknown, only {_LEGACY_PROTOCOL} is; {_UNREAD}")
    _unpickle(file, declare)
    begin = file.tell()
    _unpickle(file, declare)
    keys = _unpickle(file, declare)
    place = file.tell()
    if not isinstance(keys, list) or set(keys) != set(declared):
        raise UserError(f"the storages in the file are not those of its tensors; {_UNREAD}")
    for key in keys:
        dtype, count = declared[key]
        length, end = int.from_bytes(buffer[place : place + 8], "little"), place + 8 + count * dtype.itemsize
        if length != count or end > len(buffer):
            raise UserError(f"the storage {key!r} has {length} numbers instead of {count}, or the file is cut; "
                            f"{_UNREAD}")
        arrays[key] = np.frombuffer(buffer, dtype, count, place + 8)
        place = end
    file.seek(begin)
    return _unpickle(file, lambda key, *_: arrays[key])


# --- writing ---------------------------------------------------------------------------------------------------------


def save_tensors(path: epath.PathLike, tensors: Mapping[str, np.ndarray], step: int = 0) -> None:
    """Writes a file of tensors: safetensors if its name says so, else what ``torch.load(path)["state_dict"]`` reads.

    Args:
      path: ends with ``.safetensors``, ``.ckpt``, ``.pt`` or ``.pth``; on a local disk.
      tensors: by name, of the types that PyTorch has.
      step: written as ``global_step`` into PyTorch's.

    Raises UserError for another ending, or a type that PyTorch's files do not have.
    """
    path = epath.Path(path)
    check_ending(path)
    if path.suffix == ".safetensors":
        import safetensors.numpy

        safetensors.numpy.save_file({name: np.asarray(x, order="C") for name, x in tensors.items()}, path)
    else:
        _save_zip(path, tensors, step)


def check_ending(path: epath.Path) -> None:
    """Raises UserError for the name of a file that `save_tensors` does not write."""
    if path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth"):
        raise UserError(f"{path}: a file of weights ends with .safetensors, .ckpt, .pt or .pth")


def _save_zip(path: epath.Path, tensors: Mapping[str, np.ndarray], step: int) -> None:
    storages = {np.dtype(kind): name for name, kind in _STORAGES.items() if name != "UntypedStorage"}
    ordered_dict = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    program = [pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK]
    program += [_pickled("state_dict"), ordered_dict, pickle.MARK]
    for number, (name, x) in enumerate(tensors.items()):
        if x.dtype not in storages:
            raise UserError(f"{name} is of type {x.dtype}, which {path.suffix} files do not have; write .safetensors")
        stride = tuple(int(np.prod(x.shape[i + 1 :], dtype=int)) for i in range(x.ndim))  # as it is written, C order
        place = (_pickled("storage"), _global("torch", storages[x.dtype]), *map(_pickled, (str(number), "cpu", x.size)))
        program += [
            _pickled(name), _global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK, _tuple(place), pickle.BINPERSID,
            *map(_pickled, (0, x.shape, stride)), pickle.NEWFALSE, ordered_dict, pickle.TUPLE, pickle.REDUCE]
    program += [pickle.SETITEMS, _pickled("global_step"), _pickled(step), pickle.SETITEMS, pickle.STOP]
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join(program))
        archive.writestr("archive/byteorder", "little")
        for number, x in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{number}", x.astype(x.dtype.newbyteorder("<"), copy=False).tobytes())
        archive.writestr("archive/version", "3\n")


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(parts: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _pickled(value: str | int | tuple[int, ...]) -> bytes:
    """The instructions that make a value, of pickle's protocol 2."""
    if isinstance(value, tuple):
        return _tuple(map(_pickled, value))
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + len(text).to_bytes(4, "little") + text
    number = pickle.encode_long(int(value))
    return pickle.LONG1 + bytes([len(number)]) + number
