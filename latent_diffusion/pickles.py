"""Reads pickles without executing anything in them: only what is named in a table can be built."""

import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from latent_diffusion.errors import UserError


class _Dtype:
    """Stands for numpy.dtype while reading; only plain numbers can be built."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biuf":
            raise UserError(f"arrays of {self.dtype} are not accepted, only numbers; the file was not read")

    def __setstate__(self, state: tuple):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray while reading, so that numpy's own __setstate__ never sees a stranger's state."""

    def __init__(self, *_: Any):
        self.value = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, data = state
        flat = np.frombuffer(data, dtype.dtype)
        self.value = flat.reshape(shape, order="F" if is_fortran else "C").astype(dtype.dtype.newbyteorder("="))


def numpy_names() -> dict[tuple[str, str], Any]:
    """The names in pickles of numpy arrays. Made anew for each file, so that none can change what the next one sees."""
    dtype, array = type("Dtype", (_Dtype,), {}), type("Array", (_Array,), {})
    return {("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
            ("numpy", "dtype"): dtype, ("numpy.core.multiarray", "_reconstruct"): array,
            ("numpy._core.multiarray", "_reconstruct"): array}


def numpy_scalars() -> dict[tuple[str, str], Any]:
    """The names of single numbers of numpy's, for which Python's numbers are made."""
    def scalar(dtype: _Dtype, data: bytes) -> Any:
        return np.frombuffer(data, dtype.dtype, 1)[0].item()

    def encode(text: str, encoding: str) -> bytes:  # how bytes are written in pickles of protocol 2
        if encoding != "latin1":
            raise UserError(f"the file asks for text in {encoding!r}; it was not read")
        return str(text).encode("latin1")

    return {("numpy.core.multiarray", "scalar"): scalar, ("numpy._core.multiarray", "scalar"): scalar,
            ("_codecs", "encode"): encode}


class Opaque:
    """What a pickle may hold and pass on, but neither look into nor change."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None:
        raise UserError("the file changes something after it was made; it was not read")


def printable(text: str) -> str:
    """Text of a stranger's for a message: on one line, without control characters."""
    return text.encode("unicode_escape").decode()


# What objects of training programs are made of: left out like these.
_SKIPPED_NAMES = frozenset(
    {("typing", "Any"), ("collections", "defaultdict"), ("argparse", "Namespace"), ("pathlib", "PosixPath")}
    | {(module, name) for module in ("builtins", "__builtin__")
       for name in ("dict", "list", "tuple", "set", "int", "long", "float", "str", "bool")})
_MOST_NESTED = 16  # tuples in tuples; tensors need 3


class Unpickler(pickle.Unpickler):
    """Builds plain containers and what is in `names`; any other name is refused before it is looked up.

    Args:
      names: (module, name) -> what stands for it.
      what: what the file may hold, for the message.
      persistent: builds what the file refers to outside of the pickle; by default such a reference is refused.
      skipped: top-level packages whose objects are left out, that is, replaced by empty ones.
    """

    def __init__(
        self, file: Any, names: Mapping[tuple[str, str], Any], what: str,
        persistent: Callable[[Any], Any] | None = None, skipped: tuple[str, ...] = (),
    ):
        super().__init__(file, encoding="utf-8")
        self.file = file
        self.names, self.what, self.persistent, self.skipped = dict(names), what, persistent, skipped

    def load(self) -> Any:
        begin = self.file.tell()
        check_program(self.file)
        self.file.seek(begin)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        if self.skipped and (module.split(".")[0] in self.skipped or (module, name) in _SKIPPED_NAMES):
            self.names.setdefault((module, name), type("Skipped", (_Skipped,), {}))
        if (module, name) not in self.names:
            asked = printable(f"{module}.{name}")
            raise UserError(f"the file asks for {asked}, but only {self.what} are accepted; it was not read")
        return self.names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise UserError(f"the file refers to objects outside it, but only {self.what} are accepted; it was not "
                            "read")
        return self.persistent(pid)


def check_program(file: Any) -> None:
    """Refuses a pickle that would take all memory or overflow the interpreter's stack: tuples nested too deeply, which
    a dict would hash, and places of the memo beyond what the pickle itself can have filled.

    Raises UserError, or ValueError for something that is no pickle.
    """
    depths, marks, memo = [], [], {}  # how deeply tuples are nested in each thing on the stack

    def pop(count: int) -> int:
        taken = depths[len(depths) - count :]
        del depths[len(depths) - count :]
        return max(taken, default=0)

    for number, (op, argument, _) in enumerate(pickletools.genops(file)):
        if op.name == "MARK":
            marks.append(len(depths))
            continue
        if op.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            place = len(memo) if op.name == "MEMOIZE" else argument
            if place > number:
                raise UserError("the pickle in the file asks for too much memory; it was not read")
            memo[place] = depths[-1] if depths else 0
            continue
        taken = list(op.stack_before)
        if pickletools.markobject in taken:
            start = marks.pop() if marks else 0
            below = pop(len(depths) - start)
            below = max(below, pop(taken.index(pickletools.markobject)))
        else:
            below = pop(len(taken))
        if op.name in ("BINGET", "LONG_BINGET", "GET"):
            below = memo.get(argument, 0)
        elif op.name == "DUP":
            depths.append(below)
        elif op.name.startswith("TUPLE") or op.name == "FROZENSET":
            below += 1
        elif op.name in ("NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BINPERSID"):  # hashed by what they are, not by contents
            below = 0
        if below > _MOST_NESTED:
            raise UserError("the pickle in the file nests tuples too deeply; it was not read")
        depths.extend([below] * len(op.stack_after[: 1 if op.name == "DUP" else None]))


class _Skipped(dict):
    """Takes whatever it is given, and does nothing with it."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


def unwrapped(value: Any, what: str) -> Any:
    """What was read with the arrays themselves in place of their stand-ins.

    Raises UserError for anything but plain containers, numbers, strings and arrays.
    """
    if isinstance(value, dict) and not isinstance(value, _Skipped):
        return {key: unwrapped(item, what) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(unwrapped(item, what) for item in value)
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise UserError(f"the file holds a {type(value).__name__.strip('_')}, but only {what} are accepted")
