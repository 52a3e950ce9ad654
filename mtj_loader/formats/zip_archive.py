"""Reads the zip archives that torch.save writes: uncompressed members without gaps.

    local header, name, padding, data, descriptor   (for each member)
    directory   end of the zip64 directory   its locator   end of the directory

Stricter than zip: redundant fields must agree and every byte must belong to something, so that no
other reader can find a different archive in the same file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from struct import Struct

from mtj_loader.errors import FormatError
from mtj_loader.storage.base import FileVersion, Storage

_LOCAL = Struct("<4s5H3L2H")  # …, flags, method, …, crc, packed, size, name length, extra length
_DIRECTORY = Struct("<4s6H3L5H2L")  # the same, …, comment length, disk, …, offset
_END = Struct("<4s4H2LH")  # …, disks, …, entries, directory's size and offset, comment length
_END64 = Struct("<4sQ2H2L4Q")
_LOCATOR = Struct("<4sLQL")  # …, disk, offset of the zip64 end, disks
_TAIL_BYTES = _END64.size + _LOCATOR.size + _END.size
_DESCRIPTOR = Struct("<4sL2L")  # …, crc, packed, size: known only after the data
_DESCRIPTOR64 = Struct("<4sL2Q")
_TAG = Struct("<2H")  # of a field in `extra`: kind and length

_DAMAGED_END = "the end of the archive is damaged"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # mean: see the zip64 field
_ZIP64_EXTRA = 1
_ENCRYPTED, _HAS_DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800  # flags; torch sets the last two
_MAX_MEMBERS = 20_000  # one per tensor; each takes two short reads
_MAX_DIRECTORY_BYTES = 4 << 20  # 20,000 members take 2,000,000


@dataclass(frozen=True)
class Entry:
    """A member in the directory; `header_bytes` is the offset of its local header."""

    name: str
    header_bytes: int
    size_bytes: int
    packed_bytes: int
    method: int
    flags: int
    crc: int


@dataclass(frozen=True)
class Directory:
    """All entries in file order, and where the directory starts."""

    entries: tuple[Entry, ...]
    start_bytes: int


@dataclass(frozen=True)
class Member:
    """An uncompressed file in the archive; its data starts at `offset_bytes`."""

    name: str
    offset_bytes: int
    size_bytes: int
    crc: int


def read_directory(storage: Storage, version: FileVersion) -> Directory:
    """Reads the directory at the end of an archive.

    Raises:
      FormatError: the directory is missing or damaged, or bytes follow it.
    """
    start, count, raw = _find_directory(storage, version)
    entries = sorted(_entries(raw, count, version.path), key=lambda entry: entry.header_bytes)
    return Directory(tuple(entries), start)


def find_members(storage: Storage, version: FileVersion, directory: Directory) -> dict[str, Member]:
    """Reads the headers of all members, but not their data.

    Returns:
      The members by name, in file order.

    Raises:
      FormatError: a member is damaged, compressed, encrypted or duplicate, or bytes belong to no
        member.
    """
    members: dict[str, Member] = {}
    position, start = 0, directory.start_bytes
    for entry in directory.entries:
        _check_uncompressed(entry, version.path)
        if entry.name in members:
            raise _bad(version.path, "a member is in the archive twice", entry.name)
        if entry.header_bytes != position:
            gap = entry.header_bytes > position
            what = "bytes that belong to no member" if gap else "two members overlap"
            expected = f"a header at byte {position:,}"
            raise _bad(version.path, what, entry.name, expected, f"{entry.header_bytes:,}")
        members[entry.name] = _check_local(storage, version, entry, start)
        position = _end(storage, version, entry, members[entry.name], start)
    if position != start:
        what, expected = "bytes that belong to no member", f"the directory at byte {position:,}"
        raise _bad(version.path, what, None, expected, f"{start:,}")
    return members


def read_member(storage: Storage, file: str, member: Member, max_bytes: int) -> bytes:
    """The data of a member.

    Raises:
      FormatError: it has more than `max_bytes`, or a wrong checksum.
    """
    if member.size_bytes > max_bytes:
        expected, found = f"at most {max_bytes:,} bytes", f"{member.size_bytes:,} bytes"
        raise _bad(file, "a member is too large", member.name, expected, found)
    data = storage.read(file, member.offset_bytes, member.size_bytes)
    _check_sum(file, member, zlib.crc32(data))
    return data


def check_sums(storage: Storage, file: str, members: Iterable[Member]) -> None:
    """Reads all data of all members, to compare it with their checksums.

    Raises:
      FormatError: a member is damaged.
    """
    step = storage.costs.range_bytes
    for member in members:
        crc, end = 0, member.offset_bytes + member.size_bytes
        for start in range(member.offset_bytes, end, step):
            chunk = storage.read(file, start, min(step, end - start))
            crc = zlib.crc32(chunk, crc)
        _check_sum(file, member, crc)


def _check_sum(file: str, member: Member, crc: int) -> None:
    if crc != member.crc:
        what = "a member is damaged: wrong checksum"
        raise _bad(file, what, member.name, f"{member.crc:#010x}", f"{crc:#010x}")


def _find_directory(storage: Storage, version: FileVersion) -> tuple[int, int, bytes]:
    """The start of the directory, its number of entries, and its bytes."""
    tail_bytes = min(version.size_bytes, _TAIL_BYTES)
    tail = storage.read(version.path, version.size_bytes - tail_bytes, tail_bytes)
    *disks, entries, count, size, start, comment = _unpack_end(tail, version.path)
    after = version.size_bytes - _END.size  # where the directory must end
    if tail[-_END.size - _LOCATOR.size :].startswith(b"PK\x06\x07"):
        after -= _LOCATOR.size + _END64.size
        short = (entries, count, size, start)
        entries, count, size, start = _zip64_end(tail, after, short, version.path)
    if any(disks) or entries != count:
        raise _bad(version.path, _DAMAGED_END, None, "an archive in one part", "several")
    if comment:
        raise _bad(version.path, _DAMAGED_END, None, "no comment", f"one of {comment:,} bytes")
    if start + size != after:
        expected = f"a directory that ends at byte {after:,}"
        raise _bad(version.path, _DAMAGED_END, None, expected, f"{start + size:,}")
    _check_directory_size(count, size, version.path)
    return start, count, storage.read(version.path, start, size)


def _check_directory_size(count: int, size_bytes: int, file: str) -> None:
    if count > _MAX_MEMBERS:
        expected, found = f"at most {_MAX_MEMBERS:,}", f"{count:,}"
        raise _bad(file, "the archive has too many members", None, expected, found)
    if size_bytes > _MAX_DIRECTORY_BYTES:
        expected, found = f"at most {_MAX_DIRECTORY_BYTES:,} bytes", f"{size_bytes:,} bytes"
        raise _bad(file, "the archive's directory is too large", None, expected, found)


def _unpack_end(tail: bytes, file: str) -> tuple[int, ...]:
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
        raise _bad(file, "the archive is truncated, or bytes follow it", None, "a zip directory")
    return _END.unpack(end)[1:]


def _zip64_end(
    tail: bytes, offset_bytes: int, short: tuple[int, ...], file: str
) -> tuple[int, int, int, int]:
    """Entries on this disk, all entries, size and start; `short` has the same in fewer bits."""
    damaged = _bad(file, _DAMAGED_END, None, "one zip64 directory")
    if len(tail) < _TAIL_BYTES or not tail.startswith(b"PK\x06\x06"):
        raise damaged
    _, disk, claimed, disks = _LOCATOR.unpack(tail[_END64.size : -_END.size])
    _, length, _, _, *on_disks, entries, count, size, start = _END64.unpack(tail[: _END64.size])
    if (claimed, disk, disks, length, *on_disks) != (offset_bytes, 0, 1, _END64.size - 12, 0, 0):
        raise damaged
    long = (entries, count, size, start)
    for one, other, full in zip(short, long, (_FULL16, _FULL16, _FULL32, _FULL32), strict=True):
        if one not in (other, full):
            raise _bad(file, "the archive has two directories", None, f"{other:,}", f"{one:,}")
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
        size, packed, offset = _widen(raw[extra_start:comment_start], narrow, name, file)
        yield Entry(name, offset, size, packed, fields[4], fields[3], fields[7])
    if position != len(raw):
        expected, found = f"{position:,} bytes, from its entries", f"{len(raw):,} bytes"
        raise _bad(file, "the archive's directory is damaged", None, expected, found)


def _widen(extra: bytes, narrow: list[int], name: str, file: str) -> list[int]:
    """Size, packed size and offset, from the zip64 field if they do not fit in 32 bits."""
    wide = _extra_field(extra, _ZIP64_EXTRA)
    numbers = iter([int.from_bytes(wide[i : i + 8], "little") for i in range(0, len(wide), 8)])
    if len(wide) != 8 * narrow.count(_FULL32):
        raise _bad(file, "the zip64 sizes of a member are damaged", name)
    return [next(numbers) if value == _FULL32 else value for value in narrow]


def _extra_field(extra: bytes, wanted: int) -> bytes:
    """The content of the first field with this tag, empty if there is none."""
    while len(extra) >= _TAG.size:
        tag, length = _TAG.unpack_from(extra)
        field, extra = extra[_TAG.size : _TAG.size + length], extra[_TAG.size + length :]
        if tag == wanted:
            return field
    return b""


def _check_uncompressed(entry: Entry, file: str) -> None:
    if entry.flags & _ENCRYPTED:
        raise _bad(file, "a member is encrypted", entry.name)
    if entry.method or entry.size_bytes != entry.packed_bytes:
        expected = "uncompressed, as written by torch.save"
        raise _bad(file, "a member is compressed", entry.name, expected, f"method {entry.method}")
    if entry.flags & ~(_HAS_DESCRIPTOR | _UTF8):
        raise _bad(file, "a member has unknown flags", entry.name, None, f"{entry.flags:#x}")


def _check_local(storage: Storage, version: FileVersion, entry: Entry, start: int) -> Member:
    """The member, after a check that its local header agrees with the directory."""
    raw_name = entry.name.encode()
    head_bytes = _LOCAL.size + len(raw_name)
    if entry.header_bytes + head_bytes > start:
        raise _bad(version.path, "a member overlaps the directory", entry.name)
    head = storage.read(version.path, entry.header_bytes, head_bytes)
    magic, _, flags, method, _, _, *sizes, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
    is_later = flags & _HAS_DESCRIPTOR  # then these are 0 here, and in the descriptor
    expected = [0, 0, 0] if is_later else [entry.crc, entry.size_bytes, entry.size_bytes]
    same = (magic, flags, method, name_bytes) == (b"PK\x03\x04", entry.flags, 0, len(raw_name))
    if not same or head[_LOCAL.size :] != raw_name or sizes != expected:
        raise _bad(version.path, "a member's header and the directory differ", entry.name)
    offset = entry.header_bytes + head_bytes + extra_bytes
    return Member(entry.name, offset, entry.size_bytes, entry.crc)


def _end(storage: Storage, version: FileVersion, entry: Entry, member: Member, start: int) -> int:
    """Where the member ends: after its data, or after its descriptor."""
    end = member.offset_bytes + member.size_bytes
    length = _DESCRIPTOR64.size if entry.flags & _HAS_DESCRIPTOR else 0
    if end + (length and _DESCRIPTOR.size) > start:
        expected, found = f"an end before byte {start:,}", f"{end:,}"
        raise _bad(version.path, "a member overlaps the directory", entry.name, expected, found)
    if not length:
        return end
    raw = storage.read(version.path, end, length)  # may extend into the directory
    for form in (_DESCRIPTOR, _DESCRIPTOR64):
        expected = (b"PK\x07\x08", entry.crc, entry.size_bytes, entry.size_bytes)
        if form.unpack_from(raw) == expected:
            return end + form.size
    raise _bad(version.path, "a member's descriptor and the directory differ", entry.name)


def _decode(raw: bytes, file: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _bad(file, "a member's name is not UTF-8", None, None, error) from error


def _bad(
    file: str, what: str, member: str | None = None, expected: object = None, found: object = None
) -> FormatError:
    return FormatError(what, file=file, key=member, expected=expected, found=found)
