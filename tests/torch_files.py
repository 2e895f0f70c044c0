"""Files as PyTorch writes them, made by hand and without it, whole or broken in any way that a test wants."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from unittest import mock

import numpy as np

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
KINDS = {"float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage",
         "bfloat16": "BFloat16Storage", "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage",
         "int8": "CharStorage", "uint8": "ByteStorage", "bool": "BoolStorage"}


class Storage:
    """Numbers in a file, seen by any number of tensors. kind: PyTorch's name of their type. count: how many the file
    says that there are."""

    def __init__(self, values, kind=None, count=None):
        self.values = np.ascontiguousarray(values).reshape(-1)
        self.kind = stand_in("torch", kind or KINDS[self.values.dtype.name])
        self.count = self.values.size if count is None else count


class Tensor:
    """What pickles as a tensor does: a call of `function` on a storage, an offset, a size and strides."""

    def __init__(self, storage, size, stride, offset=0, function="_rebuild_tensor_v2", more=None):
        more = (False, OrderedDict()) if more is None else more
        self.call = stand_in("torch._utils", function), (storage, offset, tuple(size), tuple(stride), *more)

    def __reduce__(self):
        return self.call


class Call:
    """What pickles as a call of `function` on `arguments`, perhaps with a state to be set, items or entries."""

    def __init__(self, function, *arguments, state=None, items=None, entries=None):
        self.reduced = (function, arguments, state, items and iter(items), entries and iter(entries.items()))

    def __reduce__(self):
        return self.reduced


def tensor(array):
    """A whole array, C order."""
    array = np.asarray(array)
    return Tensor(Storage(array), array.shape, [int(np.prod(array.shape[i + 1:])) for i in range(array.ndim)])


def stand_in(module, name):
    """An object that pickles as the global `module`.`name`, which need not exist."""
    if (module, name) not in _GLOBALS:
        _GLOBALS[module, name] = function = lambda *_: None
        function.__module__, function.__qualname__, function.__name__ = module, name, name
    return _GLOBALS[module, name]


_GLOBALS = {}


class _Pickler(pickle.Pickler):
    def __init__(self, file, storages, legacy, protocol):
        super().__init__(file, protocol)
        self.storages, self.legacy = storages, legacy

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        key = next((key for key, storage in self.storages.items() if storage is value), str(len(self.storages)))
        self.storages[key] = value
        return ("storage", value.kind, key, "cpu", value.count) + ((None,) if self.legacy else ())


def pickled(tree, storages, legacy=False, protocol=2):
    """The bytes of a tree; its storages are put into a dict by their keys."""
    stream, modules = io.BytesIO(), {}
    for (module, name), value in _GLOBALS.items():
        for parent in (module.split(".")[0], module):
            modules.setdefault(parent, types.ModuleType(parent))
        setattr(modules[module], name, value)
    with mock.patch.dict(sys.modules, modules):
        _Pickler(stream, storages, legacy, protocol).dump(tree)
    return stream.getvalue()


def write_zip(path, tree, *, program=None, byteorder="little", root="archive", protocol=2, compressed="",
              change=lambda x: x):
    """The format of today. program: bytes in place of the pickled tree. compressed: an entry. change: of {entry: bytes}
    before they are written."""
    storages = {}
    entries = {f"{root}/data.pkl": pickled(tree, storages, protocol=protocol) if program is None else program}
    entries |= {f"{root}/byteorder": byteorder.encode()} if byteorder else {}
    entries |= {f"{root}/data/{key}": storage.values.tobytes() for key, storage in storages.items()}
    entries[f"{root}/version"] = b"3\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name == f"{root}/{compressed}" else zipfile.ZIP_STORED)
    return path


def write_legacy(path, tree, *, program=None, magic=MAGIC, protocol=PROTOCOL, keys=None, lengths=None):
    """The format until PyTorch 1.5. lengths: {key: what stands before a storage's numbers}."""
    storages = {}
    body = pickled(tree, storages, legacy=True) if program is None else program
    machine = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(value, 2) for value in (magic, protocol, machine)] + [body]
    parts.append(pickle.dumps(sorted(storages) if keys is None else keys, 2))
    for key in sorted(storages):
        length = (lengths or {}).get(key, storages[key].count)
        parts += [int(length).to_bytes(8, "little"), storages[key].values.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


FORMATS = {"zip": write_zip, "legacy": write_legacy}
