"""A restricted reader for the pickles that torch.save writes.

It supports the few opcodes that torch uses for a dict of tensors, and rejects all others. It
creates only strings, numbers, tuples, dicts and references to tensors. Python's module pickletools
describes the opcodes.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import NoReturn

from mtj_loader.errors import FormatError
from mtj_loader.formats.records import MAX_RANK
from mtj_loader.formats.torch_objects import (
    OrderedMapping,
    RejectedError,
    call,
    describe_value,
    find_global,
    find_storage,
)

_U8, _U16, _U32, _I32 = Struct("<B"), Struct("<H"), Struct("<I"), Struct("<i")
_PROTOCOL = 2  # the default of torch.save
_MAX_WORK = 700_000  # opcodes, and items of tuples in tuples; 18,000 tensors take 650,000
_MAX_MEMO = 200_000  # entries; 18,000 tensors take 144,000
_MAX_STACK = 10_000  # pickle writes dicts in batches of 1,000 items
_MAX_TUPLE = MAX_RANK  # shapes are the longest tuples
_MAX_NAME = 200  # characters of a global
_MAX_LONG_BYTES = 9  # 64 bits and a sign


def read_pickle(data: bytes, *, file: str) -> object:
    """Runs a pickle and returns its result.

    Raises:
      FormatError: an opcode, a name or a value is not allowed, or the pickle is damaged; names the
        byte where this was found.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except RejectedError as error:
        raise FormatError(
            error.what,
            file=file,
            key=f"byte {machine.at:,} of data.pkl ({machine.opcode})",
            expected=error.expected,
            found=error.found,
        ) from None


