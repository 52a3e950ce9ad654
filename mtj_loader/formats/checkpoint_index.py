"""All tensors of a checkpoint, and the index file that says which of its files holds which."""

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
    listed,
    shard_total,
)
from mtj_loader.formats.records import FileVersion, TensorIndex, TensorRecord
from mtj_loader.formats.safetensors import MAX_HEADER_BYTES, read_records
from mtj_loader.storage.base import Storage, is_relative_name, read_object


@dataclass(frozen=True)
class WeightMap:
    """What `model.safetensors.index.json` says."""

    files: Mapping[str, str]  # tensor name → file
    total_size: object  # what it claims, in bytes; None where it does not

    @property
    def shards(self) -> list[str]:
        """The files, sorted."""
        return sorted(set(self.files.values()))


def build_index(storage: Storage, files: Sequence[str] | None = None) -> TensorIndex:
    """Reads the headers of a checkpoint, and not a byte of its tensors.

    Args:
      storage: the checkpoint's files.
      files: read just these. None: those that the index names, or without an index those that
        `choose_files` finds.

    Returns:
      All tensors, ordered by file and by offset in it.

    Raises:
      FormatError: a header or the index is malformed, or they contradict each other.
      CheckpointError: a file is missing, or it is not clear which files are meant.
    """
    if files is not None:
        return _index_files(storage, files, _parts_of_sets(files))
    if storage.exists(INDEX_FILE):
        return _index_map(storage, read_weight_map(storage))
    chosen = choose_files(storage.names())
    others = _other_weights(storage, chosen)
    warnings = [f"not read: {listed(others)}; the weights are {listed(chosen)}"] if others else []
    return _index_files(storage, chosen, warnings)


def read_weight_map(storage: Storage) -> WeightMap:
    """Reads `model.safetensors.index.json`, and checks what can be checked without the weights.

    Raises:
      FormatError: no `weight_map` of strings; a key twice; a file name that leaves the folder or
        has another suffix; a gap in the numbers k of N.
    """
    document = read_object(storage, INDEX_FILE, max_bytes=MAX_HEADER_BYTES)
    files, metadata = document.get("weight_map"), document.get("metadata", {})
    if not isinstance(files, dict) or not files:
        raise _bad_map("weight_map", "tensor names and their files", files)
    if not isinstance(metadata, dict):
        raise _bad_map("metadata", "an object", metadata)
    for tensor, file in files.items():
        _check_entry(tensor, file)
    weight_map = WeightMap(files, metadata.get("total_size"))
    check_numbering(weight_map.shards)
    return weight_map


def _index_map(storage: Storage, weight_map: WeightMap) -> TensorIndex:
    """The index is an allow-list: what it does not name is left out, and said."""
    there = storage.prepare(weight_map.shards)
    if missing := [file for file in weight_map.shards if file not in there]:
        found = f"no {listed(missing)}"
        raise CheckpointError("a file of the index is missing", file=INDEX_FILE, found=found)
    whole = _index_files(storage, weight_map.shards)
    _check_listed(weight_map.files, whole.records)
    records = {n: record for n, record in whole.records.items() if n in weight_map.files}
    warnings = [
        *_unlisted_files(storage, weight_map),
        *_unlisted_tensors(whole.records, weight_map),
        *_wrong_total(records.values(), weight_map),
    ]
    return TensorIndex(records, whole.files, tuple(warnings))


def _index_files(
    storage: Storage, files: Sequence[str], warnings: Sequence[str] = ()
) -> TensorIndex:
    stamps: dict[str, FileVersion] = {}
    records: dict[str, TensorRecord] = {}
    prepared = storage.prepare(files)
    for file in files:
        stamps[file] = prepared.get(file) or storage.stamp(file)
        for record in read_records(storage, stamps[file]):
            if record.name in records:
                raise _twice(records[record.name], record)
            records[record.name] = record
    if not records:
        raise CheckpointError("no tensor at all in the weights", file=listed(files))
    return TensorIndex(records, stamps, tuple(warnings))


def _check_entry(tensor: str, file: object) -> None:
    if isinstance(file, str) and is_relative_name(file) and file.endswith(SUFFIX):
        return
    expected = "a string"
    if isinstance(file, str):
        expected = "a file inside the checkpoint's folder"
        if is_relative_name(file):
            expected = f"a file whose name ends in {SUFFIX}"
    raise _bad_map(f"weight_map.{tensor}", expected, file)


def _check_listed(files: Mapping[str, str], records: Mapping[str, TensorRecord]) -> None:
    for tensor, file in files.items():
        record = records.get(tensor)
        if record is None or record.file != file:
            raise FormatError(
                "a tensor is not in the file that the index names",
                file=INDEX_FILE,
                tensor=tensor,
                expected=file,
                found=record.file if record else "in no file of the index",
            )


def _parts_of_sets(files: Sequence[str]) -> list[str]:
    totals = {file: shard_total(file) or 1 for file in files}
    return [
        f"{file} is one of {total} files; name their folder to read them all"
        for file, total in totals.items()
        if total > len(files)
    ]


def _unlisted_files(storage: Storage, weight_map: WeightMap) -> Iterator[str]:
    if others := _other_weights(storage, weight_map.shards):
        yield f"{INDEX_FILE} decides; not in it, so not read: {listed(others)}"


def _unlisted_tensors(records: Mapping[str, TensorRecord], weight_map: WeightMap) -> Iterator[str]:
    names = [name for name in records if name not in weight_map.files]
    if names:
        count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        yield f"{count} not in {INDEX_FILE}, so not read: {listed(names)}"


def _wrong_total(records: Iterable[TensorRecord], weight_map: WeightMap) -> Iterator[str]:
    total_bytes = sum(record.size_bytes for record in records)
    if weight_map.total_size not in (None, total_bytes):
        claim = brief(weight_map.total_size)
        yield f"{INDEX_FILE}: total_size is {claim}, but its tensors have {total_bytes} bytes"


def _other_weights(storage: Storage, chosen: Sequence[str]) -> list[str]:
    return [n for n in storage.names() if n.endswith(SUFFIX) and n not in chosen]


def _twice(first: TensorRecord, second: TensorRecord) -> FormatError:
    return FormatError(
        "a tensor is in two files",
        file=second.file,
        tensor=first.name,
        expected=f"only in {first.file}",
        found="in both",
    )


def _bad_map(key: str, expected: str, found: object) -> FormatError:
    return FormatError("bad index", file=INDEX_FILE, key=key, expected=expected, found=brief(found))
