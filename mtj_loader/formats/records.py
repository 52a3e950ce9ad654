"""Where tensors are in files: the common result of reading every checkpoint format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mtj_loader import dtypes
from mtj_loader.display import counted
from mtj_loader.errors import FormatError
from mtj_loader.storage.base import FileVersion

MAX_RANK = 64  # numpy's limit

# How files start that are often found in place of weights.
FOREIGN_MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
    b"<!DOCTYPE html": "a web page",
    b"<html": "a web page",
}


@dataclass(frozen=True)
class TensorRecord:
    """One tensor in one file.

    Attributes:
      name: in the checkpoint; never used as a path.
      file: the key of its file in `TensorIndex.files`.
      offset_bytes: absolute byte offset of its first element in that file.
      dtype: a key of `dtypes.BITS`, spelled as in safetensors.
      shape: logical shape.
      strides: in elements; None means row-major, as always in safetensors.
    """

    name: str
    file: str
    offset_bytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """Size of its elements in the file."""
        return math.prod(self.shape) * dtypes.BITS[self.dtype] // 8

    def to_dict(self) -> dict[str, object]:
        """The record as JSON types; see docs/json.md."""
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
    """All tensors of a checkpoint by name, in file order, and warnings about its files."""

    records: Mapping[str, TensorRecord]
    files: Mapping[str, FileVersion]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        tensors, files = counted(len(self.records), "tensor"), counted(len(self.files), "file")
        return f"<TensorIndex: {tensors} in {files}>"


def check_name(name: str, file: str) -> None:
    """Checks a tensor's name, because names are printed and other tools turn them into paths.

    Raises:
      FormatError: a control character, an empty name, or `..` between slashes.
    """
    has_parent = ".." in name and ".." in name.replace("\\", "/").split("/")
    if not name or not name.isprintable() or has_parent:
        expected = "printable characters, no `..` between slashes"
        raise FormatError("bad tensor name", file=file, tensor=ascii(name), expected=expected)