class _Machine:
    """A pickle, its stack and its memo; `at` is the position of the current opcode."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position, self.at = data, 0, 0
        self.opcode = "the first opcode"
        self.stack: list[object] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, object] = {}
        self.work = 0

    def run(self) -> object:
        if not self.data.startswith(bytes([0x80, _PROTOCOL])):
            found = self.data[:2].hex(" ") or "nothing"
            _reject("not a pickle written by torch.save", f"protocol {_PROTOCOL}", found)
        self.position = 2
        while True:
            self.work += 1
            self.at = self.position
            code = self.take(1)
            if code == b".":
                return self.stop()
            if code not in _OPCODES:
                self.opcode = f"opcode {code.hex()}"
                _reject("the pickle has an opcode that is not allowed", None, _name_opcode(code))
            self.opcode, step = _OPCODES[code]
            step(self)
            if len(self.stack) > _MAX_STACK:
                _reject("the pickle's stack is too high", f"at most {_MAX_STACK:,}")
            if self.work > _MAX_WORK:
                expected = f"at most {_MAX_WORK:,} opcodes; safetensors has no such limit"
                _reject("the pickle is too long", expected)

    def stop(self) -> object:
        self.opcode = "STOP"
        result = self.pop()
        if self.stack or self.marks:
            what = "the pickle ends with a nonempty stack"
            _reject(what, "an empty stack", f"{len(self.stack)} more")
        if (rest := len(self.data) - self.position) > 0:
            _reject("bytes after the end of the pickle", "none", f"{rest:,} bytes")
        return result

    def take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            _reject("the pickle is truncated", f"{count:,} bytes", f"{len(taken):,} bytes")
        self.position += count
        return taken

    def number(self, form: Struct) -> int:
        return form.unpack(self.take(form.size))[0]

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            _reject("the pickle pops from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[object]:
        if not self.marks:
            _reject("the pickle pops to a missing mark")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def mark(self) -> None:
        self.marks.append(len(self.stack))
        if len(self.marks) > _MAX_TUPLE:
            _reject("the pickle's marks are nested too deeply", f"at most {_MAX_TUPLE}")

    def text(self) -> None:
        raw = self.take(self.number(_U32))
        try:
            self.push(raw.decode())
        except UnicodeDecodeError as error:
            _reject("a string in the pickle is not UTF-8", None, error)

    def long(self) -> None:
        length = self.number(_U8)
        if length > _MAX_LONG_BYTES:
            what = "a number in the pickle is too long"
            _reject(what, f"at most {_MAX_LONG_BYTES} bytes", length)
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def put(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value
        if len(self.memo) > _MAX_MEMO:
            _reject("the pickle's memo is too large", f"at most {_MAX_MEMO:,}")

    def get(self, index: int) -> None:
        if index not in self.memo:
            _reject("the pickle's memo has no such entry", None, f"number {index}")
        self.push(self.memo[index])

    def find(self) -> None:
        module, name = self.line(), self.line()
        self.push(find_global(f"{module} {name}"))

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME)
        if end < 0:
            _reject("a name in the pickle is too long", f"at most {_MAX_NAME} bytes")
        raw = self.take(end - self.position)
        self.position = end + 1
        return raw.decode("ascii", "backslashreplace")

    def make_tuple(self, items: list[object]) -> None:
        """Rejects more than two levels of tuples: the deepest are shapes inside of arguments."""
        nested = [item for value in items if type(value) is tuple for item in value]
        self.work += len(nested)
        if len(items) > _MAX_TUPLE or any(type(item) is tuple for item in nested):
            _reject("a tuple in the pickle is too long or too deep", f"at most {_MAX_TUPLE} items")
        self.push(tuple(items))

    def reduce(self) -> None:
        arguments = self.pop()
        self.push(call(self.pop(), arguments))

    def build(self) -> None:
        """Ignores a state dict's `_metadata`, which has only versions of torch's modules."""
        state, target = self.pop(), self.pop()
        self.push(target)
        if not isinstance(target, OrderedMapping) or not isinstance(state, dict):
            _reject("the pickle sets attributes of an object that is not a state dict")
        if other := sorted(state.keys() - {"_metadata"}):
            what = "the pickle sets unknown attributes of a dict"
            _reject(what, "_metadata", describe_value(other[0]))

    def set_items(self, items: list[object]) -> None:
        target = self.pop()
        self.push(target)
        if not isinstance(target, dict) or len(items) % 2:
            what = "the pickle sets items of an object that is not a dict"
            _reject(what, "a dict", describe_value(target))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                what = "a dict has a duplicate key, or one that is not a string"
                _reject(what, "unique strings", describe_value(key))
            target[key] = value


def _reject(what: str, expected: object = None, found: object = None) -> NoReturn:
    raise RejectedError(what, expected, found)


def _last(machine: _Machine, count: int) -> list[object]:
    return [machine.pop() for _ in range(count)][::-1]


_OPCODES: dict[bytes, tuple[str, Callable[[_Machine], None]]] = {
    b"(": ("MARK", _Machine.mark),
    b"N": ("NONE", lambda m: m.push(None)),
    b"\x88": ("NEWTRUE", lambda m: m.push(True)),
    b"\x89": ("NEWFALSE", lambda m: m.push(False)),
    b"J": ("BININT", lambda m: m.push(m.number(_I32))),
    b"K": ("BININT1", lambda m: m.push(m.number(_U8))),
    b"M": ("BININT2", lambda m: m.push(m.number(_U16))),
    b"\x8a": ("LONG1", _Machine.long),
    b"X": ("BINUNICODE", _Machine.text),
    b"q": ("BINPUT", lambda m: m.put(m.number(_U8))),
    b"r": ("LONG_BINPUT", lambda m: m.put(m.number(_U32))),
    b"h": ("BINGET", lambda m: m.get(m.number(_U8))),
    b"j": ("LONG_BINGET", lambda m: m.get(m.number(_U32))),
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

# Opcodes of attacks and of other writers; named only in messages.
_OTHERS = {
    b"i": "INST", b"o": "OBJ", b"P": "PERSID", b"]": "EMPTY_LIST", b"l": "LIST", b"a": "APPEND",
    b"e": "APPENDS", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x93": "STACK_GLOBAL",
    b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"\x95": "FRAME", b"G": "BINFLOAT",
    b"0": "POP", b"2": "DUP", b"I": "INT", b"L": "LONG", b"\x8b": "LONG4", b"S": "STRING",
    b"U": "SHORT_BINSTRING", b"\x80": "PROTO",
}  # fmt: skip


def _name_opcode(code: bytes) -> str:
    return _OTHERS.get(code, f"byte {code.hex()}")
