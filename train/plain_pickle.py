"""Pickles as plain data: an interpreter that has no way to run code, because it knows a handful of constructors and nothing else.

torch.save pickles a tensor as a call of a function of torch on a place in the file. Here such a call gives a description of the tensor
(`TensorRef`), which costs a few bytes whatever the tensor claims to be, so that everything can be checked before anything is allocated.
Kinds of tensors that jetvla does not read become a `Foreign` with their name; any other global is refused, as torch's own weights-only
reader does, and whatever grows without the file growing is refused as well (bundle/reading_limits.py). The lexer is pickletools'.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bundle.reading_limits import PICKLE_COPIES, PICKLE_STEPS, TENSOR_DIMENSIONS

_COUNT_BITS = 48
_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip
_LITERALS = frozenset(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
        "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    )
)  # fmt: skip
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SCALARS = (str, bytes, int, float, type(None))
_SIZED = (str, bytes, list, tuple, dict)
_KEY_PARTS = 16
_KEY_BITS = 4096


class NotPlainError(ValueError):
    """A pickle that is damaged, or beyond the budget."""


class ForbiddenGlobalError(Exception):
    """A pickle that names code; the argument is the name."""


@dataclass(frozen=True)
class StorageRef:
    """Numbers in a file: where, of what type (None for bytes), and how many."""

    key: str
    dtype: torch.dtype | None
    count: int

    @property
    def bytes(self) -> int:
        return self.count * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been made: a view of a storage, offset and strides in elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Foreign:
    """Something of torch's that is neither a dense tensor nor plain data, by its name in the pickle."""

    name: str


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype | None


def read_pickle(file: io.BytesIO, storages: dict[str, StorageRef]) -> Any:
    """The next pickle in a file as plain data; the file then stands behind it.

    Args:
        file: holds at most PICKLE_BYTES from where it stands.
        storages: every storage that the pickle names is added, by key.

    Raises:
        NotPlainError: damaged, or beyond the budget.
        ForbiddenGlobalError: it names anything but torch's own tensors and plain data.
    """
    machine = _Machine(storages)
    try:
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if steps >= PICKLE_STEPS:
                raise NotPlainError(f"a pickle of more than {PICKLE_STEPS} steps")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError) as error:
        raise NotPlainError(f"a pickle that takes what it has not put ({type(error).__name__})") from None
    except (TypeError, OverflowError, MemoryError, AttributeError) as error:
        raise NotPlainError(f"a damaged pickle: {error}") from None
    raise NotPlainError("a pickle without an end")


