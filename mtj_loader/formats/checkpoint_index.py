"""The tensors of a checkpoint, and its index file, which maps tensors to files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief

from mtj_loader.errors import CheckpointError, FormatError
from mtj_loader.formats.file_names import (
    INDEX_FILE,
    SUFFIX,
    check_numbering,
    choose_files,
    join_names,
    shard_total,
)
from mtj_loader.formats.records import TensorIndex, TensorRecord
from mtj_loader.formats.safetensors import MAX_HEADER_BYTES, read_records
from mtj_loader.formats.strict_json import read_object
from mtj_loader.storage.base import FileVersion, Storage, is_relative_name


@dataclass(frozen=True)
class IndexFile:
    """The contents of `model.safetensors.index.json`."""

    files: Mapping[str, str]  # tensor name → file
    total_size: object  # as claimed, in bytes; None if absent

    @property
    def shards(self) -> list[str]:
        """The distinct files, sorted."""
        return sorted(set(self.files.values()))


def build_index(storage: Storage, files: Sequence[str] | None = None) -> TensorIndex:
    """Reads the headers of a checkpoint, but none of its tensors' data.

    Args:
      storage: the checkpoint's files.
      files: the files to read. None means those in the index, or those that `choose_files` picks if
        there is no index.

    Returns:
      All tensors, ordered by file and offset.

    Raises:
      FormatError: a header or the index is malformed, or they contradict each other.
      CheckpointError: a file is missing, or it is not clear which files are the weights.
    """
    if files is not None:
        return _read_files(storage, files, _incomplete_sets(files))
    if storage.exists(INDEX_FILE):
        return _read_listed(storage, read_index(storage))
    chosen = choose_files(storage.names(), location=storage.location)
    warnings = []
    if others := _other_weights(storage, chosen):
        warnings = [f"not read: {join_names(others)}; the weights are {join_names(chosen)}"]
    return _read_files(storage, chosen, warnings)


def read_index(storage: Storage) -> IndexFile:
    """Reads `model.safetensors.index.json` and makes all checks that do not need the weights.

    Raises:
      FormatError: no `weight_map` of strings; a duplicate key; a file name that leaves the folder
        or has another suffix; a gap in the numbers k of N.
    """
    document = read_object(storage, INDEX_FILE, max_bytes=MAX_HEADER_BYTES)
    files, metadata = document.get("weight_map"), document.get("metadata", {})
    if not isinstance(files, dict) or not files:
        raise _bad_index("weight_map", "tensor names and their files", files)
    if not isinstance(metadata, dict):
        raise _bad_index("metadata", "an object", metadata)
    for tensor, file in files.items():
        _check_entry(tensor, file)
    index = IndexFile(files, metadata.get("total_size"))
    check_numbering(index.shards)
    return index


def _read_listed(storage: Storage, index: IndexFile) -> TensorIndex:
    """Reads the tensors that the index lists; reports all others as warnings."""
    found_files = storage.prepare(index.shards)
    if missing := [file for file in index.shards if file not in found_files]:
        found = f"no {join_names(missing)}"
        raise CheckpointError("a file in the index is missing", file=INDEX_FILE, found=found)
    whole = _read_files(storage, index.shards)
    _check_listed(index.files, whole.records)
    records = {n: record for n, record in whole.records.items() if n in index.files}
    warnings = [
        *_unlisted_files(storage, index),
        *_unlisted_tensors(whole.records, index),
        *_wrong_total(records.values(), index),
    ]
    return TensorIndex(records, whole.files, tuple(warnings))


def _read_files(
    storage: Storage, files: Sequence[str], warnings: Sequence[str] = ()
) -> TensorIndex:
    versions: dict[str, FileVersion] = {}
    records: dict[str, TensorRecord] = {}
    prepared = storage.prepare(files)
    for file in files:
        versions[file] = prepared.get(file) or storage.version(file)
        for record in read_records(storage, versions[file]):
            if record.name in records:
                raise _duplicate(records[record.name], record)
            records[record.name] = record
    if not records:
        raise CheckpointError("the weights contain no tensors", file=join_names(files))
    return TensorIndex(records, versions, tuple(warnings))


def _check_entry(tensor: str, file: object) -> None:
    if isinstance(file, str) and is_relative_name(file) and file.endswith(SUFFIX):
        return
    expected = "a string"
    if isinstance(file, str):
        expected = "a file inside the checkpoint's folder"
        if is_relative_name(file):
            expected = f"a file whose name ends in {SUFFIX}"
    raise _bad_index(f"weight_map.{tensor}", expected, file)


def _check_listed(files: Mapping[str, str], records: Mapping[str, TensorRecord]) -> None:
    for tensor, file in files.items():
        record = records.get(tensor)
        if record is None or record.file != file:
            raise FormatError(
                "a tensor is not in the file that the index names",
                file=INDEX_FILE,
                tensor=tensor,
                expected=file,
                found=record.file if record else "in none of the index's files",
            )


def _incomplete_sets(files: Sequence[str]) -> list[str]:
    totals = {file: shard_total(file) or 1 for file in files}
    return [
        f"{file} is one of {total} files; pass their folder to read all of them"
        for file, total in totals.items()
        if total > len(files)
    ]


def _unlisted_files(storage: Storage, index: IndexFile) -> Iterator[str]:
    if others := _other_weights(storage, index.shards):
        yield f"not in {INDEX_FILE}, so not read: {join_names(others)}"


def _unlisted_tensors(records: Mapping[str, TensorRecord], index: IndexFile) -> Iterator[str]:
    names = [name for name in records if name not in index.files]
    if names:
        count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        yield f"{count} not in {INDEX_FILE}, so not read: {join_names(names)}"


def _wrong_total(records: Iterable[TensorRecord], index: IndexFile) -> Iterator[str]:
    total_bytes = sum(record.size_bytes for record in records)
    if index.total_size not in (None, total_bytes):
        claim = brief(index.total_size)
        yield f"{INDEX_FILE}: total_size is {claim}, but its tensors have {total_bytes} bytes"


def _other_weights(storage: Storage, chosen: Sequence[str]) -> list[str]:
    return [n for n in storage.names() if n.endswith(SUFFIX) and n not in chosen]


def _duplicate(first: TensorRecord, second: TensorRecord) -> FormatError:
    return FormatError(
        "a tensor is in two files",
        file=second.file,
        tensor=first.name,
        expected=f"only in {first.file}",
        found="in both",
    )


def _bad_index(key: str, expected: str, found: object) -> FormatError:
    return FormatError("bad index", file=INDEX_FILE, key=key, expected=expected, found=brief(found))
