"""A strict, bounded JSON parser for untrusted input; follows RFC 8259 to the letter.

Python's own parser is too lenient: it silently keeps the last of two equal keys, turns `NaN` and
`1e999` into numbers, and spends quadratic time on a long integer.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from reprlib import repr as brief

from mtj_loader.errors import FormatError
from mtj_loader.storage.base import Storage, prepare_file

MAX_DEPTH = 64  # headers, maps and configs nest less than ten levels; the parser recurses
MAX_DIGITS = 1_000  # real files have up to 31 (an "infinite" length); int() is quadratic

_SHOWN = 60  # characters of untrusted text that an error quotes

_STEP = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}
_NOT_BRACKETS = bytes(set(range(256)) - set(_STEP))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class _Fault:
    """A violation that Python's parser accepts; `holder` locates it in the parsed tree."""

    what: str
    found: str
    holder: object  # compared by identity
    key: str | None = None  # the key of the holder that is wrong, if any


def parse(data: bytes | str, *, file: str, max_bytes: int | None = None) -> object:
    """Parses one JSON document.

    Args:
      data: UTF-8 without a byte order mark; only white space may follow the document.
      file: the name for error messages.
      max_bytes: upper bound of the size; None if the caller has checked it.

    Returns:
      dicts, lists, strings, ints, finite floats, bools, None. `-0` is a float, as in other parsers.

    Raises:
      FormatError: not JSON; a duplicate key; NaN or infinity; half a surrogate pair; nested deeper
        than `MAX_DEPTH`; an integer of more than `MAX_DIGITS` digits.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    text = _decode(raw, file, max_bytes)
    _check_depth(raw, file)
    faults: list[_Fault] = []
    value = _decode_value(text, file, faults)
    if faults:
        raise _fault_error(faults[0], value, file)
    if _SURROGATE.search(text):
        _check_surrogates(value, file)
    return value


def parse_object(
    data: bytes | str, *, file: str, max_bytes: int | None = None
) -> dict[str, object]:
    """Like `parse`, for a document that must be an object.

    Raises:
      FormatError: as `parse`, or the document is not an object.
    """
    value = parse(data, file=file, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", file=file, expected="{ … }", found=brief(value))
    return value


def read_object(storage: Storage, path: str, max_bytes: int) -> dict[str, object]:
    """Reads a JSON file whose document is an object, see `parse`.

    Raises:
      FormatError: the file has more than `max_bytes`, or is not such a document.
    """
    # One byte more than the maximum is enough for `parse` to reject the file.
    length_bytes = min(prepare_file(storage, path).size_bytes, max_bytes + 1)
    return parse_object(storage.read(path, 0, length_bytes), file=path, max_bytes=max_bytes)


def _decode(raw: bytes, file: str, max_bytes: int | None) -> str:
    if max_bytes is not None and len(raw) > max_bytes:
        raise FormatError(
            "the file is too large",
            file=file,
            expected=f"at most {max_bytes:,} bytes",
            found=f"{len(raw):,} bytes",
        )
    if raw.startswith(b"\xef\xbb\xbf"):
        raise FormatError("JSON starts with a byte order mark", file=file, expected="plain UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"{brief(error.object[error.start : error.end])} at byte {error.start}"
        raise FormatError("not UTF-8", file=file, found=found) from error


def _check_depth(raw: bytes, file: str) -> None:
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside_strings = b"".join(unescaped.split(b'"')[::2])
    brackets = outside_strings.translate(None, delete=_NOT_BRACKETS)
    depths = itertools.accumulate(map(_STEP.__getitem__, brackets))
    if max(depths, default=0) > MAX_DEPTH:
        raise FormatError(
            "JSON is nested too deeply", file=file, expected=f"at most {MAX_DEPTH} levels"
        )


def _decode_value(text: str, file: str, faults: list[_Fault]) -> object:
    def make_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            faults.append(_duplicate_key(pairs, result))
        return result

    def make_integer(digits: str) -> int | float:
        if len(digits) > MAX_DIGITS:
            return reject("an integer is too long", f"{len(digits):,} digits")
        return int(digits) if digits != "-0" else -0.0

    def make_float(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else make_constant(digits)

    def make_constant(name: str) -> float:
        return reject("not a finite number", name[:_SHOWN])

    def reject(what: str, found: str) -> float:
        placeholder = float("nan")  # a new object each time, which marks the place
        faults.append(_Fault(what, found, placeholder))
        return placeholder

    decoder = json.JSONDecoder(
        object_pairs_hook=make_object,
        parse_int=make_integer,
        parse_float=make_float,
        parse_constant=make_constant,
    )
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno} (character {error.pos})"
        near = brief(text[error.pos : error.pos + 20])
        found = f"{error.msg}: {where}, near {near}"
        raise FormatError("not valid JSON", file=file, found=found) from error


def _duplicate_key(pairs: list[tuple[str, object]], result: dict[str, object]) -> _Fault:
    seen: set[str] = set()
    key = next(key for key, _ in pairs if key in seen or seen.add(key))
    count = sum(other == key for other, _ in pairs)
    return _Fault("duplicate key", f"{count} times", result, key)


def _fault_error(fault: _Fault, root: object, file: str) -> FormatError:
    path = next((path for path, value in _walk(root) if value is fault.holder), None)
    if path is not None and fault.key is not None:
        path = _child(path, fault.key)
    return FormatError(fault.what, file=file, key=path or None, found=fault.found)


def _walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """This value and all values in it, each with its path, such as `rope_scaling.factors[3]`."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, _child(path, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _walk(item, f"{path}[{position}]")


def _child(path: str, key: str) -> str:
    step = key if key.isprintable() and len(key) <= _SHOWN else brief(key)
    return f"{path}.{step}" if path else step


def _check_surrogates(value: object, file: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        found = ascii(error.object[error.start])
        raise FormatError("half a surrogate pair in a string", file=file, found=found) from error
