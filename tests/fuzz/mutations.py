"""Random changes of JSON documents, of bytes, and of pickles."""

from __future__ import annotations

import copy
import json
import pickletools
from random import Random
from typing import Any

# Values that readers tend to get wrong, as JSON text.
_VALUES = (
    "null", "true", "false", "0", "-1", "1", "2", "3", "0.0", "-0.0", "0.5", "1e400", "-1e400",
    "1e308", "1e-320", "NaN", "Infinity", "2147483648", "9223372036854775808", "1" * 400, "1.0",
    '""', '"true"', '"1"', '"\\u001b[31m\\nerror: forged"', '"\\ud800"', '"../../etc/passwd"',
    '"\\u0000"', json.dumps("x" * 10_000), "[]", "{}", "[[]]", "[null]", '[""]', "[1, 2, 3]",
    '{"": {}}', '{"a": [1]}', "[" * 2_000 + "]" * 2_000, json.dumps([7] * 10_000),
)  # fmt: skip


class RawJson:
    """A placeholder in a document for text that `json.dumps` would not write."""

    def __init__(self, text: str) -> None:
        self.text = text


def mutate_json(document: Any, random: Random) -> bytes:
    """Changes one to three places of a document; returns it as text."""
    document = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if places:
            _change(*random.choice(places), random)
    return _dump(document).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, inner in items:
            found.append((container, key))
            if isinstance(inner, dict | list):
                waiting.append(inner)
    return found


def _change(container: Any, key: Any, random: Random) -> None:
    match random.randrange(6):
        case 0:
            del container[key]
        case 1:
            container[key] = container[random.choice(list(_keys(container)))]
        case 2 if isinstance(container, dict):
            container[_misspell(key, random)] = container[key]
        case 3:
            container[key] = _nudge(container[key], random)
        case _:
            container[key] = RawJson(random.choice(_VALUES))


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def _misspell(key: str, random: Random) -> str:
    at = random.randrange(len(key) + 1)
    return key[:at] + random.choice(["x", "_", "A", "\u202e", "."]) + key[at:]


def _nudge(value: Any, random: Random) -> Any:
    """A value of the same type, close to this one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return random.choice([value + 1, value - 1, value * 2, -value, value / 2])
        case str():
            return random.choice([value[1:], value + "x", value.upper(), value * 2])
        case list():
            return random.choice([value * 2, value[1:], value[::-1]])
        case _:
            return [value]


def _dump(value: Any) -> str:
    match value:
        case RawJson():
            return value.text
        case dict():
            return "{" + ", ".join(f"{json.dumps(k)}: {_dump(v)}" for k, v in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_dump, value)) + "]"
        case _:
            return json.dumps(value)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flips, drops, repeats, inserts or cuts off bytes in one to three places."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        at = random.randrange(len(changed) + 1)
        size = random.choice((1, 1, 2, 4, 8, 64))
        match random.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = changed[at : at + size]
            case 3:
                changed[at:at] = random.randbytes(size)
            case 4:
                changed[at : at + size] = random.choice([b"\xff", b"\x00"]) * size
            case _ if random.random() < 0.2:
                del changed[at:]
    return bytes(changed)


def mutate_pickle(data: bytes, random: Random) -> bytes:
    """Drops, repeats, moves or swaps instructions of a pickle, or changes its bytes."""
    if random.random() < 0.3:
        return mutate_bytes(data, random)
    starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 3))):
        a, b = random.randrange(len(parts)), random.randrange(len(parts))
        match random.randrange(5):
            case 0 if len(parts) > 1:
                del parts[a]
            case 1:
                parts.insert(a, parts[b])
            case 2:
                parts[a], parts[b] = parts[b], parts[a]
            case 3:
                parts[a] = mutate_bytes(parts[a], random)
            case _:
                parts[a:a] = [parts[b]] * random.choice((10, 1_000))
    return b"".join(parts)
