"""Hand-made files of torch.save, sound and broken: a zip archive and a pickle, byte by byte."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A member of an archive; what differs from the truth is a damage."""

    name: str
    data: bytes
    flags: int = 0
    method: int = 0
    crc: int | None = None
    packed: int | None = None
    local_name: str | None = None
    local_size: int | None = None
    zip64: bool = False
    descriptor: bytes | None = None
    gap: bytes = b""  # before it
    at: int | None = None  # in the directory alone, pointing there

    @property
    def sum(self) -> int:
        return zlib.crc32(self.data) if self.crc is None else self.crc

    @property
    def sizes(self) -> tuple[int, int]:
        packed = len(self.data) if self.packed is None else self.packed
        return packed, len(self.data)


def archive(*parts: Part, between: bytes = b"", zip64: bool = False, **end: int | bytes) -> bytes:
    """The members one after another, then the directory; `end` overrides fields of its end."""
    members, directory = bytearray(), bytearray()
    for part in parts:
        members += part.gap
        directory += _entry(part, len(members) if part.at is None else part.at)
        members += member_bytes(part) if part.at is None else b""
    raw = bytes(members) + between
    fields = {"entries": len(parts), "size": len(directory), "start": len(raw)} | end
    start, size, entries = fields["start"], fields["size"], fields["entries"]
    after = len(raw) + len(directory)
    tail = b""
    if zip64:
        counts = (44, 0, 0, 0, 0, entries, entries, size, start)
        tail = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", *counts)
        tail += struct.pack("<4sLQL", b"PK\x06\x07", 0, fields.get("zip64_at", after), 1)
        start = fields.get("short_start", 0xFFFFFFFF)
    tail += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries, entries, size, start, 0)
    return raw + bytes(directory) + tail + fields.get("suffix", b"")


def member_bytes(part: Part) -> bytes:
    name = (part.local_name or part.name).encode()
    told = (part.sum, *part.sizes) if not part.flags & 8 else (0, 0, 0)
    if part.local_size is not None:
        told = (part.sum, part.local_size, part.local_size)
    head = (0, part.flags, part.method, 0, 0, *told, len(name), 3)
    raw = struct.pack("<4s5H3L2H", b"PK\x03\x04", *head) + name + b"pad" + part.data
    if part.flags & 8:
        form = "<4sL2Q" if part.zip64 else "<4s3L"
        raw += part.descriptor or struct.pack(form, b"PK\x07\x08", part.sum, *part.sizes)
    return raw


def _entry(part: Part, offset: int) -> bytes:
    name = part.name.encode()
    extra, numbers = b"", (*part.sizes, offset)
    if part.zip64:
        size, packed = part.sizes[1], part.sizes[0]
        extra = struct.pack("<HHB", 0x4246, 1, 0) + struct.pack(
            "<2H3Q", 1, 24, size, packed, offset
        )
        numbers = (0xFFFFFFFF,) * 3
    head = (0, 0, part.flags, part.method, 0, 0, part.sum, *numbers[:2])
    head = (*head, len(name), len(extra), 0, 0, 0, 0, numbers[2])
    return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *head) + name + extra


def torch_zip(pickle: bytes, storages: dict[str, bytes] | None = None, **options) -> bytes:
    """An archive of this pickle and these storages, by default one `data/0` of 16 bytes."""
    storages = {"0": bytes(16)} if storages is None else storages
    parts = [Part("m/data.pkl", pickle), Part("m/byteorder", b"little")]
    parts += [Part(f"m/data/{key}", data) for key, data in storages.items()]
    return archive(*parts, Part("m/version", b"3\n"), **options)


# Pickle opcodes; docs are in Python's module pickletools.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values) -> bytes:
    return tuple_of(*map(number, values))


HOOKS = name("collections", "OrderedDict") + b")R"
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
FALSE = b"\x89"


def storage(key="0", elements=4, kind="FloatStorage", tag="storage") -> bytes:
    items = text(tag), name("torch", kind), text(key), text("cpu"), number(elements)
    return tuple_of(*items) + b"Q"


def tensor(shape=(2, 2), strides=(2, 1), offset=0, *, where=None, hooks=HOOKS, more=b"") -> bytes:
    """A call of `_rebuild_tensor_v2`, by default on a storage of four float32 numbers."""
    where = storage() if where is None else where
    items = where, number(offset), numbers(shape), numbers(strides), FALSE, hooks, more
    return REBUILD + tuple_of(*items) + b"R"


def pickle_of(*items: bytes) -> bytes:
    """A pickle of a dict with these keys and values in turn."""
    return b"\x80\x02}(" + b"".join(items) + b"u."
