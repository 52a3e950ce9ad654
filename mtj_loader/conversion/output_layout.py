"""Where every tensor goes: output files, their headers and their index, before a byte is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mtj_loader.conversion.casting import SOURCES
from mtj_loader.dtypes import BITS
from mtj_loader.errors import CheckpointError
from mtj_loader.formats.file_names import SINGLE_FILE
from mtj_loader.formats.records import TensorRecord

_KEPT = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_ALIGNMENT_BYTES = 8  # of the header, as the reference writer has it: the data starts aligned


@dataclass(frozen=True)
class Move:
    """One tensor: where it is, and where it will be, in which dtype."""

    source: TensorRecord
    target: TensorRecord


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be: its first bytes, and the tensors that follow without a gap."""

    name: str
    header: bytes
    moves: tuple[Move, ...]

    @property
    def size_bytes(self) -> int:
        """The whole file."""
        return len(self.header) + self.data_bytes

    @property
    def data_bytes(self) -> int:
        """Its tensors."""
        return sum(move.target.size_bytes for move in self.moves)


def plan_files(
    records: Iterable[TensorRecord], dtype: str, max_shard_bytes: int
) -> tuple[OutputFile, ...]:
    """Deals tensors, in their order, to files of at most so many bytes of tensors.

    Args:
      records: all tensors.
      dtype: of the new floats, as safetensors spells it; integers and booleans keep theirs.
      max_shard_bytes: a tensor that is larger gets a file of its own.

    Raises:
      CheckpointError: a tensor's dtype is neither kept nor converted.
    """
    groups = list(_groups([(r, _new_dtype(r, dtype)) for r in records], max_shard_bytes))
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [SINGLE_FILE]
    return tuple(_output_file(*pair) for pair in zip(names, groups, strict=True))


def index_document(files: Sequence[OutputFile]) -> dict[str, object]:
    """`model.safetensors.index.json` of these files."""
    total = sum(file.data_bytes for file in files)
    weight_map = {move.target.name: file.name for file in files for move in file.moves}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


_Sized = tuple[TensorRecord, str]  # a tensor and its new dtype


def _new_dtype(record: TensorRecord, dtype: str) -> str:
    if record.dtype in SOURCES:
        return dtype
    if record.dtype not in _KEPT:
        raise CheckpointError(
            "a dtype that cannot be converted",
            file=record.file,
            tensor=record.name,
            expected=f"{', '.join(SOURCES)}, or integers and booleans, which are kept",
            found=record.dtype,
        )
    return record.dtype


def _bytes(sized: _Sized) -> int:
    record, dtype = sized
    return record.size_bytes * BITS[dtype] // BITS[record.dtype]


def _groups(tensors: Iterable[_Sized], max_bytes: int) -> Iterator[list[_Sized]]:
    group: list[_Sized] = []
    group_bytes = 0
    for sized in tensors:
        if group and group_bytes + _bytes(sized) > max_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(sized)
        group_bytes += _bytes(sized)
    yield group


def _output_file(name: str, group: Sequence[_Sized]) -> OutputFile:
    """Wide dtypes come first, so that every tensor is aligned."""
    ordered = sorted(group, key=lambda sized: -BITS[sized[1]])
    header = _header(ordered)
    moves: list[Move] = []
    position = len(header)
    for record, dtype in ordered:
        target = TensorRecord(record.name, name, position, dtype, record.shape)
        moves.append(Move(record, target))
        position += target.size_bytes
    return OutputFile(name, header, tuple(moves))


def _header(group: Sequence[_Sized]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    position = 0
    for record, dtype in group:
        end = position + _bytes((record, dtype))
        offsets = [position, end]
        entries[record.name] = {"dtype": dtype, "shape": record.shape, "data_offsets": offsets}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text
