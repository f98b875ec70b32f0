"""Files of named tensors: safetensors, and what `torch.save` writes for a state dict.

Nothing in a file is executed. The part of a PyTorch file that says where the tensors are is a
program for a stack machine. It is interpreted here, with the few instructions and names that a
dict of tensors needs; everything else is refused.
"""

import io
import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
import safetensors

from metaopt.core.checks import show
from metaopt.core.files import LARGEST, read_plain

Arrays: TypeAlias = dict[str, np.ndarray]

MOST_INSTRUCTIONS = 1 << 24  # bytes; a state dict takes some 200 for each tensor
MOST_ENTRIES = 1 << 20  # of nested dicts
MOST_NUMBERS = 1 << 40  # of a tensor; numpy cannot describe every empty or strided one
MAGIC = 0x1950A86A20F9469CFC6C  # the first number of a file of PyTorch before version 1.6
PROTOCOL = 1001
SAFETENSORS_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
TORCH_DTYPES: dict[str, Any] = {
    "torch DoubleStorage": np.float64,
    "torch FloatStorage": np.float32,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
}


def read_safetensors(path: str | os.PathLike[str], *, most: int = LARGEST) -> Arrays:
    """Reads a safetensors file.

    Args:
      path: the file.
      most: the largest size that is read, in bytes.

    Returns:
      The tensors by name.

    Raises:
      ValueError: the file is missing, no regular file, too large, or no whole safetensors file.
    """
    return parse_safetensors(read_plain(Path(path), most), str(path))


def parse_safetensors(payload: bytes, where: str) -> Arrays:
    """The tensors in the content of a safetensors file; `where` is its name in messages."""
    try:
        entries = safetensors.deserialize(payload)
    except Exception as error:
        raise ValueError(f"{where}: not a whole safetensors file ({error}).") from None
    arrays = {}
    for name, entry in entries:
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(
                f"{where}: tensor {show(name)} has dtype {entry['dtype']}; known are "
                f"{', '.join(SAFETENSORS_DTYPES)}."
            )
        arrays[name] = _numbers(entry["data"], dtype).reshape(entry["shape"])
    return arrays


def read_torch(path: str | os.PathLike[str], *, most: int = LARGEST) -> Arrays:
    """Reads a ``.pt`` or ``.pth`` file that holds a dict of tensors, as ``model.state_dict()``.

    Nothing in the file is executed, and PyTorch is not needed.

    Args:
      path: a file that ``torch.save(model.state_dict(), path)`` wrote, in the zip format or in the
        format before PyTorch 1.6.
      most: the largest size that is read, in bytes, of the file and of its tensors together.

    Returns:
      The tensors by name, read-only; the names of nested dicts are joined by ``"."``.

    Raises:
      ValueError: the file is missing, no regular file, too large, or damaged, or holds anything
        but tensors. The message names the first such thing.
    """
    where = str(path)
    payload = read_plain(Path(path), most)
    try:
        parse = _parse_zip if payload[:4] == b"PK\x03\x04" else _parse_legacy
        arrays = dict(_flat(parse(payload)))
    except _Refused as error:
        raise ValueError(f"{where}: {error}") from None
    if (total := sum(array.nbytes for array in arrays.values())) > most:
        raise ValueError(f"{where}: its tensors take {total} bytes, which is more than {most}.")
    return arrays


class _Refused(ValueError):
    """Why a PyTorch file is not read."""


class _Name(NamedTuple):
    """A name that the file refers to, ``"module name"``; it is never looked up."""

    name: str


class _Storage(NamedTuple):
    """A row of numbers that tensors are parts of."""

    key: str
    dtype: Any
    count: int


class _Tensor(NamedTuple):
    """A tensor: a part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, numbers: np.ndarray) -> np.ndarray:
        """The part of `numbers`, without a copy."""
        item = numbers.dtype.itemsize
        return np.lib.stride_tricks.as_strided(
            numbers[self.offset :],
            self.shape,
            [stride * item for stride in self.strides],
            writeable=False,
        )


def _parse_zip(payload: bytes) -> Any:
    """The tree of arrays in a file of PyTorch 1.6 or newer."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(payload))
    except Exception as error:
        raise _Refused(f"not a whole zip file ({error}).") from None
    with archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise _Refused("its zip file holds a name twice.")
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Refused(f"not a PyTorch file: its zip file holds {len(roots)} files data.pkl.")

        def member(name: str, size: int | None = None) -> bytes:
            entry = entries.get(roots[0] + name)
            if entry is None:
                raise _Refused(f"lacks {show(roots[0] + name)}.")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise _Refused(f"{show(entry.filename)} is compressed or encrypted.")
            if size is not None and entry.file_size < size:
                raise _Refused(
                    f"{show(entry.filename)} has {entry.file_size} bytes, but its tensors need "
                    f"{size}."
                )
            try:
                return archive.read(entry)
            except Exception as error:  # cut short, a wrong checksum
                raise _Refused(f"{show(entry.filename)} cannot be read ({error}).") from None

        if f"{roots[0]}byteorder" in entries and member("byteorder").strip() != b"little":
            raise _Refused("its numbers are big-endian; save it on another machine.")
        tree, _ = _interpret(member("data.pkl"))
        rows: dict[str, np.ndarray] = {}
        total = 0

        def numbers(storage: _Storage) -> np.ndarray:
            nonlocal total
            if storage.key not in rows:
                size = storage.count * np.dtype(storage.dtype).itemsize
                total += size
                if total > len(payload):
                    raise _Refused("its storages overlap.")  # or they could fill the memory
                rows[storage.key] = _numbers(
                    member(f"data/{storage.key}", size)[:size], storage.dtype
                )
            return _same_storage(rows[storage.key], storage)

        return _with_arrays(tree, numbers)


