"""Reads the arrays of a `.safetensors` or `.pth` file without running its code.

A `.pth` holds a pickle, and a pickle can call any function. Here it may name only what
a saved `state_dict` needs, and what is usually saved next to one, each replaced by a
harmless function; any other name is an error. Memory and time are at most a small
multiple of the size of the file. Needs no torch.
"""

import io
import json
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

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


# Names that training scripts save next to weights; nothing uses their values.
_IGNORED = {
    *(("argparse", "Namespace"), ("collections", "defaultdict"), ("_codecs", "encode")),
    *(("torch", "Size"), ("torch", "device"), ("numpy", "dtype")),
    *(("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")),
    *(("builtins", kind) for kind in ("dict", "float", "int", "list", "set")),
    *(("__builtin__", kind) for kind in ("dict", "float", "int", "list", "set")),
}
# The opcodes in torch's files, which are of protocol 2.
_OPCODES = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWFALSE),
    *(pickle.NEWTRUE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.BINSTRING),
    *(pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
)
_MOST_VALUES = 16  # in a call, a reference or a shape
_BYTES_OF_AN_ITEM = 20  # at least, in a pickle
_MOST_SHARING = 4  # times the size of the file that views of its storages may have
_NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Entries of checkpoints that hold the weights, the preferred first."""

INDEX = ".index.json"
"""End of the name of an index, which lists the files of sharded weights."""


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


class _Refused(ValueError):
    """The pickle asks for more than arrays."""


class _Other:
    """A value that is no array, such as the options of a training script."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        del state


