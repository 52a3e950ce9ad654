"""A reader of the pickles that torch.save writes: a small machine that knows a few opcodes.

It makes strings, numbers, tuples, dicts and references to tensors, and can make nothing else. The
opcodes are described in Python's own module pickletools; those that torch does not write for a dict
of tensors are refused, and so is whatever would need another way of reading.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NoReturn

from mtj_loader.errors import FormatError
from mtj_loader.formats.torch_objects import (
    OrderedMapping,
    RefusedError,
    call,
    find_global,
    find_storage,
    kind,
)

_PROTOCOL = 2  # torch.save's own, unless it is told another
_MAX_STACK = 10_000  # pickles write dicts in batches of 1,000 items
_MAX_TUPLE = 64  # a shape's rank; arguments are fewer
_MAX_NAME = 200  # characters of a global
_MAX_LONG_BYTES = 9  # more than 64 bits count nothing that exists


def read_pickle(data: bytes, *, file: str) -> object:
    """Runs a pickle to its end and returns what it leaves.

    Raises:
      FormatError: an opcode, a name or a value that is not allowed, or a damaged pickle; always
        with the byte at which it was noticed.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except RefusedError as error:
        raise FormatError(
            error.what,
            file=file,
            key=f"byte {machine.at:,} of data.pkl ({machine.opcode})",
            expected=error.expected,
            found=error.found,
        ) from None


