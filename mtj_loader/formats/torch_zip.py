"""Reads files by torch.save (`.bin`, `.pt`): a zip archive of a pickle and storages.

    <name>/data.pkl   a dict, tensor name → storage, offset, shape, strides
    <name>/data/<n>   one storage, uncompressed, as in memory

Needs no torch and runs no code of the file. Anything unknown is rejected; there is no fallback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mtj_loader.dtypes import BITS
from mtj_loader.errors import FormatError
from mtj_loader.formats.records import FOREIGN_MAGIC, TensorRecord, check_name
from mtj_loader.formats.restricted_pickle import read_pickle
from mtj_loader.formats.torch_objects import StorageRef, TensorRef, describe_value
from mtj_loader.formats.zip_archive import (
    Directory,
    Member,
    check_sums,
    find_members,
    read_directory,
    read_member,
)
from mtj_loader.storage.base import FileVersion, Storage

_MAX_PICKLE_BYTES = 4 << 20  # a dict of 18,000 tensors takes 2,800,000
_MAX_WORD_BYTES = 16  # of a member that contains one word
_MAX_ELEMENTS = 2**59  # numpy counts bytes with 63 bits, even if another dimension is 0

_NOT_TORCH = "not a file written by torch.save"
_SAVE_AGAIN = "save it again with a current torch, as a dict of plain tensors, or as safetensors"
_MAGIC = FOREIGN_MAGIC | {
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.": "several pickles, as written before torch 1.6",
    b"\x80": "a Python pickle",
}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_TORCHSCRIPT = ("code/", "constants.pkl")  # only in saved programs


def read_records(storage: Storage, version: FileVersion) -> list[TensorRecord]:
    """Finds the tensors of one file. Reads all of it once, to check its checksums.

    Args:
      storage: where the file is.
      version: of the file; the archive must account for every byte of its size.

    Returns:
      The tensors in the order of their offsets, with `strides` if they are not row-major. Tensors
      may share bytes.

    Raises:
      FormatError: another format, a damaged file, or anything in it but a dict of plain tensors.
    """
    _check_start(storage, version)
    directory = read_directory(storage, version)
    folder = _find_folder(directory, version.path)
    found = find_members(storage, version, directory)
    members = {name.removeprefix(folder): member for name, member in found.items()}
    _check_byte_order(storage, version.path, members)
    pickle = read_member(storage, version.path, members["data.pkl"], _MAX_PICKLE_BYTES)
    tensors = read_pickle(pickle, file=version.path)
    if not isinstance(tensors, dict):
        expected, found = "a dict, tensor name → tensor", describe_value(tensors)
        raise FormatError("not a dict", file=version.path, expected=expected, found=found)
    records = [_record(name, value, version.path, members) for name, value in tensors.items()]
    check_sums(storage, version.path, found.values())
    return sorted(records, key=lambda record: (record.offset_bytes, record.size_bytes))


def _check_start(storage: Storage, version: FileVersion) -> None:
    """Checks for a zip archive, and otherwise reports what the file is."""
    start = storage.read(version.path, 0, min(version.size_bytes, 512))
    if start.startswith(b"PK\x03\x04"):
        return
    found = next((_MAGIC[magic] for magic in _MAGIC if start.startswith(magic)), None)
    if start[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        found = "a tar archive, as written by the first versions of torch"
    raise FormatError(
        _NOT_TORCH,
        file=version.path,
        expected="a zip archive that starts at byte 0",
        found=found or (start[:8].hex(" ") if start else "an empty file"),
        hint=_SAVE_AGAIN,
    )


def _find_folder(directory: Directory, file: str) -> str:
    """The folder that contains all members of the archive, with its slash."""
    names = [entry.name for entry in directory.entries]
    folders = {name.partition("/")[0] + "/" for name in names}
    folder = min(folders, default="")
    inside = [name.removeprefix(folder) for name in names]
    if any(name.startswith(_TORCHSCRIPT) for name in inside):
        what = "a TorchScript program, which is code, not a file of tensors"
        raise FormatError(what, file=file, hint=_SAVE_AGAIN)
    if len(folders) != 1 or "data.pkl" not in inside:
        expected = "one folder that contains data.pkl"
        found = f"{len(names)} members in {len(folders)} folders"
        raise FormatError(_NOT_TORCH, file=file, expected=expected, found=found)
    return folder


def _check_byte_order(storage: Storage, file: str, members: Mapping[str, Member]) -> None:
    """Rejects big-endian files. torch before 2.1 wrote no byte order; such files are accepted."""
    if "byteorder" not in members:
        return
    order = read_member(storage, file, members["byteorder"], _MAX_WORD_BYTES)
    if order != b"little":
        raise FormatError("wrong byte order", file=file, expected="little", found=repr(order))


def _record(name: str, value: object, file: str, members: Mapping[str, Member]) -> TensorRecord:
    check_name(name, file)
    if not isinstance(value, TensorRef):
        what = "a value of the dict is not a tensor"
        raise FormatError(
            what, file=file, key=name, expected="a tensor", found=describe_value(value)
        )
    member = _find_storage(name, value.storage, file, members)
    _check_window(name, value, file)
    offset = member.offset_bytes + value.offset * BITS[value.storage.dtype] // 8
    strides = None if _is_row_major(value) else value.strides
    return TensorRecord(name, file, offset, value.storage.dtype, value.shape, strides)


def _find_storage(
    name: str, storage: StorageRef, file: str, members: Mapping[str, Member]
) -> Member:
    """The member that contains a storage."""
    member = members.get(f"data/{storage.key}")
    if member is None or member.size_bytes != storage.size_bytes:
        raise FormatError(
            "a tensor's storage is missing or has the wrong size",
            file=file,
            tensor=name,
            key=f"data/{storage.key}",
            expected=f"{storage.size_bytes:,} bytes",
            found="no such member" if member is None else f"{member.size_bytes:,} bytes",
        )
    return member


def _check_window(name: str, tensor: TensorRef, file: str) -> None:
    """Checks that a tensor lies within its storage and does not repeat elements of it."""
    elements, shape = tensor.storage.elements, tensor.shape
    reach = sum((size - 1) * stride for size, stride in zip(shape, tensor.strides, strict=True))
    end = tensor.offset + (0 if 0 in shape else reach + 1)
    where = {"file": file, "tensor": name}
    if end > elements:
        what, expected = "a tensor extends beyond its storage", f"at most {elements:,} elements"
        raise FormatError(what, **where, expected=expected, found=f"{end:,}")
    if math.prod(shape) > elements:
        what, expected = "a tensor repeats its elements", f"at most {elements:,} elements"
        hint = "save tensor.contiguous() instead"
        raise FormatError(what, **where, expected=expected, found=list(shape), hint=hint)
    if math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        raise FormatError("a tensor's shape is impossible", **where, found=list(shape))


def _is_row_major(tensor: TensorRef) -> bool:
    expected = 1
    for size, stride in reversed(list(zip(tensor.shape, tensor.strides, strict=True))):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
