"""The syntax tree of a grammar: characters, references, sequences, choices and repetitions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included

_LAST = 0x10FFFF  # the last code point of Unicode
_SURROGATES = (0xD800, 0xDFFF)  # no characters: UTF-8 cannot encode them


@dataclass(frozen=True)
class Characters:
    """One character out of a set; `ranges` are sorted and do not overlap."""

    ranges: Ranges


@dataclass(frozen=True)
class Reference:
    """Another rule, by name."""

    name: str


@dataclass(frozen=True)
class Sequence:
    """All items, one after another; the empty text without items."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repetition:
    """The item `least` to `most` times; `most` is None if there is no maximum."""

    item: Node
    least: int
    most: int | None


Node = Characters | Reference | Sequence | Choice | Repetition
Rules = Mapping[str, Node]


def make_characters(ranges: list[tuple[int, int]], *, negated: bool = False) -> Characters:
    """The characters in the ranges, or with `negated` all others; never a surrogate."""
    merged = _merge(_complement(_merge(ranges)) if negated else ranges)
    return Characters(tuple(_complement(_merge([*_complement(merged), _SURROGATES]))))


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The gaps between merged ranges."""
    starts = [0, *(last + 1 for _, last in ranges)]
    ends = [*(first - 1 for first, _ in ranges), _LAST]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start <= end]


def children(node: Node) -> tuple[Node, ...]:
    """The nodes directly inside a node."""
    match node:
        case Sequence(items):
            return items
        case Choice(options):
            return options
        case Repetition(item):
            return (item,)
        case _:
            return ()


def references(node: Node) -> list[str]:
    """The names of all rules that a node refers to."""
    if isinstance(node, Reference):
        return [node.name]
    return [name for child in children(node) for name in references(child)]


def fixed_point(rules: Rules, test: Callable[[Node, Collection[str]], bool]) -> list[str]:
    """The smallest set of rules for which the test holds, given the rules already in the set.

    Args:
      rules: all of them.
      test: must not turn false when the set grows; it is called once per rule and reference.

    Returns:
      the rules in the order in which they were found.
    """
    users: dict[str, set[str]] = {name: set() for name in rules}
    for name, node in rules.items():
        for used in references(node):
            users[used].add(name)
    found: dict[str, None] = {}
    waiting = list(rules)
    while waiting:
        name = waiting.pop()
        if name not in found and test(rules[name], found.keys()):
            found[name] = None
            waiting.extend(users[name])
    return list(found)
