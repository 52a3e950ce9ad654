"""Finds the characters of a grammar that may be read as runs, such as those of a JSON string.

`(C | x)*` and `(C+ | x)*` stand for the same texts. As one lexeme, `C+` makes masks ten times
faster, but llguidance reads the longest one. That is exact if, after a character of C has been read
as this C, another one can be read only as this C. The test is the one of position automata
(Glushkov, 1961): which characters of the grammar can follow which, and which can match at the same
time. What calls a rule is not told apart, so it finds too many such pairs, never too few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from mtj_loader.grammar.syntax_tree import (
    Characters,
    Choice,
    Node,
    Reference,
    Repetition,
    Rules,
    Sequence,
    children,
)

# The work grows with powers of these: at most 0.1 s. JSON has 10 rules and 60 positions.
_MAX_RULES = 100
_MAX_POSITIONS = 200
_MAX_RANGES = 2_000

Facts = tuple[bool, int, int]  # may be empty; the first and the last positions, a bit for each


def find_runs(rules: Rules) -> set[int]:
    """The `id` of each `Characters` in `rules` that may be read as a run; none in huge grammars."""
    if len(rules) > _MAX_RULES:
        return set()
    positions = [node for node in _nodes(rules) if isinstance(node, Characters)]
    if len(positions) > _MAX_POSITIONS or sum(len(p.ranges) for p in positions) > _MAX_RANGES:
        return set()
    number = {id(node): index for index, node in enumerate(positions)}
    meets = [sum(1 << j for j, b in enumerate(positions) if _overlap(a, b)) for a in positions]
    followers = _Followers(rules, number)
    together = _find_together(followers, meets)
    return {
        id(node)
        for parent in _nodes(rules)
        for node in _repeated(parent)
        if _is_alone(number[id(node)], followers, together, meets)
    }


def _is_alone(index: int, followers: _Followers, together: list[int], meets: list[int]) -> bool:
    """Whether nothing but the run itself can read a character that would continue it."""
    rivals = _bits(together[index] & meets[index] & ~(1 << index))
    rest = followers.after_run[index] | _union(followers.after[rival] for rival in rivals)
    return not rest & meets[index]


class _Followers:
    """Which positions can follow which.

    Attributes:
      after: bit j of item i: j can follow i.
      after_run: the same, but i does not follow itself within the run that it may become.
      first: the positions that can come first.
    """

    def __init__(self, rules: Rules, number: dict[int, int]) -> None:
        self._number = number
        self.after, self.after_run = [0] * len(number), [0] * len(number)
        self._facts: dict[str, Facts] = dict.fromkeys(rules, (False, 0, 0))
        changed = True
        while changed:  # rules refer to each other
            facts = {name: self._visit(node) for name, node in rules.items()}
            changed, self._facts = facts != self._facts, facts
        for node in rules.values():
            self._visit(node)
        self.first = self._facts["root"][1]

    def _visit(self, node: Node) -> Facts:
        match node:
            case Characters():
                bit = 1 << self._number[id(node)]
                return False, bit, bit
            case Reference(name):
                return self._facts[name]
            case Choice(options):
                empties, firsts, lasts = zip(*map(self._visit, options), strict=True)
                return any(empties), _union(firsts), _union(lasts)
            case Sequence(items):
                return self._visit_sequence(items)
            case Repetition(item, least, most):
                empty, first, last = self._visit(item)
                if most != 1:
                    runs = _union(1 << self._number[id(c)] for c in _repeated(node))
                    self._link(last, first, runs)
                return empty or least == 0, first, last

    def _visit_sequence(self, items: tuple[Node, ...]) -> Facts:
        all_empty, firsts, lasts = True, 0, 0
        for item in items:
            empty, first, last = self._visit(item)
            self._link(lasts, first)
            firsts |= first if all_empty else 0
            lasts = last | (lasts if empty else 0)
            all_empty = all_empty and empty
        return all_empty, firsts, lasts

    def _link(self, lasts: int, firsts: int, runs: int = 0) -> None:
        for index in _bits(lasts):
            self.after[index] |= firsts
            self.after_run[index] |= firsts & ~(runs & 1 << index)


def _find_together(followers: _Followers, meets: list[int]) -> list[int]:
    """Which positions may be next at the same place of a text: bit j of item i."""
    together, fresh = [0] * len(meets), [0] * len(meets)
    waiting = set(_bits(followers.first))
    for i in waiting:
        fresh[i] = followers.first
    while waiting:
        i = waiting.pop()
        added, fresh[i] = fresh[i] & ~together[i], 0
        together[i] |= added
        # Where one character is read as i and as j, the followers of both are next.
        reached = _union(followers.after[j] for j in _bits(added & meets[i]))
        for k in _bits(followers.after[i] if reached else 0):
            if reached & ~together[k]:
                fresh[k] |= reached
                waiting.add(k)
    return together


def _repeated(node: Node) -> Iterator[Characters]:
    """The characters that a node repeats without a maximum, alone or as one option."""
    match node:
        case Repetition(item, 0 | 1, None):
            options = item.options if isinstance(item, Choice) else (item,)
            yield from (option for option in options if isinstance(option, Characters))


def _nodes(rules: Rules) -> Iterator[Node]:
    waiting = list(rules.values())
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(children(node))


def _overlap(a: Characters, b: Characters) -> bool:
    return any(x[0] <= y[1] and y[0] <= x[1] for x, y in product(a.ranges, b.ranges))


def _union(masks: Iterable[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result


def _bits(mask: int) -> Iterator[int]:
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1
