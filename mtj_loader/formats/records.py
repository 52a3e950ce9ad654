"""Where tensors lie in files: the plain facts that every checkpoint format is reduced to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mtj_loader import dtypes


@dataclass(frozen=True)
class FileVersion:
    """A file as it was when its header was read; a change between plan and read is an error."""

    path: str  # as the Storage that lists it names it
    size_bytes: int
    version: str  # modification time in nanoseconds, or an object store's etag


@dataclass(frozen=True)
class TensorRecord:
    """One tensor in one file.

    Attributes:
      name: the checkpoint's name for it; never used as a path.
      file: the key of its file in `TensorIndex.files`.
      offset_bytes: absolute byte offset of its first element in that file.
      dtype: a key of `dtypes.BITS`, as safetensors spells it.
      shape: logical shape.
      strides: in elements; None means row-major contiguous (always so in safetensors).
    """

    name: str
    file: str
    offset_bytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements in the file."""
        return math.prod(self.shape) * dtypes.BITS[self.dtype] // 8

    def to_dict(self) -> dict[str, object]:
        """The record as JSON types; docs/json.md describes them."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "file": self.file,
            "offset_bytes": self.offset_bytes,
            "bytes": self.size_bytes,
        }


@dataclass(frozen=True)
class TensorIndex:
    """All tensors of a checkpoint by name, in file order, and what was noticed on the way."""

    records: Mapping[str, TensorRecord]
    files: Mapping[str, FileVersion]
    warnings: tuple[str, ...] = field(default=())
