r"""Matches untrusted regular expressions in time proportional to pattern length × text length.

Python's `re` backtracks: a pattern such as `(a+)+!` takes exponential time. Here all alternatives
are followed at once, as a set of positions in a small program (Thompson, "Regular expression
search algorithm", 1968; Cox, "Regular expression matching can be simple and fast", 2007).
Backreferences and lookaround cannot be matched this way and are refused.

Supported: characters, escapes such as `\.` and `\d`, `.`, `[…]`, `(…)`, `(?:…)`, `|`, `*`, `+`,
`?`, `{m,n}`, also lazy (which changes what a group captures, not what matches), `^` and `$`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_MAX_CHARACTERS = 512  # enough for a list of a model's modules
_MAX_STEPS = 5_000  # of a program: ten times as many as 512 characters without {m,n} need
_MAX_DEPTH = 50  # of groups; each takes three nested calls, and Python allows a thousand

_ATOM = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[^0-9A-Za-z]|\\[dDsSwW]|[^\\()\[{}*+?|^$]", re.S)
_REPEAT = re.compile(r"(?:([*+?])|\{([0-9]{1,4})(,([0-9]{1,4})?)?\})\??(?![*+?{])")


@dataclass(frozen=True, slots=True)
class _Character:
    """A step that consumes one character of a class."""

    kind: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class _Jump:
    """A step that consumes nothing and continues at any of these relative positions."""

    to: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A step that consumes nothing and matches at the start (`^`) or the end (`$`) of the text."""

    sign: str


_Program = tuple[_Character | _Jump | _Anchor, ...]


class UnsupportedPatternError(ValueError):
    """Not a regular expression, or one that is not supported here; the message says why."""


@lru_cache(maxsize=1024)  # each pattern is matched against the names of all modules
def compile_pattern(pattern: str) -> _Program:
    """Compiles a pattern to a program.

    Raises:
      UnsupportedPatternError: the pattern is malformed or not supported.
    """
    if len(pattern) > _MAX_CHARACTERS:
        raise UnsupportedPatternError(f"more than {_MAX_CHARACTERS} characters")
    parser = _Parser(pattern)
    program = parser.alternatives(depth=0)
    if parser.at < len(pattern):
        raise parser.error()
    return program


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern matches the whole text, as with `re.fullmatch`.

    Raises:
      UnsupportedPatternError: the pattern is malformed or not supported.
    """
    program = compile_pattern(pattern)
    positions = _reachable(program, [0], 0, len(text))
    for at, char in enumerate(text, 1):
        after = [
            position + 1
            for position in positions
            if position < len(program)
            and isinstance(step := program[position], _Character)
            and step.kind.fullmatch(char)
        ]
        positions = _reachable(program, after, at, len(text))
    return len(program) in positions


def _reachable(program: _Program, positions: Iterable[int], at: int, end: int) -> set[int]:
    """The positions reached from others without consuming a character, at offset `at`."""
    found: set[int] = set()
    waiting = list(positions)
    while waiting:
        position = waiting.pop()
        if position in found:
            continue
        found.add(position)
        match program[position] if position < len(program) else None:
            case _Jump(to):
                waiting += [position + distance for distance in to]
            case _Anchor(sign) if at == (0 if sign == "^" else end):
                waiting.append(position + 1)
    return found


@dataclass
class _Parser:
    """Compiles a pattern from left to right."""

    pattern: str
    at: int = 0

    def error(self) -> UnsupportedPatternError:
        rest = self.pattern[self.at : self.at + 20]
        return UnsupportedPatternError(f"not supported from character {self.at + 1} on: {rest!r}")

    def take(self, text: str) -> bool:
        """Skips the text if it comes next; returns whether it did."""
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def alternatives(self, depth: int) -> _Program:
        branches = [self.sequence(depth)]
        while self.take("|"):
            branches.append(self.sequence(depth))
        program = branches.pop()
        for branch in reversed(branches):
            program = (_Jump((1, len(branch) + 2)), *branch, _Jump((len(program) + 1,)), *program)
        return program

    def sequence(self, depth: int) -> _Program:
        program: _Program = ()
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            program += self.repeat(self.item(depth))
            if len(program) > _MAX_STEPS:
                raise UnsupportedPatternError("too many repetitions")
        return program

    def item(self, depth: int) -> _Program:
        """A group, an anchor or one character."""
        if depth > _MAX_DEPTH:
            raise UnsupportedPatternError("groups are nested too deeply")
        if self.take("(?:") or (self.pattern[self.at :][:2] != "(?" and self.take("(")):
            program = self.alternatives(depth + 1)
            if not self.take(")"):
                raise self.error()
            return program
        if self.pattern[self.at] in "^$":
            self.at += 1
            return (_Anchor(self.pattern[self.at - 1]),)
        return (self.character(),)

    def character(self) -> _Character:
        found = _ATOM.match(self.pattern, self.at)
        if found is None:
            raise self.error()
        self.at = found.end()
        try:
            return _Character(re.compile(found[0]))
        except re.error as error:  # such as [z-a]
            raise UnsupportedPatternError(str(error)) from error

    def repeat(self, program: _Program) -> _Program:
        """Applies the repetition that follows, if any, to a program."""
        found = _REPEAT.match(self.pattern, self.at)
        if found is None:
            return program
        self.at = found.end()
        sign, minimum, comma, maximum = found.groups()
        if sign is not None:
            return {"*": _zero_or_more, "+": _one_or_more, "?": _optional}[sign](program)
        low = int(minimum)
        high = int(maximum) if maximum else low
        if high < low or max(low, high) * (len(program) + 1) > _MAX_STEPS:
            raise UnsupportedPatternError("too many repetitions, or a maximum below the minimum")
        rest = _zero_or_more(program) if comma and not maximum else ()
        return program * low + _optional(program) * (high - low) + rest


def _zero_or_more(program: _Program) -> _Program:
    return (_Jump((1, len(program) + 2)), *program, _Jump((-len(program) - 1,)))


def _one_or_more(program: _Program) -> _Program:
    return (*program, _Jump((-len(program), 1)))


def _optional(program: _Program) -> _Program:
    return (_Jump((1, len(program) + 1)), *program)