def read(path: str | Path, *, notes: list[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file by name, as they are stored.

    Args:
      path: `.safetensors`, or a `state_dict` that `torch.save` wrote, in its zip format
        or in the one before torch 1.6; the content decides, not the file's name. Or
        the index of sharded weights, or a directory with one. A `state_dict` may be an
        entry of a checkpoint.
      notes: gets a line on each part of the file that is not read; None: such parts are
        ignored.

    Raises:
      ValueError: there is no such file, it is damaged, incomplete or of another format,
        it is one of several shards, or its pickle calls other functions or holds no
        arrays; none of its code has run.
    """
    path = Path(path)
    if path.is_dir() and (index := index_of(path)):
        path = index
    if path.name.endswith(INDEX) and path.is_file():
        return _read_shards(path, notes)
    if shard := re.search(r"-(\d{5})-of-(\d{5})\.\w+$", path.name):
        raise ValueError(
            f"{path} is shard {int(shard[1])} of {int(shard[2])}: give the index next "
            f"to it, whose name ends in {INDEX}, or its directory"
        )
    return _read_file(path, [] if notes is None else notes)


def index_of(folder: Path) -> Path | None:
    """The only index of sharded weights in a directory, or None."""
    found = sorted(folder.glob(f"*{INDEX}"))
    return found[0] if len(found) == 1 else None


def _read_shards(index: Path, notes: list[str] | None) -> dict[str, np.ndarray]:
    """The arrays of all files that an index lists."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(places.values()))
        sound = all(name == Path(name).name for name in names) and names
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is not an index of weights ({error!r}): download it again"
        ) from error
    if not sound:
        raise ValueError(
            f"{index} lists files outside its directory: download it again"
        )
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        arrays |= _read_file(index.with_name(name), [] if notes is None else notes)
    if arrays.keys() != places.keys():
        odd = sorted(arrays.keys() ^ places.keys())
        raise ValueError(
            f"{index} and its files differ in {len(odd)} arrays, such as {odd[0]}: "
            "download them again"
        )
    return arrays


def _read_file(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            file.seek(0)
            if start.startswith(_ZIP):
                return _read_zip(file, path, notes)
            if start.startswith(_PICKLE):
                # Mapped: a read beyond the end then costs no memory.
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    return _read_legacy(mapped, path, notes)
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


def _read_zip(file: IO[bytes], path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    """PyTorch since 1.6: a zip of `data.pkl` and one uncompressed entry per storage."""
    left = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file without torch's data.pkl")
        folder = pickles[0].removesuffix("data.pkl")

        def stored(name: str) -> bytes:
            nonlocal left
            info = archive.getinfo(f"{folder}{name}")
            # torch never compresses, so no entry can be larger than the file, and no
            # two entries can have the same bytes.
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"storage {name} is compressed")
            left -= max(info.file_size, info.compress_size)
            if left < 0:
                raise ValueError("its entries are larger than the file")
            return archive.read(info)

        if f"{folder}byteorder" in names and stored("byteorder") != b"little":
            raise ValueError("it was saved on a big-endian machine")
        unpickler = _Unpickler(io.BytesIO(stored("data.pkl")), path)
        tensors = _tensors(unpickler.load(), path, notes)
        buffers = {
            key: np.frombuffer(stored(f"data/{key}"), dtype, count)
            for key, (dtype, count) in _needed(tensors).items()
        }
    return _views(tensors, buffers, path.stat().st_size)


def _read_legacy(
    file: mmap.mmap, path: Path, notes: list[str]
) -> dict[str, np.ndarray]:
    """PyTorch before 1.6: five pickles, then the storages, each after its length."""

    def load() -> Any:
        return _Unpickler(file, path).load()

    if load() != _LEGACY_MAGIC or load() != _LEGACY_VERSION:
        raise ValueError("a pickle, but none of torch's")
    if load()["little_endian"] is not True:
        raise ValueError("it was saved on a big-endian machine")
    unpickler = _Unpickler(file, path)
    tensors = _tensors(unpickler.load(), path, notes)
    keys, needed = load(), _needed(tensors)
    is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not is_list or sorted(keys) != sorted(unpickler.storages):
        raise ValueError("its list of storages is not that of its tensors")
    buffers = {}
    for key in keys:
        _, dtype, count = unpickler.storages[key]
        if int.from_bytes(file.read(8), "little") != count:
            raise ValueError(f"storage {key} has another length than it should")
        if key in needed:
            content = file.read(count * dtype.itemsize)
            buffers[key] = np.frombuffer(content, dtype, count)
        else:
            file.seek(count * dtype.itemsize, io.SEEK_CUR)
    return _views(tensors, buffers, len(file))


_Base: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class _Unpickler(_Base):
    """Resolves the names that a `state_dict` needs, and no other.

    The base class is the one in Python: the one in C allocates as many memos as the
    pickle claims, tens of gigabytes where one byte of the file is wrong. An object that
    contains another twice, which contains a third twice, and so on, takes exponential
    time to hash, compare or print; so keys are texts or numbers, and nothing else is
    compared or printed.

    Attributes:
      storages: all storages that the pickle names, by their keys.
    """

    dispatch: ClassVar = {code[0]: _Base.dispatch[code[0]] for code in _OPCODES}

    def __init__(self, file: Any, path: Path):
        super().__init__(file, encoding="utf-8")
        self._path = path
        self.storages: dict[str, _Storage] = {}
        self._items_left = path.stat().st_size
        self._other = type("_Other", (_Other,), {})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_reduce(self) -> None:
        self._check_arguments()
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        self._check_arguments()
        super().load_newobj()

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        self.stack.pop()  # attributes of an OrderedDict, which say nothing of arrays

    dispatch[pickle.BUILD[0]] = load_build

    def _check_arguments(self) -> None:
        """Few arguments, so that a pickle cannot pass the same thousands each time."""
        if not isinstance(self.stack[-1], tuple) or len(self.stack[-1]) > _MOST_VALUES:
            raise ValueError("it calls a function with many arguments")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, _Other):
            return
        if not isinstance(target, dict):
            raise ValueError("it sets entries of what is no dict")
        if not all(type(key) in (str, int) for key in items[::2]):
            raise ValueError("it has a dict whose keys are neither texts nor numbers")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _ordered_dict(self, items: Any = ()) -> dict[Any, Any]:
        """An OrderedDict; only Python 2 gives the items here."""
        found: dict[Any, Any] = {}
        self._items_left -= _BYTES_OF_AN_ITEM * len(items)
        if self._items_left < 0:
            raise ValueError("it has more entries than the file is large")
        self.stack.append(found)
        self._set_items([x for key, value in items for x in (key, value)])
        return self.stack.pop()

    def find_class(self, module: str, name: str) -> Any:
        # A new object on each call: a pickle can set attributes on what it receives.
        if (module, name) == ("collections", "OrderedDict"):
            return lambda *items: self._ordered_dict(*items)
        if (module, name) in _IGNORED:
            return self._other
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
            f"{self._path} asks to run {module[:99]}.{name[:99]}, which a file of "
            "weights has no need of; nothing was run. If you trust its source, load it "
            "with torch and save model.state_dict() alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) > _MOST_VALUES:
            raise ValueError("it refers to what is no storage")
        kind, storage, key, _, count, *view = pid
        plain = isinstance(kind, str) and isinstance(key, str) and type(count) is int
        if not plain or kind != "storage" or any(v is not None for v in view):
            raise ValueError("it refers to what is no storage")
        found = _Storage(key, _STORAGES[storage()], count)
        if count < 0 or self.storages.setdefault(key, found) != found:
            raise ValueError(f"storage {key[:99]} has two sizes")
        return found


def _tensors(found: Any, path: Path, notes: list[str]) -> dict[str, _Tensor]:
    """The tensors of a dict, or of the dict that is an entry of it."""
    chosen, others = found, []
    if not _has_tensors(found) and isinstance(found, Mapping):
        values = {id(value): value for value in found.values()}
        fitting = {i for i, value in values.items() if _has_tensors(value)}
        nested = [key for key, value in found.items() if id(value) in fitting]
        name = next((key for key in _NESTED if key in nested), None)
        if name is None and len(nested) > 1:
            raise _Refused(
                f"{path} has several dicts of arrays ({_some(nested)}); save one"
            )
        if nested:
            name = nested[0] if name is None else name
            chosen, others = found[name], [key for key in found if key != name]
    if not _has_tensors(chosen):
        what = _some(found) if isinstance(found, Mapping) else ""
        raise _Refused(
            f"{path} is not a dict of arrays (it holds {what or type(found).__name__});"
            " save what model.state_dict() gives"
        )
    others += [key for key, value in chosen.items() if not isinstance(value, _Tensor)]
    if others:
        notes.append(f"left in the file: {_some(others)}")
    return {k: value for k, value in chosen.items() if isinstance(value, _Tensor)}


def _has_tensors(found: Any) -> bool:
    """Whether it is a dict of tensors by name, perhaps with single values."""
    if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
        return False
    rest = [value for value in found.values() if not isinstance(value, _Tensor)]
    single = (int, float, str, type(None))
    return len(rest) < len(found) and all(isinstance(v, single) for v in rest)


def _some(names: Any) -> str:
    """The first few keys of a dict, for a message."""
    shown = [repr(name)[:99] for name, _ in zip(names, range(5), strict=False)]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _needed(tensors: Mapping[str, _Tensor]) -> dict[str, tuple[np.dtype, int]]:
    """Type and length of each storage that the tensors view."""
    return {t.storage.key: (t.storage.dtype, t.storage.count) for t in tensors.values()}


def _views(
    tensors: Mapping[str, _Tensor], buffers: Mapping[str, np.ndarray], size: int
) -> dict[str, np.ndarray]:
    """Copies of the tensors, which may share storages, but not many times."""
    total, arrays = 0, {}
    for name, tensor in tensors.items():
        view = _view(tensor, buffers)
        total += view.nbytes
        if total > _MOST_SHARING * size:
            raise ValueError(
                f"its tensors share storages, and are more than {_MOST_SHARING} times "
                "as large as the file"
            )
        arrays[name] = view.copy()
    return arrays


def _view(tensor: _Tensor, buffers: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tensor's elements, none of which may lie outside its storage."""
    storage, offset, size, stride = tensor
    shaped = isinstance(size, tuple) and isinstance(stride, tuple)
    if not shaped or len(size) != len(stride) or len(size) > _MOST_VALUES:
        raise ValueError(f"a tensor does not fit a storage of {storage.count}")
    if not all(type(n) is int and abs(n) < 1 << 60 for n in (offset, *size, *stride)):
        raise ValueError("a tensor's shape is not of numbers")
    flat = buffers[storage.key]
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    inside = min((offset, *size, *stride)) >= 0 and (not count or last < len(flat))
    if not inside or count > len(flat):
        raise ValueError(f"a tensor of {size} does not fit a storage of {len(flat)}")
    bytes_apart = [s * flat.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(flat[offset:], size, bytes_apart)
