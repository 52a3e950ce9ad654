"""Checkpoints with real headers in sparse files: the tensors use almost no disk space."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import FILE_BYTES, Shape

NEOX_20B = Shape(44, 6144, 64, vocab_size=50432)  # Black et al., 2022, arXiv:2204.06745
_ITEM_BYTES = 2  # bfloat16

Dims = tuple[int, ...]


@dataclass(frozen=True)
class SparseTensor:
    """The position of one tensor."""

    file: Path
    name: str
    dims: Dims
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        """The size of all its elements."""
        return math.prod(self.dims) * _ITEM_BYTES


def write(
    folder: Path,
    config: dict[str, object],
    tensors: Iterable[tuple[str, Dims]],
    file_bytes: int = FILE_BYTES,
) -> list[SparseTensor]:
    """Writes headers, index and config.json; returns the positions of the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = list(_files(tensors, file_bytes))
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    files = zip(names, groups, strict=True)
    records = [record for name, group in files for record in _write_file(folder / name, group)]
    weight_map = {record.name: record.file.name for record in records}
    total = sum(record.size_bytes for record in records)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return records


def _files(tensors: Iterable[tuple[str, Dims]], file_bytes: int) -> Iterator[dict[str, Dims]]:
    """Name → shape for each file."""
    group: dict[str, Dims] = {}
    total = 0
    for name, dims in tensors:
        size_bytes = math.prod(dims) * _ITEM_BYTES
        if group and total + size_bytes > file_bytes:
            yield group
            group, total = {}, 0
        group[name] = dims
        total += size_bytes
    yield group


def _write_file(path: Path, tensors: dict[str, Dims]) -> list[SparseTensor]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in tensors.items():
        stop = offset + math.prod(dims) * _ITEM_BYTES
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + offset)
    entries = [(name, header[name]) for name in tensors]
    return [
        SparseTensor(path, name, tensors[name], start + entry["data_offsets"][0])
        for name, entry in entries
    ]
