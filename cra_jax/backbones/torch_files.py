"""Reads the arrays of a `.safetensors` or `.pth` file without running its code.

A `.pth` holds a pickle, and a pickle can call any function. Here it may name only what
a saved `state_dict` needs, each replaced by a harmless function; any other name is an
error. Needs no torch.
"""

import io
import math
import mmap
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Storage(NamedTuple):
    """Consecutive numbers in the file, of which tensors are views."""

    key: str
    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    """A view of a storage; sizes and strides count elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Dict(dict):
    """A dict that may have attributes, as torch saves one for `OrderedDict`."""


class _Refused(ValueError):
    """The pickle asks for more than arrays."""


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, as they are stored.

    Args:
      path: `.safetensors`, or a `state_dict` that `torch.save` wrote, in its zip format
        or in the one before torch 1.6; the content decides, not the file's name.

    Raises:
      ValueError: there is no such file, it is damaged, incomplete or of another format,
        or its pickle holds or calls anything but arrays; none of its code has run.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            file.seek(0)
            if start.startswith(_ZIP):
                return _read_zip(file, path)
            if start.startswith(_PICKLE):
                # Mapped: a read beyond the end then costs no memory.
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    return _read_legacy(mapped, path)
        if start[8:9] != b"{":
            raise ValueError(_describe_start(start))
        with safetensors.safe_open(path, "numpy") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except _Refused:
        raise
    except FileNotFoundError:
        raise ValueError(f"there is no weights file {path}; check the path") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"cannot read weights from {path} ({reason}): it is damaged, incomplete or "
            "not a .safetensors or .pth file; download or export it again"
        ) from error


def _describe_start(start: bytes) -> str:
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://"):
        return "it is a pointer of Git LFS: fetch the file itself, by `git lfs pull`"
    return f"it starts with {start!r}"


def _read_zip(file: IO[bytes], path: Path) -> dict[str, np.ndarray]:
    """PyTorch since 1.6: a zip of `data.pkl` and one uncompressed entry per storage."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file without torch's data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("it was saved on a big-endian machine")

        def stored(name: str) -> bytes:
            info = archive.getinfo(f"{folder}{name}")
            # torch never compresses, so no entry can be larger than the file.
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {name} is compressed")
            return archive.read(info)

        found = _Unpickler(io.BytesIO(stored("data.pkl")), path).load()
        tensors = _tensors(found, path)
        buffers = {
            key: np.frombuffer(stored(f"data/{key}"), dtype, count)
            for key, (dtype, count) in _needed(tensors).items()
        }
    return {name: _view(tensor, buffers) for name, tensor in tensors.items()}


def _read_legacy(file: mmap.mmap, path: Path) -> dict[str, np.ndarray]:
    """PyTorch before 1.6: five pickles, then the storages, each after its length."""

    def load() -> Any:
        return _Unpickler(file, path).load()

    if load() != _LEGACY_MAGIC or load() != _LEGACY_VERSION:
        raise ValueError("a pickle, but none of torch's")
    if load()["little_endian"] is not True:
        raise ValueError("it was saved on a big-endian machine")
    tensors = _tensors(load(), path)
    keys = load()
    needed = _needed(tensors)
    if sorted(keys) != sorted(needed):
        raise ValueError("its list of storages is not that of its tensors")
    buffers = {}
    for key in keys:
        dtype, count = needed[key]
        if int.from_bytes(file.read(8), "little") != count:
            raise ValueError(f"storage {key} has another length than it should")
        buffers[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    return {name: _view(tensor, buffers) for name, tensor in tensors.items()}


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Resolves the names that a `state_dict` needs, and no other.

    The base class is the one in Python: the one in C allocates as many memos as the
    pickle claims, tens of gigabytes where one byte of the file is wrong.
    """

    def __init__(self, file: Any, path: Path):
        super().__init__(file, encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        # A new object on each call: a pickle can set attributes on what it receives.
        if (module, name) == ("collections", "OrderedDict"):
            return lambda items=(): _Dict(items)
        if module == "torch" and name in _STORAGES:
            return lambda: name  # called by `persistent_load` alone
        if module == "torch._utils" and name in (
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
        ):
            return lambda storage, offset, size, stride, *_: _Tensor(
                storage, offset, size, stride
            )
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        raise _Refused(
            f"{self._path} asks to run {module}.{name}, which a file of weights has no "
            "need of; nothing was run. If you trust its source, load it with torch and "
            "save model.state_dict() alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count, *view = pid
        if kind != "storage" or any(v is not None for v in view):
            raise ValueError(f"unknown reference {pid!r}")
        return _Storage(str(key), _STORAGES[storage()], count)


def _tensors(found: Any, path: Path) -> dict[str, _Tensor]:
    """Checks that a pickle was a flat dict of tensors."""
    entries = found if isinstance(found, Mapping) else {}
    others = [k for k, v in entries.items() if not isinstance(v, _Tensor)]
    if others or not entries or not all(isinstance(name, str) for name in entries):
        what = ", ".join(map(repr, others[:5])) or type(found).__name__
        raise _Refused(
            f"{path} is not a dict of arrays alone (it holds {what}); save what "
            "model.state_dict() gives"
        )
    return dict(entries)


def _needed(tensors: Mapping[str, _Tensor]) -> dict[str, tuple[np.dtype, int]]:
    """Type and length of each storage that the tensors view."""
    return {t.storage.key: (t.storage.dtype, t.storage.count) for t in tensors.values()}


def _view(tensor: _Tensor, buffers: Mapping[str, np.ndarray]) -> np.ndarray:
    """A copy of the tensor's elements, none of which may lie outside its storage."""
    storage, offset, size, stride = tensor
    flat = buffers[storage.key]
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    inside = min((offset, *size, *stride)) >= 0 and (not count or last < len(flat))
    if not inside or count > len(flat):
        raise ValueError(f"a tensor of {size} does not fit a storage of {len(flat)}")
    bytes_apart = [s * flat.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(flat[offset:], size, bytes_apart).copy()