class _Machine:
    """The pickle machine: a stack, marks in it, and a memo."""

    def __init__(self, storages: dict[str, StorageRef]) -> None:
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._storages = storages
        self._copied = 0

    def pop(self) -> Any:
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif (make := _CONSTANTS.get(name)) is not None:
            stack.append(make())
        elif (length := _TUPLES.get(name)) is not None:
            if len(stack) < length:
                raise NotPlainError("a tuple of more than there is")
            stack[-length:] = [tuple(stack[-length:])]
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name == "TUPLE":
            self._after_mark(tuple(stack))
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(name == "SETITEM")
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            self._append(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._global(argument)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, callee = stack.pop(), stack.pop()
            stack.append(self._call(callee, arguments))
        elif name == "BUILD":
            self._build()
        elif name not in ("PROTO", "FRAME"):
            raise NotPlainError(f"a pickle with opcode {name}")

    def _items(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _after_mark(self, value: object) -> None:
        self._items()
        self._stack.append(value)

    def _set_items(self, single: bool) -> None:
        if single:
            value, key = self._stack.pop(), self._stack.pop()
            items = [key, value]
        else:
            items = self._items()
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise NotPlainError(f"items set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_hashable(key)] = value

    def _append(self, name: str) -> None:
        items = [self._stack.pop()] if name == "APPEND" else self._items()
        target = self._stack[-1]
        if isinstance(target, set) and name == "ADDITEMS":
            target.update(map(_hashable, items))
        elif isinstance(target, list) and name != "ADDITEMS":
            target.extend(items)
        else:
            raise NotPlainError(f"items added to a {type(target).__name__}")

    def _global(self, argument: str | None) -> None:
        if argument is None:
            member, module = self._stack.pop(), self._stack.pop()
        else:
            module, _, member = argument.partition(" ")
        name = f"{_MOVED.get(module, module)}.{member}"
        if name in _KNOWN:
            self._stack.append(_KNOWN[name])
        elif name in _FOREIGN or name in _CALLS:
            self._stack.append(_Global(name))
        else:
            raise ForbiddenGlobalError(name)

    def _storage(self, pid: object) -> StorageRef | Foreign:
        match pid:
            case ("storage", _Global(name) | Foreign(name), *_):
                return Foreign(name)
            case ("storage", _StorageType(dtype), str(key), str(), count, *view):
                if any(part is not None for part in view):
                    raise NotPlainError("a storage that is a view of another")
                found = StorageRef(key, dtype, _count(count))
                if self._storages.setdefault(key, found) != found:
                    raise NotPlainError(f"storage {key} is stated in two ways")
                return found
        raise NotPlainError("a persistent id that is no storage")

    def _call(self, callee: object, arguments: object) -> object:
        if not isinstance(arguments, tuple):
            raise NotPlainError("a call without a tuple of arguments")
        if not isinstance(callee, _Global):
            raise NotPlainError(f"a call of a {type(callee).__name__}")
        if callee.name in _FOREIGN:
            return Foreign(callee.name)
        for argument in arguments:
            # What is taken from the memo and copied again and again grows without the file growing.
            self._copied += len(argument) if isinstance(argument, _SIZED) else 0
        if self._copied > PICKLE_COPIES:
            raise NotPlainError("a pickle that grows when it is read")
        return _CALLS[callee.name](*arguments)

    def _build(self) -> None:
        """State that is set on an object: of the dictionaries that state_dict() makes, what torch notes of its versions."""
        self._stack.pop()
        if not isinstance(self._stack[-1], OrderedDict | Foreign):
            raise NotPlainError(f"state that is set on a {type(self._stack[-1]).__name__}")


def _hashable(key: object) -> Any:
    """A key that is plain and short: Python hashes integers and tuples anew each time, and nested ones in depth."""
    parts = key if isinstance(key, tuple) else (key,)
    if len(parts) > _KEY_PARTS:
        raise NotPlainError("a key of many parts")
    for part in parts:
        if not isinstance(part, _SCALARS) or (isinstance(part, int) and part.bit_length() > _KEY_BITS):
            raise NotPlainError(f"a key that is or holds a {type(part).__name__}")
    return key


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value.bit_length() > _COUNT_BITS:
        raise NotPlainError("a size, offset or stride that is none")
    return value


def _tensor(
    storage: object, offset: object, size: object, stride: object, dtype: object, rest: tuple[object, ...]
) -> TensorRef | Foreign:
    """A dense tensor; one whose bits mean something else (conjugated, negated) is foreign."""
    foreign = next((each for each in (storage, dtype) if isinstance(each, Foreign)), None)
    if foreign is not None:
        return Foreign(foreign.name)
    if not (isinstance(storage, StorageRef) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise NotPlainError("a tensor without storage, size and stride")
    if len(size) != len(stride) or len(size) > TENSOR_DIMENSIONS:
        raise NotPlainError(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    if len(rest) > 2 and rest[2]:
        return Foreign("a tensor with metadata")
    found = storage.dtype if dtype is None else dtype
    if not isinstance(found, torch.dtype):
        raise NotPlainError("a tensor without a type")
    return TensorRef(storage, found, _count(offset), tuple(map(_count, size)), tuple(map(_count, stride)))


def _tensor_v2(storage: object, offset: object, size: object, stride: object, *rest: object) -> TensorRef | Foreign:
    return _tensor(storage, offset, size, stride, None, rest)


def _tensor_v3(
    storage: object, offset: object, size: object, stride: object, grad: object, hooks: object, dtype: object, *meta: object
) -> TensorRef | Foreign:  # fmt: skip
    return _tensor(storage, offset, size, stride, dtype, (grad, hooks, *meta))


def _parameter(data: object, *_: object) -> object:
    if not isinstance(data, TensorRef | Foreign):
        raise NotPlainError("a parameter that is no tensor")
    return data


def _from_type(rebuild: object, kind: object, arguments: object, _state: object) -> object:
    """A tensor with attributes: the attributes are left out, a subclass is foreign."""
    if isinstance(rebuild, _Global) and isinstance(kind, _Global) and isinstance(arguments, tuple):
        if kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter") and rebuild.name.startswith("torch._utils."):
            return _CALLS[rebuild.name](*arguments) if rebuild.name in _CALLS else Foreign(rebuild.name)
        return Foreign(kind.name)
    raise NotPlainError("a tensor of no type")


def _ordered(items: object = (), *_: object) -> OrderedDict[Any, Any]:
    if not isinstance(items, list | tuple):
        raise NotPlainError("a dictionary of no items")
    return OrderedDict((_hashable(key), value) for key, value in items)


def _counter(items: object = None, *_: object) -> dict[Any, Any]:
    if items is not None and not isinstance(items, dict):
        raise NotPlainError("a counter of no items")
    return dict(items or {})


def _bytes(text: object, encoding: object = "latin1", *_: object) -> bytes:
    """How bytes are pickled in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise NotPlainError("bytes that are no text")
    return text.encode("latin-1")


def _bytearray(content: object = b"", encoding: object = "latin-1", *_: object) -> bytes:
    return content if isinstance(content, bytes) else _bytes(content, encoding)


def _set(items: object = (), *_: object) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise NotPlainError("a set of no items")
    return {_hashable(item) for item in items}


def _path(*parts: object) -> str:
    """A path is its text."""
    if not all(isinstance(part, str) for part in parts):
        raise NotPlainError("a path that is no text")
    return "/".join(map(str, parts)).replace("//", "/")


def _complex(real: object = 0.0, imaginary: object = 0.0) -> Foreign:
    return Foreign("complex")


def _size(sizes: object = (), *_: object) -> tuple[int, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > TENSOR_DIMENSIONS:
        raise NotPlainError("a torch.Size that is none")
    return tuple(map(_count, sizes))


_MOVED = {"__builtin__": "builtins", "torch.tensor": "torch._tensor", "pathlib._local": "pathlib"}
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "builtins.bytes": _bytearray,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "_codecs.encode": _bytes,
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
}
# Kinds that torch's weights-only reader knows as well; calling them makes nothing here.
_FOREIGN = frozenset(
    (
        "torch.Tensor", "torch.device", "torch.serialization._get_layout", "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_wrapper_subclass", "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        *(f"torch.{kind}Storage" for kind in ("ComplexDouble", "ComplexFloat", "QUInt8", "QInt8", "QInt32", "QUInt4x2", "QUInt2x4")),
    )
)  # fmt: skip
_FOREIGN_CONSTANTS = (
    "complex32", "complex64", "complex128", "quint8", "qint8", "qint32", "quint4x2", "quint2x4", "uint16", "uint32", "uint64",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits16",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams",
)  # fmt: skip
_KNOWN: dict[str, object] = {
    **{f"torch.{name}": getattr(torch, name) for name in _DTYPES},
    **{f"torch.{name}": Foreign(f"torch.{name}") for name in _FOREIGN_CONSTANTS},
    **{f"torch.{kind}Storage": _StorageType(getattr(torch, name)) for kind, name in _STORAGES.items()},
    **{f"torch.cuda.{kind}Storage": _StorageType(getattr(torch, name)) for kind, name in _STORAGES.items()},
    "torch.storage.UntypedStorage": _StorageType(None),
    "torch.UntypedStorage": _StorageType(None),
}
