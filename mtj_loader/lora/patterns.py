r"""Matches untrusted regular expressions within a bounded amount of work.

Python's `re` backtracks: a pattern such as `(a+)+!` takes exponential time. Here all alternatives
are followed at once, as a set of positions in a small program (Thompson, "Regular expression
search algorithm", 1968; Cox, "Regular expression matching can be simple and fast", 2007). Sets
that were reached before are cached, and the work for new ones is limited. Backreferences and
lookaround cannot be matched this way and are refused.

Supported: characters, escapes such as `\.` and `\d`, `.`, `[…]`, `(…)`, `(?:…)`, `|`, `*`, `+`,
`?`, `{m,n}`, also lazy (which changes what a group captures, not what matches), `^` and `$`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

_MAX_CHARACTERS = 512  # enough for a list of a model's modules
_MAX_STEPS = 5_000  # of a program: ten times as many as 512 characters without {m,n} need
_MAX_DEPTH = 50  # of groups; each takes three nested calls, and Python allows a thousand

# Units of about 0.1 microseconds; one for each character of a name.
MAX_WORK = 3_000_000  # of a table: two patterns for 18,000 experts with names of 60 characters
STEP_WORK = 4  # for a step of a program that is compiled, or reached by a new set
_SET_WORK = 40  # for a new set
_CLASS_WORK, _CLASS_CHARACTER_WORK = 1_000, 10  # for compiling […]

_SHORT_CLASSES = {".", *(f"\\{letter}" for letter in "dDsSwW")}
# Not with `[[` at the start or `--`, `&&`, `~~` or `||`: `re` warns that they may get a meaning.
_CLASS = r"\[(?!\[)\^?\]?(?:\\.|(?!--|&&|~~|\|\|)[^\]\\])*\]"
_ATOM = re.compile(_CLASS + r"|\\[^0-9A-Za-z]|\\[dDsSwW]|[^\\()\[{}*+?|^$]", re.S)
_REPEAT = re.compile(r"(?:([*+?])|\{([0-9]{1,4})(,([0-9]{1,4})?)?\})\??(?![*+?{])")


@dataclass(frozen=True, slots=True)
class _Character:
    """A step that consumes one character of a class."""

    accepts: Callable[[str], object]


@dataclass(frozen=True, slots=True)
class _Jump:
    """A step that consumes nothing and continues at any of these relative positions."""

    to: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A step that consumes nothing and matches at the start (`^`) or the end (`$`) of the text."""

    sign: str


Program = tuple[_Character | _Jump | _Anchor, ...]
_Positions = frozenset[int]


class UnsupportedPatternError(ValueError):
    """Not a regular expression, or one that is not supported here; the message says why."""


@dataclass
class Work:
    """How much work may still be done for patterns."""

    left: int = field(default_factory=lambda: MAX_WORK)

    def spend(self, units: int) -> None:
        """Raises UnsupportedPatternError if there is too little left."""
        self.left -= units
        if self.left < 0:
            raise UnsupportedPatternError("the patterns take too long")


