"""The files that torch.save writes (`.bin`, `.pt`): a zip archive with a pickle and the storages.

    <name>/data.pkl   a dict, tensor name → storage, offset, shape, strides
    <name>/data/<n>   one storage, uncompressed: its numbers as they are in memory

Only headers and data.pkl are read. torch is not needed, no code of the file is run, and what this
reader does not know it refuses: there is no other way of reading behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mtj_loader.dtypes import BITS
from mtj_loader.errors import FormatError
from mtj_loader.formats.records import FileVersion, TensorRecord
from mtj_loader.formats.restricted_pickle import read_pickle
from mtj_loader.formats.safetensors import is_plain_name
from mtj_loader.formats.torch_objects import StorageRef, TensorRef, kind
from mtj_loader.formats.zip_archive import (
    Directory,
    Member,
    find_members,
    read_directory,
    read_member,
)
from mtj_loader.storage.base import Storage

_MAX_PICKLE_BYTES = 32 << 20  # a dict of 100,000 tensors takes 20,000,000
_MAX_WORD_BYTES = 16  # of the members that hold one word
_MAX_ELEMENTS = 2**59  # numpy counts bytes with 63 bits, also for a shape that a 0 makes harmless

_SAVE_AGAIN = "save it again with a current torch, as a dict of plain tensors, or as safetensors"
_MAGIC = {
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.": "pickles in a row, as torch wrote before 1.6",
    b"\x80": "a Python pickle",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
    b"<!DOCTYPE html": "a web page",
    b"<html": "a web page",
}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_TORCHSCRIPT = ("code/", "constants.pkl")  # what a saved program has and saved tensors have not


def read_records(storage: Storage, stamp: FileVersion) -> list[TensorRecord]:
    """Reads the directory and the pickle of one file, and nothing of its tensors' data.

    Args:
      storage: where the file is.
      stamp: taken before; its size is what the archive has to account for, to the byte.

    Returns:
      The tensors in the order of their offsets; `strides` where they are not row-major. Tensors
      may share their bytes.

    Raises:
      FormatError: not such a file, damaged, or anything in it besides plain tensors by name.
    """
    _check_start(storage, stamp)
    directory = read_directory(storage, stamp)
    folder = _folder(directory, stamp.path)
    found = find_members(storage, stamp, directory)
    members = {name.removeprefix(folder): member for name, member in found.items()}
    _check_byte_order(storage, stamp.path, members)
    pickle = read_member(storage, stamp.path, members["data.pkl"], _MAX_PICKLE_BYTES)
    tensors = read_pickle(pickle, file=stamp.path)
    if not isinstance(tensors, dict):
        expected = "a dict, tensor name → tensor"
        raise FormatError("not a dict", file=stamp.path, expected=expected, found=kind(tensors))
    records = [_record(name, value, stamp.path, members) for name, value in tensors.items()]
    return sorted(records, key=lambda record: (record.offset_bytes, record.size_bytes))


def _check_start(storage: Storage, stamp: FileVersion) -> None:
    """Says what else a file is, if it is no zip archive."""
    start = storage.read(stamp.path, 0, min(stamp.size_bytes, 512))
    if start.startswith(b"PK\x03\x04"):
        return
    found = next((_MAGIC[magic] for magic in _MAGIC if start.startswith(magic)), None)
    if start[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        found = "a tar archive, as the first versions of torch wrote"
    raise FormatError(
        "not a file of torch.save",
        file=stamp.path,
        expected="a zip archive from its first byte on",
        found=found or (start[:8].hex(" ") if start else "an empty file"),
        hint=_SAVE_AGAIN,
    )


def _folder(directory: Directory, file: str) -> str:
    """The folder that all members of the archive are in, with its slash."""
    names = [entry.name for entry in directory.entries]
    folders = {name.partition("/")[0] + "/" for name in names}
    folder = min(folders, default="")
    inside = [name.removeprefix(folder) for name in names]
    if any(name.startswith(_TORCHSCRIPT) for name in inside):
        what = "a TorchScript program, which is code, not a file of tensors"
        raise FormatError(what, file=file, hint=_SAVE_AGAIN)
    if len(folders) != 1 or "data.pkl" not in inside:
        expected = "one folder with data.pkl in it"
        found = f"{len(names)} members in {len(folders)} folders"
        raise FormatError("not a file of torch.save", file=file, expected=expected, found=found)
    return folder


def _check_byte_order(storage: Storage, file: str, members: Mapping[str, Member]) -> None:
    """Before 2.1, torch did not say; it was little-endian, as all machines that matter."""
    if "byteorder" not in members:
        return
    order = read_member(storage, file, members["byteorder"], _MAX_WORD_BYTES)
    if order != b"little":
        raise FormatError("wrong byte order", file=file, expected="little", found=repr(order))


def _record(name: str, value: object, file: str, members: Mapping[str, Member]) -> TensorRecord:
    if not is_plain_name(name):
        expected = "printable characters, no `..` between slashes"
        raise FormatError("bad tensor name", file=file, tensor=ascii(name), expected=expected)
    if not isinstance(value, TensorRef):
        what = "the dict holds something else than tensors"
        raise FormatError(what, file=file, key=name, expected="a tensor", found=kind(value))
    member = _data(name, value.storage, file, members)
    _check_window(name, value, file)
    offset = member.offset_bytes + value.offset * BITS[value.storage.dtype] // 8
    strides = None if _is_row_major(value) else value.strides
    return TensorRecord(name, file, offset, value.storage.dtype, value.shape, strides)


def _data(name: str, storage: StorageRef, file: str, members: Mapping[str, Member]) -> Member:
    """The member that holds a storage."""
    member = members.get(f"data/{storage.key}")
    if member is None or member.size_bytes != storage.size_bytes:
        raise FormatError(
            "a tensor's storage is missing or of another size",
            file=file,
            tensor=name,
            key=f"data/{storage.key}",
            expected=f"{storage.size_bytes:,} bytes",
            found="no such member" if member is None else f"{member.size_bytes:,} bytes",
        )
    return member


def _check_window(name: str, tensor: TensorRef, file: str) -> None:
    """The tensor lies in its storage, and is not made larger than it by repeating elements."""
    elements, shape = tensor.storage.elements, tensor.shape
    reach = sum((size - 1) * stride for size, stride in zip(shape, tensor.strides, strict=True))
    end = tensor.offset + (0 if 0 in shape else reach + 1)
    where = {"file": file, "tensor": name}
    if end > elements:
        what, expected = "a tensor reaches beyond its storage", f"at most {elements:,} elements"
        raise FormatError(what, **where, expected=expected, found=f"{end:,}")
    if math.prod(shape) > elements:
        what, expected = "a tensor repeats its elements", f"at most {elements:,}, those it has"
        hint = "save what tensor.contiguous() makes of it"
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
