"""Parses GBNF, the grammar format of llama.cpp and koboldcpp, into a syntax tree.

Format: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import itertools
import re

from mtj_loader.errors import GrammarError
from mtj_loader.grammar.syntax_tree import (
    Characters,
    Choice,
    Node,
    Reference,
    Repetition,
    Sequence,
    make_characters,
)

_MAX_CHARACTERS = 64 << 10  # the largest example of llama.cpp has 4,000
_MAX_NESTING = 25  # parentheses; llguidance allows 30
_MAX_MARKS = 3  # `*`, `+`, `?` and `{m,n}` after one element
_MAX_REPETITIONS = 2_000  # of `{m,n}`, as in llama.cpp
_MAX_RULES = 1_000  # a chain of 5,000 overflows the stack of llguidance

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER = re.compile(r"[0-9]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_OR_NEWLINE = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", **{char: char for char in '\\"[]-'}}
_HEX = re.compile(r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}")


def parse_gbnf(text: str) -> dict[str, Node]:
    """Parses a grammar.

    Returns:
      rule name → what it stands for; `root` and every rule that is referred to are there.

    Raises:
      GrammarError: the text is not GBNF, or a rule is missing or defined twice.
    """
    if not isinstance(text, str):
        found = type(text).__name__
        raise GrammarError("not a grammar", key="grammar", expected="a string", found=found)
    if len(text) > _MAX_CHARACTERS:
        expected, found = f"at most {_MAX_CHARACTERS:,} characters", f"{len(text):,}"
        raise GrammarError("the grammar is too long", key="grammar", expected=expected, found=found)
    return _Parser(text).parse()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._position, self._depth = text, 0, 0
        self._used: dict[str, int] = {}  # rule name → where it is first referred to

    def parse(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        self._skip(_SPACE_OR_NEWLINE)
        while self._position < len(self._text):
            start, name = self._position, self._match(_NAME, "the name of a rule")
            if name in rules:
                raise self._error(f"the rule {name!r} is defined twice", at=start)
            if len(rules) == _MAX_RULES:
                raise self._error(f"more than {_MAX_RULES:,} rules", at=start)
            self._skip(_SPACE)
            self._expect("::=")
            self._skip(_SPACE_OR_NEWLINE)
            rules[name] = self._choice()
            if self._peek() not in ("", "\r", "\n"):
                raise self._error("unexpected character")
            self._skip(_SPACE_OR_NEWLINE)
        if "root" not in rules:
            raise GrammarError("the grammar has no rule named root", key="grammar")
        for name, position in self._used.items():
            if name not in rules:
                raise self._error(f"there is no rule named {name!r}", at=position)
        return rules

    def _choice(self) -> Node:
        options = [self._sequence()]
        while self._peek() == "|":
            self._position += 1
            self._skip(_SPACE_OR_NEWLINE)
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self) -> Node:
        items: list[Node] = []
        while (found := self._element()) is not None:
            items.append(self._repetition(found))
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _element(self) -> Node | None:
        """The next element without its repetition; None at the end of a sequence."""
        char = self._peek()
        if char == '"':
            node = self._string()
        elif char == "[":
            node = self._characters()
        elif char == "(":
            node = self._group()
        elif char == ".":
            self._position += 1
            node = make_characters([], negated=True)
        elif _NAME.match(self._text, self._position):
            start, name = self._position, self._match(_NAME, "a name")
            self._used.setdefault(name, start)
            node = Reference(name)
        elif char in ("<", "!"):
            raise self._error("tokens such as <[1000]> are not supported in a grammar")
        else:
            return None
        self._skip_between()
        return node

    def _string(self) -> Node:
        start = self._position
        self._position += 1
        chars: list[Node] = []
        while self._peek() != '"':
            code = self._character(start)
            chars.append(Characters(((code, code),)))
        self._position += 1
        return Sequence(tuple(chars))

    def _characters(self) -> Characters:
        start = self._position
        self._position += 1
        if negated := self._peek() == "^":
            self._position += 1
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            first = last = self._character(start)
            if self._peek() == "-" and self._peek(1) != "]":
                self._position += 1
                last = self._character(start)
            if last < first:
                raise self._error("the ends of a range are in the wrong order", at=start)
            ranges.append((first, last))
        self._position += 1
        characters = make_characters(ranges, negated=negated)
        if not ranges or not characters.ranges:
            raise self._error("a set without characters", at=start)
        return characters

    def _character(self, start: int) -> int:
        """The code point of the next character or escape; `start` is where its element begins."""
        char = self._peek()
        if not char:
            raise self._error("a string or a set of characters without an end", at=start)
        self._position += 1
        if char != "\\":
            return self._check(ord(char))
        if (escape := self._peek()) in _ESCAPES:
            self._position += 1
            return ord(_ESCAPES[escape])
        return self._check(int(self._match(_HEX, "an escape")[1:], 16))

    def _check(self, code: int) -> int:
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self._error(f"U+{code:04X} is no character")
        return code

    def _group(self) -> Node:
        start = self._position
        if self._depth == _MAX_NESTING:
            raise self._error(f"more than {_MAX_NESTING} nested groups")
        self._position, self._depth = start + 1, self._depth + 1
        self._skip(_SPACE_OR_NEWLINE)
        node = self._choice()
        if self._peek() != ")":
            raise self._error("a group without an end", at=start)
        self._position, self._depth = self._position + 1, self._depth - 1
        return node

    def _repetition(self, item: Node) -> Node:
        """The item with the `*`, `+`, `?` or `{m,n}` that follow it."""
        for marks in itertools.count():
            char = self._peek()
            if char not in ("*", "+", "?", "{"):
                break
            if marks == _MAX_MARKS:
                raise self._error(f"more than {_MAX_MARKS} repetitions of one element")
            start, self._position = self._position, self._position + 1
            if char == "{":
                least, most = self._counts(start)
            else:
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
            item = Repetition(item, least, most)
            self._skip_between()
        return item

    def _counts(self, start: int) -> tuple[int, int | None]:
        least = most = self._count()
        if self._peek() == ",":
            self._position += 1
            self._skip(_SPACE_OR_NEWLINE)
            most = None if self._peek() == "}" else self._count()
        self._expect("}")
        if most is not None and most < least:
            raise self._error("the counts of a repetition are in the wrong order", at=start)
        return least, most

    def _count(self) -> int:
        self._skip(_SPACE_OR_NEWLINE)
        start, digits = self._position, self._match(_NUMBER, "a number")
        self._skip(_SPACE_OR_NEWLINE)
        if len(digits) > len(str(_MAX_REPETITIONS)) or int(digits) > _MAX_REPETITIONS:
            raise self._error(f"more than {_MAX_REPETITIONS:,} repetitions", at=start)
        return int(digits)

    def _peek(self, ahead: int = 0) -> str:
        """The next character; empty at the end."""
        return self._text[self._position + ahead : self._position + ahead + 1]

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self._text, self._position)
        self._position = match.end() if match else self._position

    def _skip_between(self) -> None:
        """Skips space after an element; a line ends a rule, except in a group."""
        self._skip(_SPACE_OR_NEWLINE if self._depth else _SPACE)

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self._text, self._position)
        if match is None:
            raise self._error(f"expected {what}")
        self._position = match.end()
        return match[0]

    def _expect(self, text: str) -> None:
        if not self._text.startswith(text, self._position):
            raise self._error(f"expected {text}")
        self._position += len(text)

    def _error(self, what: str, at: int | None = None) -> GrammarError:
        position = self._position if at is None else at
        line = self._text.count("\n", 0, position) + 1
        column = position - self._text.rfind("\n", 0, position)
        near = self._text[position : position + 30]
        found = f"line {line}, column {column}: {near!r}" if near else f"the end, line {line}"
        return GrammarError(what, key="grammar", found=found)
