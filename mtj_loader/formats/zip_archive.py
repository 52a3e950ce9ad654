"""The zip archives that torch.save writes: stored members, one after another, nothing else.

    local header, name, padding, data, descriptor   (for each member, with no gap)
    the directory   the zip64 directory's end   its locator   the directory's end

Stricter than zip: what is told twice must agree, and every byte must belong to something, so that
no other reader can find another archive in the same file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from mtj_loader.errors import FormatError
from mtj_loader.formats.records import FileVersion
from mtj_loader.storage.base import Storage

_LOCAL = Struct("<4s5H3L2H")  # …, flags, method, …, crc, packed, size, name length, extra length
_DIRECTORY = Struct("<4s6H3L5H2L")  # the same, …, comment length, disk, …, offset
_END = Struct("<4s4H2LH")  # …, disks, …, entries, directory's size and offset, comment length
_END64 = Struct("<4sQ2H2L4Q")
_LOCATOR = Struct("<4sLQL")  # …, disk, offset of the zip64 end, disks
_TAIL_BYTES = _END64.size + _LOCATOR.size + _END.size
_DESCRIPTOR = Struct("<4sL2L")  # …, crc, packed, size: what a writer learns after the data
_DESCRIPTOR64 = Struct("<4sL2Q")
_TAG = Struct("<2H")  # of a field in `extra`: which, and how long

_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 field"
_ZIP64_EXTRA = 1
_ENCRYPTED, _HAS_DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800  # flags; torch sets the last two
_MAX_DIRECTORY_BYTES = 32 << 20  # of 100,000 tensors it takes 10,000,000


@dataclass(frozen=True)
class Entry:
    """What the directory says of a member; `header_bytes` is the offset of its local header."""

    name: str
    header_bytes: int
    size_bytes: int
    packed_bytes: int
    method: int
    flags: int
    crc: int


@dataclass(frozen=True)
class Directory:
    """All entries in the order of the file, and where the directory begins."""

    entries: tuple[Entry, ...]
    start_bytes: int


@dataclass(frozen=True)
class Member:
    """A file in the archive, stored as it is; `offset_bytes` is where its data begins."""

    name: str
    offset_bytes: int
    size_bytes: int
    crc: int


def read_directory(storage: Storage, stamp: FileVersion) -> Directory:
    """Reads the directory at the end of an archive.

    Raises:
      FormatError: there is none, it is damaged, or something follows it.
    """
    start, count, raw = _find_directory(storage, stamp)
    entries = sorted(_entries(raw, count, stamp.path), key=lambda entry: entry.header_bytes)
    return Directory(tuple(entries), start)


def find_members(storage: Storage, stamp: FileVersion, directory: Directory) -> dict[str, Member]:
    """Reads the header of every member and none of their data; members by name, in file order.

    Raises:
      FormatError: a member is damaged, compressed, encrypted or there twice, or bytes belong to
        none.
    """
    members: dict[str, Member] = {}
    position, start = 0, directory.start_bytes
    for entry in directory.entries:
        _check_stored(entry, stamp.path)
        if entry.name in members:
            raise _bad(stamp.path, "a member is in the archive twice", entry.name)
        if entry.header_bytes != position:
            gap = entry.header_bytes > position
            what = "bytes that belong to no member" if gap else "two members overlap"
            raise _bad(stamp.path, what, entry.name, position, entry.header_bytes)
        members[entry.name] = _check_local(storage, stamp, entry, start)
        position = _end(storage, stamp, entry, members[entry.name], start)
    if position != start:
        raise _bad(stamp.path, "bytes that belong to no member", None, position, start)
    return members


def read_member(storage: Storage, file: str, member: Member, max_bytes: int) -> bytes:
    """The data of a member.

    Raises:
      FormatError: it has more than `max_bytes`, or not the checksum that the directory has.
    """
    if member.size_bytes > max_bytes:
        raise _bad(file, "a member is too large", member.name, max_bytes, member.size_bytes)
    data = storage.read(file, member.offset_bytes, member.size_bytes)
    if (crc := zlib.crc32(data)) != member.crc:
        what = "a member is damaged: wrong checksum"
        raise _bad(file, what, member.name, f"{member.crc:#010x}", f"{crc:#010x}")
    return data


def _find_directory(storage: Storage, stamp: FileVersion) -> tuple[int, int, bytes]:
    """Where the directory starts, how many entries it has, and its bytes."""
    tail_bytes = min(stamp.size_bytes, _TAIL_BYTES)
    tail = storage.read(stamp.path, stamp.size_bytes - tail_bytes, tail_bytes)
    *disks, entries, count, size, start, comment = _unpack_end(tail, stamp.path)
    after = stamp.size_bytes - _END.size  # where the directory has to stop
    if tail[-_END.size - _LOCATOR.size :].startswith(b"PK\x06\x07"):
        after -= _LOCATOR.size + _END64.size
        short = (entries, count, size, start)
        entries, count, size, start = _zip64_end(tail, after, short, stamp.path)
    if any(disks) or comment or entries != count or start + size != after:
        raise _bad(stamp.path, "the end of the archive is damaged", None, after, start + size)
    if size > _MAX_DIRECTORY_BYTES:
        what = "the archive's directory is too large"
        raise _bad(stamp.path, what, None, _MAX_DIRECTORY_BYTES, size)
    return start, count, storage.read(stamp.path, start, size)


def _unpack_end(tail: bytes, file: str) -> tuple[int, ...]:
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
        raise _bad(file, "the archive is truncated, or bytes follow it", None, "a zip directory")
    return _END.unpack(end)[1:]


def _zip64_end(
    tail: bytes, offset_bytes: int, short: tuple[int, ...], file: str
) -> tuple[int, int, int, int]:
    """Entries here, entries, size and start of the directory; `short` has them in fewer bits."""
    damaged = _bad(file, "the end of the archive is damaged", None, "one zip64 directory")
    if len(tail) < _TAIL_BYTES or not tail.startswith(b"PK\x06\x06"):
        raise damaged
    _, disk, claimed, disks = _LOCATOR.unpack(tail[_END64.size : -_END.size])
    _, length, _, _, *on_disks, entries, count, size, start = _END64.unpack(tail[: _END64.size])
    if (claimed, disk, disks, length, *on_disks) != (offset_bytes, 0, 1, _END64.size - 12, 0, 0):
        raise damaged
    long = (entries, count, size, start)
    for one, other, full in zip(short, long, (_FULL16, _FULL16, _FULL32, _FULL32), strict=True):
        if one not in (other, full):
            raise _bad(file, "the archive has two directories", None, other, one)
    return long


def _entries(raw: bytes, count: int, file: str) -> Iterator[Entry]:
    position = 0
    for _ in range(count):
        head = raw[position : position + _DIRECTORY.size]
        if len(head) < _DIRECTORY.size or not head.startswith(b"PK\x01\x02"):
            raise _bad(file, "the archive's directory is damaged", None, f"{count} entries")
        fields = _DIRECTORY.unpack(head)
        name_start = position + _DIRECTORY.size
        extra_start = name_start + fields[10]
        comment_start = extra_start + fields[11]
        position = comment_start + fields[12]
        name = _decode(raw[name_start:extra_start], file)
        narrow = [fields[9], fields[8], fields[16]]
        size, packed, offset = _widened(raw[extra_start:comment_start], narrow, name, file)
        yield Entry(name, offset, size, packed, fields[4], fields[3], fields[7])
    if position != len(raw):
        raise _bad(file, "the archive's directory is damaged", None, len(raw), position)


def _widened(extra: bytes, narrow: list[int], name: str, file: str) -> list[int]:
    """Size, packed size and offset, each from the zip64 field where it does not fit 32 bits."""
    wide = _extra_field(extra, _ZIP64_EXTRA)
    numbers = iter([int.from_bytes(wide[i : i + 8], "little") for i in range(0, len(wide), 8)])
    if len(wide) != 8 * narrow.count(_FULL32):
        raise _bad(file, "the zip64 sizes of a member are damaged", name)
    return [next(numbers) if value == _FULL32 else value for value in narrow]


def _extra_field(extra: bytes, wanted: int) -> bytes:
    """The first field with this tag, empty if there is none: tag, length, content, and so on."""
    while len(extra) >= _TAG.size:
        tag, length = _TAG.unpack_from(extra)
        field, extra = extra[_TAG.size : _TAG.size + length], extra[_TAG.size + length :]
        if tag == wanted:
            return field
    return b""


def _check_stored(entry: Entry, file: str) -> None:
    if entry.flags & _ENCRYPTED:
        raise _bad(file, "a member is encrypted", entry.name)
    if entry.method or entry.size_bytes != entry.packed_bytes:
        expected = "stored, as torch.save writes it"
        raise _bad(file, "a member is compressed", entry.name, expected, f"method {entry.method}")
    if entry.flags & ~(_HAS_DESCRIPTOR | _UTF8):
        raise _bad(file, "a member has unknown flags", entry.name, None, f"{entry.flags:#x}")


def _check_local(storage: Storage, stamp: FileVersion, entry: Entry, start: int) -> Member:
    """The member, if its local header says what the directory says."""
    raw_name = entry.name.encode()
    head_bytes = _LOCAL.size + len(raw_name)
    if entry.header_bytes + head_bytes > start:
        raise _bad(stamp.path, "a member reaches into the directory", entry.name)
    head = storage.read(stamp.path, entry.header_bytes, head_bytes)
    magic, _, flags, method, _, _, *told, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
    later = flags & _HAS_DESCRIPTOR  # then the descriptor has what is 0 here
    known = [0, 0, 0] if later else [entry.crc, entry.size_bytes, entry.size_bytes]
    same = (magic, flags, method, name_bytes) == (b"PK\x03\x04", entry.flags, 0, len(raw_name))
    if not same or head[_LOCAL.size :] != raw_name or told != known:
        raise _bad(stamp.path, "a member's header and the directory differ", entry.name)
    offset = entry.header_bytes + head_bytes + extra_bytes
    return Member(entry.name, offset, entry.size_bytes, entry.crc)


def _end(storage: Storage, stamp: FileVersion, entry: Entry, member: Member, start: int) -> int:
    """Where the member ends: after its data, or after the descriptor that follows."""
    end = member.offset_bytes + member.size_bytes
    length = _DESCRIPTOR64.size if entry.flags & _HAS_DESCRIPTOR else 0
    if end + (length and _DESCRIPTOR.size) > start:
        raise _bad(stamp.path, "a member reaches into the directory", entry.name, start, end)
    if not length:
        return end
    raw = storage.read(stamp.path, end, length)  # the directory is longer than what it lacks
    for form in (_DESCRIPTOR, _DESCRIPTOR64):
        told = (b"PK\x07\x08", entry.crc, entry.size_bytes, entry.size_bytes)
        if form.unpack_from(raw) == told:
            return end + form.size
    raise _bad(stamp.path, "a member's descriptor and the directory differ", entry.name)


def _decode(raw: bytes, file: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _bad(file, "a member's name is not UTF-8", None, None, error) from error


def _bad(
    file: str, what: str, member: str | None = None, expected: object = None, found: object = None
) -> FormatError:
    return FormatError(what, file=file, key=member, expected=expected, found=found)