def _parse_legacy(payload: bytes) -> Any:
    """The tree of arrays in a file of PyTorch before 1.6: programs, then the storages."""
    magic, position = _interpret(payload)
    if type(magic) is not int or magic != MAGIC:
        raise _Refused("not a file that torch.save wrote.")
    parts = []
    for _ in range(4):  # the protocol, the machine that wrote it, the tree, the storages' keys
        part, length = _interpret(payload[position : position + MOST_INSTRUCTIONS])
        position += length
        parts.append(part)
    protocol, machine, tree, keys = parts
    if type(protocol) is not int or protocol != PROTOCOL:
        raise _Refused(f"torch.save wrote protocol {show(protocol)}; known is {PROTOCOL}.")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _Refused("its numbers are big-endian; save it on another machine.")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _Refused("its list of storages is not a list of names.")
    storages = {leaf.storage.key: leaf.storage for leaf in _leaves(tree)}
    rows = {}
    for key in keys:
        if key not in storages or key in rows:
            raise _Refused(f"no tensor uses the storage {show(key)}, or it is there twice.")
        storage = storages[key]
        size = storage.count * np.dtype(storage.dtype).itemsize
        count = int.from_bytes(payload[position : position + 8], "little", signed=True)
        row = payload[position + 8 : position + 8 + size]
        position += 8 + size
        if count != storage.count or len(row) != size:
            raise _Refused(f"the storage {show(key)} has not the {storage.count} numbers promised.")
        rows[key] = _numbers(row, storage.dtype)
    if position != len(payload):
        raise _Refused(f"{len(payload) - position} bytes follow its last storage.")
    if missing := sorted(storages.keys() - rows.keys()):
        raise _Refused(f"lacks the storage {show(missing[0])}.")
    return _with_arrays(tree, lambda storage: _same_storage(rows[storage.key], storage))


def _numbers(payload: bytes | bytearray, dtype: Any) -> np.ndarray:
    """A row of numbers; bools are those bytes that are not zero."""
    if dtype is np.bool_:
        return np.frombuffer(payload, np.uint8) != 0
    return np.frombuffer(payload, np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)


def _same_storage(row: np.ndarray, storage: _Storage) -> np.ndarray:
    if row.dtype != storage.dtype or len(row) != storage.count:
        raise _Refused(f"the storage {show(storage.key)} is described in two ways.")
    return row


def _leaves(tree: Any) -> Iterator[_Tensor]:
    """The tensors of nested dicts.

    A part of a tree may occur in it any number of times, so that a small file could describe an
    endless one; the number of entries is limited.
    """
    return (leaf for _, leaf in _flat(tree) if isinstance(leaf, _Tensor))


def _flat(tree: Any) -> Iterator[tuple[str, Any]]:
    """Names and tensors, or arrays, of nested dicts."""
    if not isinstance(tree, dict):
        raise _Refused(f"holds {_kind(tree)} instead of a dict of tensors.")
    stack, entries = [("", tree)], 0
    found: list[tuple[str, Any]] = []
    while stack:
        prefix, node = stack.pop()
        for key, value in node.items():
            entries += 1
            name = f"{prefix}{key}"
            if entries > MOST_ENTRIES or len(name) > 1000:
                raise _Refused("has too many entries, or names that are too long.")
            if isinstance(value, dict):
                stack.append((f"{name}.", value))
            elif isinstance(value, _Tensor | np.ndarray):
                found.append((name, value))
            else:
                raise _Refused(
                    f"entry {show(name)} is {_kind(value)}, not a tensor; save "
                    "model.state_dict() alone."
                )
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise _Refused("two of its tensors have the same name.")
    return iter(found)


def _with_arrays(tree: Any, numbers: Callable[[_Storage], np.ndarray]) -> dict[str, np.ndarray]:
    return {name: leaf.array(numbers(leaf.storage)) for name, leaf in _flat(tree)}


