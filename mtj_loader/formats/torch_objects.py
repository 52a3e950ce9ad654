"""Plain data for the objects in a pickle by torch.save; nothing is imported or called.

Only the names that a dict of tensors needs are supported; all others are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from mtj_loader.dtypes import BITS
from mtj_loader.formats.records import MAX_RANK

_MAX_INT = 2**63 - 1  # torch counts elements with signed 64 bits
_SHOWN_CHARS = 80  # of untrusted text in a message


class RejectedError(Exception):
    """Something in a pickle is not allowed; the caller adds file and position."""

    def __init__(self, what: str, expected: object = None, found: object = None) -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, expected, found


class OrderedMapping(dict[str, object]):
    """A collections.OrderedDict; the only object whose attributes a pickle may set."""

    __slots__ = ()


@dataclass(frozen=True)
class StorageType:
    """A class such as torch.FloatStorage; `dtype` is spelled as in safetensors."""

    dtype: str


@dataclass(frozen=True)
class StorageRef:
    """A storage: `elements` numbers in the archive's member `data/<key>`."""

    dtype: str
    key: str
    elements: int

    @property
    def size_bytes(self) -> int:
        """Size of the member."""
        return self.elements * BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage; offset and strides are in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """One of the three functions that a pickle may call; `call` evaluates them."""

    name: str


_ORDERED_DICT = Function("collections OrderedDict")
_TENSOR = Function("torch._utils _rebuild_tensor_v2")
_PARAMETER = Function("torch._utils _rebuild_parameter")
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "ComplexFloat": "C64",
    "Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
_ALLOWED: dict[str, Function | StorageType] = {
    **{function.name: function for function in (_ORDERED_DICT, _TENSOR, _PARAMETER)},
    **{f"torch {name}Storage": StorageType(dtype) for name, dtype in _STORAGES.items()},
}

# Explanations of names that are rejected.
_MEANINGS = {
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils _rebuild_qtensor": "a quantized tensor",
    "torch._utils _rebuild_nested_tensor": "a nested tensor",
    "torch._utils _rebuild_tensor_v3": "a tensor with a dtype that old versions of torch lack",
    "torch._utils _rebuild_parameter_with_state": "a parameter with attributes",
    "torch._utils _rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils _rebuild_meta_tensor_no_storage": "a meta tensor, which has no data",
    "torch._tensor _rebuild_from_type_v2": "a tensor subclass, or a tensor with attributes",
}


def find_global(name: str) -> Function | StorageType:
    """Looks up a global by `module name`.

    Raises:
      RejectedError: the name is not allowed.
    """
    if name not in _ALLOWED:
        meaning = f" ({_MEANINGS[name]})" if name in _MEANINGS else ""
        raise RejectedError(
            "the pickle uses a name that is not allowed",
            "a dict of plain tensors",
            f"{name.replace(' ', '.')[:_SHOWN_CHARS]}{meaning}",
        )
    return _ALLOWED[name]


def find_storage(persistent_id: object) -> StorageRef:
    """The storage of a persistent id: ("storage", type, key, device, elements).

    Raises:
      RejectedError: the id has another form.
    """
    match persistent_id:
        case ("storage", StorageType(dtype), str(key), str(), elements) if _is_count(elements):
            if key.isascii() and key.isdigit():
                return StorageRef(dtype, key, elements)
    expected = '("storage", type, number, device, count)'
    raise RejectedError("bad persistent id in the pickle", expected, describe_value(persistent_id))


def call(function: object, arguments: object) -> object:
    """The result of a function call: an empty mapping or a tensor.

    Raises:
      RejectedError: the function is not allowed, or torch does not write such arguments.
    """
    match function, arguments:
        case Function(_ORDERED_DICT.name), ():
            return OrderedMapping()
        case Function(_TENSOR.name), (
            StorageRef() as storage,
            offset,
            shape,
            strides,
            bool(),
            *rest,
        ):
            return _tensor(storage, offset, shape, strides, rest)
        case Function(_PARAMETER.name), (TensorRef() as tensor, bool(), OrderedMapping() as hooks):
            if not hooks:
                return tensor
    if not isinstance(function, Function):
        what, expected = "the pickle calls a function that is not allowed", "a supported function"
        raise RejectedError(what, expected, describe_value(function))
    found = f"{function.name.replace(' ', '.')} of {describe_value(arguments)}"
    raise RejectedError("the pickle calls a function with wrong arguments", None, found)


def describe_value(value: object) -> str:
    """Describes a value briefly, without its whole content."""
    if isinstance(value, str):
        return repr(value[:_SHOWN_CHARS])
    if value is None or isinstance(value, int):
        return repr(value)
    if isinstance(value, (Function, StorageType)):
        return f"the name {value}"
    names = {tuple: "a tuple", StorageRef: "a storage", TensorRef: "a tensor"}
    return names.get(type(value), "a dict")


def _tensor(
    storage: StorageRef, offset: object, shape: object, strides: object, rest: list[object]
) -> TensorRef:
    """`rest` has hooks, and metadata for views such as conjugates; both must be empty."""
    if not _is_count(offset) or not _are_counts(shape) or not _are_counts(strides):
        what = "a tensor's offset, shape or strides are not nonnegative integers"
        raise RejectedError(what, "an integer and two tuples of integers", describe_value(offset))
    if len(shape) != len(strides) or len(shape) > MAX_RANK:
        found = f"{len(shape)} sizes and {len(strides)} strides"
        raise RejectedError(
            "a tensor's rank is wrong", f"the same number, at most {MAX_RANK}", found
        )
    if not rest or len(rest) > 2 or any(rest) or not isinstance(rest[0], OrderedMapping):
        what = "a tensor has hooks or is a conjugate or negative view"
        raise RejectedError(what, "a plain tensor", f"{len(rest)} more arguments")
    return TensorRef(storage, offset, shape, strides)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_INT  # `type`: True is an int for isinstance


def _are_counts(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(map(_is_count, values))
