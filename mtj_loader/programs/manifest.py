"""`programs.json`: what a folder of compiled programs contains, and what the programs depend on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mtj_loader.errors import FormatError, ProgramError
from mtj_loader.formats.strict_json import parse_object
from mtj_loader.formats.typed_reader import TypedReader
from mtj_loader.programs.facts import ProgramFacts

MANIFEST = "programs.json"
# A model of 100 layers has about 1,000 parameters, each 200 bytes in each of some 20 programs.
MAX_MANIFEST_BYTES = 32 << 20
MAX_PROGRAM_BYTES = 2 << 30

_FORMAT, _VERSION = "mtj_loader compiled programs", 1
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Row = Mapping[str, object]  # an `ArraySpec` as JSON types


class _ManifestReader(TypedReader):
    error_class = ProgramError


@dataclass(frozen=True)
class ProgramRecord:
    """One program.

    Attributes:
      sha256: of its file, in hexadecimal.
      size_bytes: of its file.
      arguments: a row for each argument, as `Signature.argument_rows` makes them.
      results: the same for the results.
      used: the positions of the arguments that the executable has, ascending.
    """

    sha256: str
    size_bytes: int
    arguments: tuple[Row, ...]
    results: tuple[Row, ...]
    used: tuple[int, ...]

    def to_dict(self) -> dict[str, object]:
        """The record as JSON types."""
        return {
            "sha256": self.sha256,
            "bytes": self.size_bytes,
            "arguments": list(self.arguments),
            "results": list(self.results),
            "used": list(self.used),
        }


def check_name(name: str) -> None:
    """Raises ProgramError for a name with other characters than letters, digits, `_` and `-`."""
    if not _NAME.fullmatch(name):
        expected = "1 to 64 letters, digits, `_` or `-`"
        raise ProgramError("bad name of a program", expected=expected, found=ascii(name))


def format_manifest(records: Mapping[str, ProgramRecord], facts: ProgramFacts) -> bytes:
    """The manifest as JSON."""
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "facts": facts.to_dict(),
        "programs": {name: record.to_dict() for name, record in records.items()},
    }
    return json.dumps(manifest).encode()


def parse_manifest(data: bytes, file: str) -> tuple[dict[str, ProgramRecord], ProgramFacts]:
    """Reads a manifest.

    Raises:
      ProgramError: it is not one, or of another version.
    """
    try:
        values = parse_object(data, file=file, max_bytes=MAX_MANIFEST_BYTES)
    except FormatError as error:
        what = f"the manifest is damaged: {error.what}"
        raise ProgramError(what, file=file, key=error.key, found=error.found) from error
    reader = _ManifestReader(values, file)
    reader.choice("format", [_FORMAT])
    reader.integer("version", low=_VERSION, high=_VERSION)
    facts = _read_facts(reader.section("facts", required=True))
    programs = reader.section("programs", required=True)
    reader.refuse_rest()
    records = {}
    for name in programs.all_keys:
        check_name(name)
        records[name] = _read_record(programs.section(name))
    return records, facts


def _read_facts(reader: _ManifestReader) -> ProgramFacts:
    def read(key: str) -> dict[str, str]:
        values = reader.raw(key)
        if isinstance(values, dict) and all(isinstance(value, str) for value in values.values()):
            return values
        raise reader.error("not a legal value", key, "an object of strings")

    facts = ProgramFacts(read("model"), read("versions"), read("platform"), read("settings"))
    reader.refuse_rest()
    return facts


def _read_record(reader: _ManifestReader) -> ProgramRecord:
    arguments = _read_rows(reader, "arguments")
    record = ProgramRecord(
        sha256=_read_digest(reader),
        size_bytes=reader.integer("bytes", high=MAX_PROGRAM_BYTES),
        arguments=arguments,
        results=_read_rows(reader, "results"),
        used=_read_positions(reader, "used", len(arguments)),
    )
    reader.refuse_rest()
    return record


def _read_digest(reader: _ManifestReader) -> str:
    digest = reader.text("sha256")
    if not _SHA256.fullmatch(digest):
        raise reader.error("not a legal value", "sha256", "64 hexadecimal digits")
    return digest


def _read_rows(reader: _ManifestReader, key: str) -> tuple[Row, ...]:
    """The rows, unchecked: they are only compared with the caller's."""
    rows: list[Any] = reader.items(key)
    if not all(isinstance(row, dict) for row in rows):
        raise reader.error("not a legal value", key, "a list of objects")
    return tuple(rows)


def _read_positions(reader: _ManifestReader, key: str, count: int) -> tuple[int, ...]:
    positions: list[Any] = reader.items(key)
    if not (all(type(i) is int for i in positions) and _is_ascending(positions, count)):
        raise reader.error("not a legal value", key, f"ascending positions below {count}")
    return tuple(positions)


def _is_ascending(positions: Iterable[int], count: int) -> bool:
    last = -1
    for position in positions:
        if not last < position < count:
            return False
        last = position
    return True
