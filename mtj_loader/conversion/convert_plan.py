"""Planning a conversion: what is read, and the files, headers and offsets that are written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

from mtj_loader.conversion.casting import SAFETENSORS_NAMES, SOURCE_DTYPES
from mtj_loader.conversion.output_folder import check_disk_space
from mtj_loader.dtypes import BITS, parameter_dtype
from mtj_loader.errors import CheckpointError, StorageError, UsageError
from mtj_loader.formats.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    existing_path,
    open_checkpoint,
    repository_files,
)
from mtj_loader.formats.file_names import INDEX_FILE, OTHER_WEIGHTS, SINGLE_FILE, SUFFIX
from mtj_loader.formats.records import TensorRecord
from mtj_loader.options import PathLike, Source
from mtj_loader.storage.base import Storage, is_relative_name
from mtj_loader.storage.local import LocalStorage

_KEPT_DTYPES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_ALIGNMENT_BYTES = 8  # of the header, as in the reference writer, so that the data is aligned
_WEIGHT_SUFFIXES = (SUFFIX, *OTHER_WEIGHTS, ".ckpt", ".onnx_data", ".tflite", ".index.json")
_MAX_COPIED_BYTES = 100_000_000  # three times the largest tokenizers; weight files are larger


@dataclass(frozen=True)
class TensorConversion:
    """A tensor in a source file and in an output file; the dtypes may differ."""

    source: TensorRecord
    target: TensorRecord


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to write: the header, and the tensors that follow it without gaps."""

    name: str
    header: bytes
    tensors: tuple[TensorConversion, ...]

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + self.data_bytes

    @property
    def data_bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.target.size_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class ConvertPlan:
    """A planned conversion.

    Attributes:
      checkpoint: the source.
      target: the output folder; its path contains no links.
      dtype: of the converted floats, as numpy spells it.
      files: the weight files to write.
      copied, left_out: other files of the checkpoint that are copied, and that are not.
      warnings: for the report.
    """

    checkpoint: Checkpoint
    target: Path
    dtype: str
    files: tuple[OutputFile, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def tensors(self) -> list[TensorConversion]:
        """All tensors, in the order of the output files."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def source_bytes(self) -> int:
        """Size of all tensors in the source."""
        return sum(tensor.source.size_bytes for tensor in self.tensors)


def find_target(src: PathLike, out: PathLike | None, dtype: str) -> Path:
    """The output folder, without links in its path: a rename would replace the link.

    Without `out` it is `<name>-<dtype>`, next to the source if that is a local path.

    Raises:
      UsageError: an invalid path.
    """
    path = existing_path(src)
    if out is not None:
        return _resolve(out)
    if path is None:  # a URL, whose query is not part of the name, or a Hugging Face id
        name = Path(os.fspath(src).partition("?")[0]).name
        return Path.cwd() / f"{name.removesuffix(SUFFIX)}-{dtype}"
    path = path.resolve() if path.name in ("", "..") else path.absolute()  # so that it has a name
    return path.parent.resolve() / f"{path.name.removesuffix(SUFFIX)}-{dtype}"


def make_plan(source: Source, target: Path, dtype: str, max_shard_bytes: int) -> ConvertPlan:
    """Plans a conversion; downloads the files of a Hugging Face repository.

    Args:
      source: the checkpoint.
      target: see `find_target`.
      dtype: of the converted floats, as numpy spells it.
      max_shard_bytes: maximum size of the tensors in an output file.

    Raises:
      UsageError: the target contains the source; or see `open_checkpoint`.
      CheckpointError: a tensor has a dtype that is neither converted nor kept; or see there.
      StorageError: not enough disk space; or see there.
    """
    names, warnings = _list_repository(source)
    also = [name for name in names if _is_copied(name, 0) and "/" not in name]
    checkpoint = open_checkpoint(source, also=also)
    storage = checkpoint.storage
    if isinstance(storage, LocalStorage) and storage.root.resolve().is_relative_to(target):
        raise UsageError("the output would replace its source", file=target)
    new_dtype = SAFETENSORS_NAMES[parameter_dtype(dtype)]
    files = plan_files(checkpoint.index.records.values(), new_dtype, max_shard_bytes)
    check_disk_space(target, sum(file.size_bytes for file in files))
    copied, left_out = _sort_other_files(checkpoint, _list_top_level(storage, names))
    warnings = (*checkpoint.index.warnings, *warnings)
    return ConvertPlan(checkpoint, target, dtype, files, tuple(copied), tuple(left_out), warnings)


def plan_files(
    records: Iterable[TensorRecord], dtype: str, max_shard_bytes: int
) -> tuple[OutputFile, ...]:
    """Distributes tensors, in their order, over files.

    Args:
      records: all tensors.
      dtype: of the converted floats, as safetensors spells it; integers and booleans are kept.
      max_shard_bytes: maximum size of the tensors in a file; a larger tensor gets its own file.

    Raises:
      CheckpointError: a tensor has a dtype that is neither converted nor kept.
    """
    tensors = [TensorConversion(r, replace(r, dtype=_new_dtype(r, dtype))) for r in records]
    shards = list(_split_into_shards(tensors, max_shard_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    return tuple(_lay_out(name, shard) for name, shard in zip(names, shards, strict=True))


def make_index(files: Sequence[OutputFile]) -> dict[str, object]:
    """The contents of `model.safetensors.index.json` for these files."""
    total = sum(file.data_bytes for file in files)
    weight_map = {tensor.target.name: file.name for file in files for tensor in file.tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _resolve(path: PathLike) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an unknown ~user, NUL
        raise UsageError("cannot use this path", file=ascii(path), found=str(error)) from error


def _list_repository(source: Source) -> tuple[list[str], list[str]]:
    """The files of a Hugging Face repository, and warnings."""
    try:
        return [] if source.local_files_only else repository_files(source), []
    except StorageError:  # the cache may have everything that is needed
        return [], ["the hub cannot be reached: only files in the cache were copied"]


def _list_top_level(storage: Storage, names: list[str]) -> tuple[str, ...]:
    """Files and folders at the top of a repository; only the folders of a local checkpoint."""
    if not names and isinstance(storage, LocalStorage):
        names = [f"{path.name}/" for path in storage.root.iterdir() if path.is_dir()]
    parts = [name.partition("/") for name in names]
    return tuple({first + slash for first, slash, _ in parts})


def _sort_other_files(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files to copy, and those to leave out; config, index and weights are written anew."""
    storage = checkpoint.storage
    written = {CONFIG_FILE, INDEX_FILE, *checkpoint.index.files}
    stored = storage.names()
    sizes = {n: storage.version(n).size_bytes for n in stored if is_relative_name(n)}
    copied = [n for n, size in sizes.items() if n not in written and _is_copied(n, size)]
    return copied, sorted({*stored, *names} - written - set(copied))


def _is_copied(name: str, size_bytes: int) -> bool:
    return not name.endswith(_WEIGHT_SUFFIXES) and size_bytes <= _MAX_COPIED_BYTES


def _new_dtype(record: TensorRecord, dtype: str) -> str:
    if record.dtype in SOURCE_DTYPES:
        return dtype
    if record.dtype not in _KEPT_DTYPES:
        raise CheckpointError(
            "this dtype cannot be converted",
            file=record.file,
            tensor=record.name,
            expected=f"{', '.join(SOURCE_DTYPES)}, or integers and booleans, which are kept",
            found=record.dtype,
        )
    return record.dtype


def _split_into_shards(
    tensors: Iterable[TensorConversion], max_bytes: int
) -> Iterator[list[TensorConversion]]:
    shard: list[TensorConversion] = []
    shard_bytes = 0
    for tensor in tensors:
        if shard and shard_bytes + tensor.target.size_bytes > max_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append(tensor)
        shard_bytes += tensor.target.size_bytes
    yield shard


def _lay_out(name: str, shard: Sequence[TensorConversion]) -> OutputFile:
    """Places wide dtypes first, so that every tensor is aligned."""
    ordered = sorted(shard, key=lambda tensor: -BITS[tensor.target.dtype])
    ends = accumulate((tensor.target.size_bytes for tensor in ordered), initial=0)
    spans = list(pairwise(ends))
    header = _encode_header([tensor.target for tensor in ordered], spans)
    offsets = [len(header) + start for start, _ in spans]
    placed = [
        replace(tensor, target=replace(tensor.target, file=name, offset_bytes=at, strides=None))
        for tensor, at in zip(ordered, offsets, strict=True)
    ]
    return OutputFile(name, header, tuple(placed))


def _encode_header(records: Sequence[TensorRecord], spans: Sequence[tuple[int, int]]) -> bytes:
    """The header of a file; `spans` are the first byte of each tensor's data, and the one after."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    for record, span in zip(records, spans, strict=True):
        fields = {"dtype": record.dtype, "shape": record.shape, "data_offsets": span}
        entries[record.name] = fields
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text
