"""Reads the JSON header of safetensors files.

    8 bytes  N, little-endian    N bytes  JSON, padded with spaces    the rest  tensors, no gaps

Follows the reference reader (github.com/huggingface/safetensors), but is stricter where that one
accepts damaged files: no duplicate keys, no unknown fields, only printable names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from reprlib import repr as brief

import numpy as np

from mtj_loader.dtypes import BITS
from mtj_loader.errors import FormatError
from mtj_loader.formats import strict_json
from mtj_loader.formats.records import FOREIGN_MAGIC, MAX_RANK, TensorRecord, check_name
from mtj_loader.storage.base import FileVersion, Storage

MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit; 100,000 tensors take 12,000,000
_LENGTH_BYTES = 8  # of N
_MAX_U64 = 2**64 - 1  # of every number in a header
_MAX_TENSOR_BITS = 2**63 - 1  # numpy counts with 63 bits, even if another dimension is 0
_FIELDS = {"dtype", "shape", "data_offsets"}

# What other files start with; checked only if N is impossible.
_MAGIC = FOREIGN_MAGIC | {
    b"PK\x03\x04": "a zip archive, as written by torch.save",
    b"\x80\x02": "a Python pickle",
    b"\x93NUMPY": "a numpy array",
    b"GGUF": "a GGUF file",
}
_MAX_MAGIC_BYTES = max(map(len, _MAGIC))


def read_records(storage: Storage, version: FileVersion) -> list[TensorRecord]:
    """Reads the header of one file.

    Args:
      storage: where the file is.
      version: of the file; the header must account for every byte of its size.

    Returns:
      The tensors in the order of their offsets.

    Raises:
      FormatError: the header violates the format.
    """
    length_bytes = _header_length(storage, version)
    header = storage.read(version.path, _LENGTH_BYTES, length_bytes)
    return parse_header(header, file=version.path, size_bytes=version.size_bytes)


def parse_header(header: bytes, *, file: str, size_bytes: int) -> list[TensorRecord]:
    """Turns a header into records, in the order of their offsets.

    Args:
      header: the JSON, without the eight bytes before it.
      file: name of the file, for the records and for errors.
      size_bytes: of the whole file.

    Raises:
      FormatError: the header violates the format.
    """
    if not header.startswith(b"{"):
        found = brief(header[:_LENGTH_BYTES])
        raise FormatError("the header is not a JSON object", file=file, expected="{", found=found)
    entries = strict_json.parse_object(header, file=file)
    if "__metadata__" in entries:
        _check_metadata(entries.pop("__metadata__"), file)
    data_start = _LENGTH_BYTES + len(header)
    records = [_record(name, entry, file, data_start) for name, entry in entries.items()]
    records.sort(key=lambda record: (record.offset_bytes, record.size_bytes))
    _check_tiling(records, file, data_start, size_bytes)
    return records


def check_bool_bytes(record: TensorRecord, data: np.ndarray, first: int = 0) -> None:
    """Checks that a BOOL tensor's bytes are 0 or 1, because numpy and XLA do not.

    Args:
      record: the tensor.
      data: some of its bytes (uint8).
      first: position of `data` in the tensor.

    Raises:
      FormatError: names the position and value of the first bad byte.
    """
    bad = np.flatnonzero(data > 1)
    if bad.size:
        raise FormatError(
            "a BOOL tensor holds a byte that is neither 0 nor 1",
            file=record.file,
            tensor=record.name,
            expected="0 or 1",
            found=f"{data[bad[0]]} at element {first + bad[0]}",
        )


def _header_length(storage: Storage, version: FileVersion) -> int:
    """Reads N, and checks it before memory is allocated for it."""
    file, size_bytes = version.path, version.size_bytes
    start = storage.read(file, 0, min(size_bytes, _MAX_MAGIC_BYTES))
    length_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    max_bytes = min(MAX_HEADER_BYTES, size_bytes - _LENGTH_BYTES)
    if 2 <= length_bytes <= max_bytes:  # `{}` is the shortest header
        return length_bytes
    meaning = next((_MAGIC[magic] for magic in _MAGIC if start.startswith(magic)), None)
    if meaning or size_bytes < _LENGTH_BYTES:
        found = meaning or f"{size_bytes} bytes" if size_bytes else "an empty file"
        raise FormatError("not a safetensors file", file=file, expected="a header", found=found)
    raise FormatError(
        "the header's length is impossible",
        file=file,
        expected=f"2 to {max_bytes:,} bytes in a file of {size_bytes:,}",
        found=f"{length_bytes:,} bytes",
    )


def _check_metadata(metadata: object, file: str) -> None:
    if not isinstance(metadata, dict):
        raise _bad_field(file, None, "__metadata__", "an object", metadata)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _bad_field(file, None, f"__metadata__.{key}", "a string", value)


def _record(name: str, entry: object, file: str, data_start: int) -> TensorRecord:
    check_name(name, file)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = ", ".join(map(brief, entry)) if isinstance(entry, dict) else brief(entry)
        expected = "exactly dtype, shape and data_offsets"
        raise FormatError(
            "bad tensor entry", file=file, tensor=name, expected=expected, found=found
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad_field(file, name, "dtype", f"one of {', '.join(BITS)}", dtype)
    if not _are_u64(shape):
        raise _bad_field(file, name, "shape", "a list of integers from 0 to 2^64 − 1", shape)
    if len(shape) > MAX_RANK:
        raise _bad_field(file, name, "shape", f"at most {MAX_RANK} dimensions", shape)
    if not _are_u64(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad_field(file, name, "data_offsets", "[begin, end] with begin ≤ end", offsets)
    _check_span(file, name, dtype, shape, offsets[1] - offsets[0])
    return TensorRecord(name, file, data_start + offsets[0], dtype, tuple(shape))


def _are_u64(values: object) -> bool:
    # `type`, not `isinstance`: True is an int for the latter
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= _MAX_U64 for v in values)


def _check_span(file: str, name: str, dtype: str, shape: Sequence[int], span_bytes: int) -> None:
    """Checks that the offsets span exactly the bytes that the shape needs."""
    bits = math.prod(shape) * BITS[dtype]
    if bits == span_bytes * 8 and bits:
        return
    if math.prod(size or 1 for size in shape) * BITS[dtype] > _MAX_TENSOR_BITS:
        raise _bad_field(file, name, "shape", "fewer than 2^63 bits", shape)
    if bits % 8:
        expected = "whole bytes"
        found = f"{bits} bits for shape {list(shape)} in {dtype}"
        raise FormatError("bad tensor size", file=file, tensor=name, expected=expected, found=found)
    if bits != span_bytes * 8:
        raise FormatError(
            "a tensor's shape and its data_offsets disagree",
            file=file,
            tensor=name,
            expected=f"{bits // 8:,} bytes for shape {list(shape)} in {dtype}",
            found=f"{span_bytes:,} bytes",
        )


def _check_tiling(
    records: Sequence[TensorRecord], file: str, data_start: int, size_bytes: int
) -> None:
    """Checks that every byte after the header belongs to exactly one tensor."""
    position = data_start
    for record in records:
        if record.offset_bytes != position:
            gap = record.offset_bytes > position
            raise FormatError(
                "bytes that belong to no tensor" if gap else "two tensors overlap",
                file=file,
                tensor=record.name,
                expected=f"data_offsets that start at {position - data_start:,}",
                found=f"{record.offset_bytes - data_start:,}",
            )
        position += record.size_bytes
    if position != size_bytes:
        truncated = position > size_bytes
        raise FormatError(
            "the file is truncated" if truncated else "bytes after the last tensor",
            file=file,
            tensor=records[-1].name if records else None,
            expected=f"{position:,} bytes, from the header",
            found=f"{size_bytes:,} bytes",
        )


def _bad_field(
    file: str, tensor: str | None, key: str, expected: str, found: object
) -> FormatError:
    return FormatError(
        "bad field in the header",
        file=file,
        tensor=tensor,
        key=key,
        expected=expected,
        found=brief(found),
    )