def _kind(value: Any) -> str:
    """What a value of the stack machine is, for messages; never its content, which may be huge."""
    if isinstance(value, _Name):
        return f"a reference to {show(value.name)}"
    return f"a value of type {type(value).__name__.strip('_').lower()}"


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _interpret(program: bytes) -> tuple[Any, int]:
    """Interprets the instructions of one tree.

    Args:
      program: the instructions; bytes after the last one are not read.

    Returns:
      A tree of dicts, lists, tuples, numbers, strings and `_Tensor`, and the number of bytes read.

    Raises:
      _Refused: an instruction or a name that a dict of tensors does not need.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    stream = io.BytesIO(program[:MOST_INSTRUCTIONS])

    def pop() -> Any:
        value = stack.pop()
        if value is _MARK:
            raise _Refused("its instructions are damaged.")
        return value

    def pop_to_mark() -> list[Any]:
        position = len(stack) - 1
        while stack[position] is not _MARK:  # IndexError where there is none
            position -= 1
            if position < 0:
                raise IndexError
        values = stack[position + 1 :]
        del stack[position:]
        return values

    def top(kind: type) -> Any:
        if not isinstance(stack[-1], kind):
            raise _Refused("its instructions are damaged.")
        return stack[-1]

    try:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name in ("PROTO", "FRAME"):
                continue
            elif name == "STOP":
                return pop(), stream.tell()
            elif name == "MARK":
                stack.append(_MARK)
            elif name in _LITERALS:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = top(object)
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument or 0)])
            elif name in _TUPLES:
                values = [pop() for _ in range(_TUPLES[name])]
                stack.append(tuple(reversed(values)))
            elif name == "TUPLE":
                stack.append(tuple(pop_to_mark()))
            elif name == "APPEND":
                value = pop()
                top(list).append(value)
            elif name == "APPENDS":
                values = pop_to_mark()
                top(list).extend(values)
            elif name == "SETITEM":
                value, key = pop(), pop()
                _set_items(top(dict), [key, value])
            elif name == "SETITEMS":
                values = pop_to_mark()
                _set_items(top(dict), values)
            elif name == "GLOBAL":
                stack.append(_admitted(str(argument)))
            elif name == "STACK_GLOBAL":
                last, first = pop(), pop()
                stack.append(_admitted(f"{first} {last}" if _are_strings(first, last) else "?"))
            elif name == "BINPERSID":
                stack.append(_storage(pop()))
            elif name == "REDUCE":
                arguments, function = pop(), pop()
                stack.append(_apply(function, arguments))
            elif name == "BUILD":  # the attributes of a state dict, such as its `_metadata`
                pop()
                top(dict)
            else:
                raise _Refused(f"its instruction {name} is not needed for a dict of tensors.")
    except _Refused:
        raise
    except Exception as error:  # genops: cut short or no instruction; an empty stack, no such memo
        detail = f"{type(error).__name__}: {error}"[:200]
        raise _Refused(f"not a whole file that torch.save wrote ({detail}).") from None
    raise _Refused("its instructions have no end.")


def _are_strings(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _set_items(entries: dict[Any, Any], values: list[Any]) -> None:
    if len(values) % 2 or not _are_strings(*values[::2]):
        raise _Refused("the keys of its dicts must be strings.")
    entries.update(zip(values[::2], values[1::2], strict=True))


_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"


def _admitted(name: str) -> _Name:
    if name not in (_ORDERED_DICT, _TENSOR, _PARAMETER, *TORCH_DTYPES):
        raise _Refused(
            f"refers to {show(name.replace(' ', '.'))}, but only tensors are read; save "
            "model.state_dict() alone."
        )
    return _Name(name)


def _apply(function: Any, arguments: Any) -> Any:
    """What the names of PyTorch stand for."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise _Refused("its instructions are damaged.")
    if function.name == _ORDERED_DICT and arguments == ():
        return {}
    if function.name == _PARAMETER and arguments and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if function.name == _TENSOR and len(arguments) in (6, 7):
        return _tensor(*arguments[:4])
    raise _Refused(f"calls {show(function.name.replace(' ', '.'))} with unknown arguments.")


def _storage(description: Any) -> _Storage:
    """The storage that ``("storage", kind, key, device, count)`` describes."""
    if isinstance(description, tuple) and len(description) in (5, 6):
        what, kind, key, _, count, *view = description
        if (
            type(what) is str
            and what == "storage"
            and isinstance(kind, _Name)
            and kind.name in TORCH_DTYPES
            and type(key) is str
            and type(count) is int
            and count >= 0
            and view in ([], [None])
        ):
            return _Storage(key, TORCH_DTYPES[kind.name], count)
    raise _Refused("describes a storage in an unknown way.")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    """A tensor, after a check that it lies within its storage."""
    numbers = (offset, *shape, *strides) if type(shape) is type(strides) is tuple else (None,)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _Refused("describes a tensor in an unknown way.")
    span = math.prod(max(n, 1) for n in shape)
    if len(shape) != len(strides) or len(shape) > 32 or max(span, *strides, 0) > MOST_NUMBERS:
        raise _Refused("describes a tensor in an unknown way.")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    size = math.prod(shape)
    # One with more elements than its storage repeats them.
    if size and (last >= storage.count or size > storage.count):
        raise _Refused(
            f"a tensor of shape {show(shape)} does not fit its storage of {storage.count} numbers."
        )
    return _Tensor(storage, offset if size else 0, shape, strides)