class _Machine:
    """A pickle, its stack and its memo; `at` is where the running opcode stands."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position, self.at = data, 0, 0
        self.opcode = "the first opcode"
        self.stack: list[object] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        if not self.data.startswith(bytes([0x80, _PROTOCOL])):
            found = self.data[:2].hex(" ") or "nothing"
            _refuse("not a pickle as torch writes it", f"protocol {_PROTOCOL}", found)
        self.position = 2
        while True:
            self.at = self.position
            code = self.take(1)
            if code == b".":
                return self.stop()
            if code not in _OPCODES:
                self.opcode = f"opcode {code.hex()}"
                _refuse("the pickle has an opcode that is not allowed", None, _named(code))
            self.opcode, step = _OPCODES[code]
            step(self)
            if len(self.stack) > _MAX_STACK:
                _refuse("the pickle's stack is too high", f"at most {_MAX_STACK:,}")

    def stop(self) -> object:
        self.opcode = "STOP"
        result = self.pop()
        if self.stack or self.marks:
            _refuse("the pickle leaves things behind", "an empty stack", f"{len(self.stack)} more")
        if (rest := len(self.data) - self.position) > 0:
            _refuse("bytes after the end of the pickle", "none", f"{rest:,} bytes")
        return result

    def take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            _refuse("the pickle is truncated", f"{count:,} bytes", f"{len(taken):,} bytes")
        self.position += count
        return taken

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            _refuse("the pickle takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[object]:
        if not self.marks:
            _refuse("the pickle has no mark to go back to")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def mark(self) -> None:
        self.marks.append(len(self.stack))
        if len(self.marks) > _MAX_TUPLE:
            _refuse("the pickle's marks are nested too deep", f"at most {_MAX_TUPLE}")

    def text(self) -> None:
        raw = self.take(self.number("<I"))
        try:
            self.push(raw.decode())
        except UnicodeDecodeError as error:
            _refuse("a text in the pickle is not UTF-8", None, error)

    def long(self) -> None:
        length = self.number("<B")
        if length > _MAX_LONG_BYTES:
            _refuse(
                "a number in the pickle is too long", f"at most {_MAX_LONG_BYTES} bytes", length
            )
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def put(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def get(self, index: int) -> None:
        if index not in self.memo:
            _refuse("the pickle's memo has no such entry", None, f"number {index}")
        self.push(self.memo[index])

    def find(self) -> None:
        module, name = self.line(), self.line()
        self.push(find_global(f"{module} {name}"))

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME)
        if end < 0:
            _refuse("a name in the pickle does not end", f"at most {_MAX_NAME} bytes")
        raw = self.take(end - self.position)
        self.position = end + 1
        return raw.decode("ascii", "backslashreplace")

    def make_tuple(self, items: list[object]) -> None:
        """Tuples hold no tuples that hold tuples: shapes inside arguments are the deepest."""
        nested = (item for value in items if type(value) is tuple for item in value)
        if len(items) > _MAX_TUPLE or any(type(item) is tuple for item in nested):
            _refuse("a tuple in the pickle is too long or too deep", f"at most {_MAX_TUPLE} items")
        self.push(tuple(items))

    def reduce(self) -> None:
        arguments = self.pop()
        self.push(call(self.pop(), arguments))

    def build(self) -> None:
        """A state dict's `_metadata`, versions of torch's modules, says nothing of tensors."""
        state, target = self.pop(), self.pop()
        self.push(target)
        if not isinstance(target, OrderedMapping) or not isinstance(state, dict):
            _refuse("the pickle gives attributes to something else than a state dict")
        if other := sorted(state.keys() - {"_metadata"}):
            _refuse("the pickle gives a dict unknown attributes", "_metadata", kind(other[0]))

    def set_items(self, items: list[object]) -> None:
        target = self.pop()
        self.push(target)
        if not isinstance(target, dict) or len(items) % 2:
            _refuse("the pickle sets items of something else than a dict", "a dict", kind(target))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                what = "a key of a dict is not a string, or is there twice"
                _refuse(what, "each string once", kind(key))
            target[key] = value


def _refuse(what: str, expected: object = None, found: object = None) -> NoReturn:
    raise RefusedError(what, expected, found)


def _last(machine: _Machine, count: int) -> list[object]:
    return [machine.pop() for _ in range(count)][::-1]


_OPCODES: dict[bytes, tuple[str, Callable[[_Machine], None]]] = {
    b"(": ("MARK", _Machine.mark),
    b"N": ("NONE", lambda m: m.push(None)),
    b"\x88": ("NEWTRUE", lambda m: m.push(True)),
    b"\x89": ("NEWFALSE", lambda m: m.push(False)),
    b"J": ("BININT", lambda m: m.push(m.number("<i"))),
    b"K": ("BININT1", lambda m: m.push(m.number("<B"))),
    b"M": ("BININT2", lambda m: m.push(m.number("<H"))),
    b"\x8a": ("LONG1", _Machine.long),
    b"X": ("BINUNICODE", _Machine.text),
    b"q": ("BINPUT", lambda m: m.put(m.number("<B"))),
    b"r": ("LONG_BINPUT", lambda m: m.put(m.number("<I"))),
    b"h": ("BINGET", lambda m: m.get(m.number("<B"))),
    b"j": ("LONG_BINGET", lambda m: m.get(m.number("<I"))),
    b"c": ("GLOBAL", _Machine.find),
    b"Q": ("BINPERSID", lambda m: m.push(find_storage(m.pop()))),
    b")": ("EMPTY_TUPLE", lambda m: m.make_tuple([])),
    b"\x85": ("TUPLE1", lambda m: m.make_tuple(_last(m, 1))),
    b"\x86": ("TUPLE2", lambda m: m.make_tuple(_last(m, 2))),
    b"\x87": ("TUPLE3", lambda m: m.make_tuple(_last(m, 3))),
    b"t": ("TUPLE", lambda m: m.make_tuple(m.pop_to_mark())),
    b"}": ("EMPTY_DICT", lambda m: m.push({})),
    b"s": ("SETITEM", lambda m: m.set_items(_last(m, 2))),
    b"u": ("SETITEMS", lambda m: m.set_items(m.pop_to_mark())),
    b"R": ("REDUCE", _Machine.reduce),
    b"b": ("BUILD", _Machine.build),
}

# Names for the message only: what attacks and other writers use.
_OTHERS = {
    b"i": "INST", b"o": "OBJ", b"P": "PERSID", b"]": "EMPTY_LIST", b"l": "LIST", b"a": "APPEND",
    b"e": "APPENDS", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x93": "STACK_GLOBAL",
    b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"\x95": "FRAME", b"G": "BINFLOAT",
    b"0": "POP", b"2": "DUP", b"I": "INT", b"L": "LONG", b"\x8b": "LONG4", b"S": "STRING",
    b"U": "SHORT_BINSTRING", b"\x80": "PROTO",
}  # fmt: skip


def _named(code: bytes) -> str:
    return _OTHERS.get(code, f"byte {code.hex()}")