class Matcher:
    """Matches a program, and caches which positions follow which at a character.

    Args:
      program: compiled.
      work: what caching may still cost.
    """

    def __init__(self, program: Program, work: Work) -> None:
        self._program, self._work = program, work
        self._after: dict[tuple[_Positions, str, bool], _Positions] = {}
        self._same: dict[_Positions, _Positions] = {}  # one object for equal sets

    def matches(self, text: str) -> bool:
        """Whether the program matches the whole text."""
        self._work.spend(len(text) + 1)
        positions = frozenset({0})
        for at, character in enumerate((*text, "")):  # "" is the end
            key = positions, character, at == 0
            after = self._after.get(key)
            if after is None:
                after = self._after[key] = self._advance(*key)
            if not after:
                return False
            positions = after
        return len(self._program) in positions

    def _advance(self, positions: _Positions, character: str, at_start: bool) -> _Positions:
        """The positions after a character; at the end those reached without one."""
        self._work.spend(_SET_WORK)
        reached = self._reachable(positions, at_start, at_end=not character)
        if character:
            steps = ((i, self._program[i]) for i in reached if i < len(self._program))
            reached = frozenset(
                i + 1
                for i, step in steps
                if isinstance(step, _Character) and step.accepts(character)
            )
        return self._same.setdefault(reached, reached)

    def _reachable(self, positions: _Positions, at_start: bool, *, at_end: bool) -> _Positions:
        """The positions reached from others without consuming a character."""
        holds = {"^": at_start, "$": at_end}
        found: set[int] = set()
        waiting = list(positions)
        while waiting:
            position = waiting.pop()
            if position in found:
                continue
            found.add(position)
            self._work.spend(STEP_WORK)
            match self._program[position] if position < len(self._program) else None:
                case _Jump(to):
                    waiting += [position + distance for distance in to]
                case _Anchor(sign) if holds[sign]:
                    waiting.append(position + 1)
        return frozenset(found)


def compile_pattern(pattern: str, work: Work) -> Program:
    """Compiles a pattern to a program.

    Raises:
      UnsupportedPatternError: the pattern is malformed or not supported, or takes too long.
    """
    if len(pattern) > _MAX_CHARACTERS:
        raise UnsupportedPatternError(f"more than {_MAX_CHARACTERS} characters")
    parser = _Parser(pattern, work)
    program = parser.alternatives(depth=0)
    if parser.at < len(pattern):
        raise parser.error()
    work.spend(STEP_WORK * (len(program) + 1))
    return program


@lru_cache(maxsize=64)  # `.`, `\d` and the like
def _compile_class(atom: str) -> Callable[[str], object]:
    return re.compile(atom).fullmatch


@dataclass
class _Parser:
    """Compiles a pattern from left to right."""

    pattern: str
    work: Work
    at: int = 0

    def error(self) -> UnsupportedPatternError:
        rest = self.pattern[self.at : self.at + 20]
        return UnsupportedPatternError(f"not supported from character {self.at + 1} on: {rest!r}")

    def take(self, text: str) -> bool:
        """Skips the text if it comes next; returns whether it did."""
        found = self.pattern.startswith(text, self.at)
        if found:
            self.at += len(text)
        return found

    def alternatives(self, depth: int) -> Program:
        branches = [self.sequence(depth)]
        while self.take("|"):
            branches.append(self.sequence(depth))
        program = branches.pop()
        for branch in reversed(branches):
            program = (_Jump((1, len(branch) + 2)), *branch, _Jump((len(program) + 1,)), *program)
        return program

    def sequence(self, depth: int) -> Program:
        program: Program = ()
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            program += self.repeat(self.item(depth))
            if len(program) > _MAX_STEPS:
                raise UnsupportedPatternError("too many repetitions")
        return program

    def item(self, depth: int) -> Program:
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
        return _Character(self.accepts(found[0]))

    def accepts(self, atom: str) -> Callable[[str], object]:
        """Whether an atom matches a character."""
        literal = atom.removeprefix("\\")
        if len(literal) == 1 and atom not in _SHORT_CLASSES:
            return literal.__eq__
        if len(literal) > 1:
            self.work.spend(_CLASS_WORK + _CLASS_CHARACTER_WORK * len(atom))
        try:
            return _compile_class(atom)
        except re.error as error:  # such as [z-a]
            raise UnsupportedPatternError(str(error)) from error

    def repeat(self, program: Program) -> Program:
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


def _zero_or_more(program: Program) -> Program:
    return (_Jump((1, len(program) + 2)), *program, _Jump((-len(program) - 1,)))


def _one_or_more(program: Program) -> Program:
    return (*program, _Jump((-len(program), 1)))


def _optional(program: Program) -> Program:
    return (_Jump((1, len(program) + 1)), *program)
