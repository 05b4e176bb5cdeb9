"""Tensors from a file that torch.save wrote before its version 1.6, read without torch, and without running its code.

Such a file holds pickles one after the other: a magic number, a version, what machine wrote it, the object, the names
of the storages; then the bytes of each storage. An unpickler can call whatever a pickle names, so this one refuses all
but what tensors are made of.
"""

import collections
import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001

_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _Storage(NamedTuple):
    """The numbers that tensors are views of; they come after the pickle."""

    name: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any) -> _Tensor:
    """In place of torch's function; what is not used says how to train the tensor."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage.")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
} | {("torch", name): dtype for name, dtype in _DTYPES.items()}


class _Unpickler(pickle.Unpickler):
    """Knows nothing but numbers, texts, containers and tensors; keeps the storages that it was told of."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it asks for {module}.{name}, which no tensor needs, so it was not read on.")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, name, _, size, view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or view is not None:
            raise ValueError(f"it refers to {str(pid)[:100]}, which is no whole storage.")
        return self.storages.setdefault(name, _Storage(str(name), dtype, int(size)))


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name.

    Raises:
      ValueError: if the file asks for anything else than tensors, naming it, or is no such file, or is cut off.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except (ValueError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    head = [_Unpickler(file).load() for _ in range(3)]
    if head[:2] != [_MAGIC, _VERSION]:
        raise ValueError("it is no file of torch.save before version 1.6.")
    if not head[2]["little_endian"]:
        raise ValueError("it was written on a machine of other byte order.")
    unpickler = _Unpickler(file)
    tensors, names = unpickler.load(), _Unpickler(file).load()
    if not isinstance(tensors, dict) or not all(isinstance(tensor, _Tensor) for tensor in tensors.values()):
        raise ValueError("it holds something else than a dict of tensors.")
    numbers = {name: _numbers(file, unpickler.storages[name]) for name in names}
    return {str(name): _array(tensor, numbers[tensor.storage.name]) for name, tensor in tensors.items()}


def _numbers(file: BinaryIO, storage: _Storage) -> bytes:
    """The bytes of one storage, after their count."""
    if int.from_bytes(file.read(8), "little") != storage.size:
        raise ValueError(f"storage {storage.name} is not of {storage.size} numbers.")
    content = file.read(storage.size * storage.dtype.itemsize)
    if len(content) < storage.size * storage.dtype.itemsize:
        raise ValueError("it is cut off.")
    return content


def _array(tensor: _Tensor, content: bytes) -> np.ndarray:
    """A copy of a tensor's numbers; NumPy refuses views that reach beyond them."""
    dtype = tensor.storage.dtype
    offset, strides = (np.multiply(counts, dtype.itemsize).tolist() for counts in (tensor.offset, tensor.strides))
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, dtype)
    return np.ndarray(tensor.shape, dtype, content, offset, strides).copy()
