r"""Regular expressions from a stranger, matched in time that grows with the lengths alone.

Python's `re` tries alternatives one after another, and `(a+)+!` makes it try exponentially many.
Here all are followed at once, as sets of places in a small program (Thompson, "Regular expression
search algorithm", 1968; Cox, "Regular expression matching can be simple and fast", 2007). What
needs memory of the text cannot be matched so and is refused: backreferences, lookaround.

Understood: characters, escapes such as `\.` and `\d`, `.`, `[…]`, `(…)`, `(?:…)`, `|`, `*`, `+`,
`?`, `{m,n}`, each also lazy (which changes what a group holds, not what matches), `^` and `$`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_MAX_CHARACTERS = 512  # longer than any list of a model's modules
_MAX_STEPS = 5_000  # of the program: ten times what a pattern without {m,n} of that length makes
_MAX_DEPTH = 50  # of groups; each takes three calls of Python, which stops at a thousand

_ATOM = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[^0-9A-Za-z]|\\[dDsSwW]|[^\\()\[{}*+?|^$]", re.S)
_REPEAT = re.compile(r"(?:([*+?])|\{([0-9]{1,4})(,([0-9]{1,4})?)?\})\??(?![*+?{])")


@dataclass(frozen=True, slots=True)
class _One:
    """A step: one character of a kind."""

    kind: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class _Go:
    """A step: no character; go on at any of these places, relative to this one."""

    to: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Edge:
    """A step: no character; only at the beginning (`^`) or the end (`$`) of the text."""

    sign: str


_Program = tuple[_One | _Go | _Edge, ...]


class UnsupportedPatternError(ValueError):
    """Not a regular expression, or one that is not understood here; says why."""


@lru_cache(maxsize=1024)  # an adapter's patterns, each matched with the names of all modules
def compile_pattern(pattern: str) -> _Program:
    """The program of a pattern.

    Raises:
      UnsupportedPatternError: see there.
    """
    if len(pattern) > _MAX_CHARACTERS:
        raise UnsupportedPatternError(f"more than {_MAX_CHARACTERS} characters")
    parser = _Parser(pattern)
    program = parser.alternatives(depth=0)
    if parser.at < len(pattern):
        raise parser.error()
    return program


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern fits the whole of a text, as `re.fullmatch` says.

    Raises:
      UnsupportedPatternError: see there.
    """
    program = compile_pattern(pattern)
    places = _reachable(program, [0], 0, len(text))
    for at, char in enumerate(text, 1):
        after = [
            place + 1
            for place in places
            if place < len(program)
            and isinstance(step := program[place], _One)
            and step.kind.fullmatch(char)
        ]
        places = _reachable(program, after, at, len(text))
    return len(program) in places


def _reachable(program: _Program, places: Iterable[int], at: int, end: int) -> set[int]:
    """Places that are reached from others without a character, at a position of the text."""
    found: set[int] = set()
    waiting = list(places)
    while waiting:
        place = waiting.pop()
        if place in found:
            continue
        found.add(place)
        match program[place] if place < len(program) else None:
            case _Go(to):
                waiting += [place + distance for distance in to]
            case _Edge(sign) if at == (0 if sign == "^" else end):
                waiting.append(place + 1)
    return found


@dataclass
class _Parser:
    """Reads a pattern from left to right."""

    pattern: str
    at: int = 0

    def error(self) -> UnsupportedPatternError:
        rest = self.pattern[self.at : self.at + 20]
        return UnsupportedPatternError(f"not understood from character {self.at + 1} on: {rest!r}")

    def takes(self, text: str) -> bool:
        """Whether this comes next; it is read then."""
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def alternatives(self, depth: int) -> _Program:
        branches = [self.sequence(depth)]
        while self.takes("|"):
            branches.append(self.sequence(depth))
        program = branches.pop()
        for branch in reversed(branches):
            program = (_Go((1, len(branch) + 2)), *branch, _Go((len(program) + 1,)), *program)
        return program

    def sequence(self, depth: int) -> _Program:
        program: _Program = ()
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            program += self.repeated(self.item(depth))
            if len(program) > _MAX_STEPS:
                raise UnsupportedPatternError("its repetitions are too many")
        return program

    def item(self, depth: int) -> _Program:
        """A group, an edge or one character."""
        if depth > _MAX_DEPTH:
            raise UnsupportedPatternError("its groups are nested too deeply")
        if self.takes("(?:") or (self.pattern[self.at :][:2] != "(?" and self.takes("(")):
            program = self.alternatives(depth + 1)
            if not self.takes(")"):
                raise self.error()
            return program
        if self.pattern[self.at] in "^$":
            self.at += 1
            return (_Edge(self.pattern[self.at - 1]),)
        return (self.character(),)

    def character(self) -> _One:
        found = _ATOM.match(self.pattern, self.at)
        if found is None:
            raise self.error()
        self.at = found.end()
        try:
            return _One(re.compile(found[0]))
        except re.error as error:  # such as [z-a]
            raise UnsupportedPatternError(str(error)) from error

    def repeated(self, program: _Program) -> _Program:
        """The program as often as what follows it says."""
        found = _REPEAT.match(self.pattern, self.at)
        if found is None:
            return program
        self.at = found.end()
        sign, least, comma, most = found.groups()
        if sign is not None:
            return {"*": _any_number, "+": _some, "?": _maybe}[sign](program)
        low = int(least)
        high = int(most) if most else low
        if high < low or max(low, high) * (len(program) + 1) > _MAX_STEPS:
            raise UnsupportedPatternError("its repetitions are too many, or none")
        endless = _any_number(program) if comma and not most else ()
        return program * low + _maybe(program) * (high - low) + endless


def _any_number(program: _Program) -> _Program:
    return (_Go((1, len(program) + 2)), *program, _Go((-len(program) - 1,)))


def _some(program: _Program) -> _Program:
    return (*program, _Go((-len(program), 1)))


def _maybe(program: _Program) -> _Program:
    return (_Go((1, len(program) + 1)), *program)
