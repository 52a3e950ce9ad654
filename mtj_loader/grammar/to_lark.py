"""Writes a syntax tree as a grammar for llguidance, in its dialect of Lark.

llguidance splits a text into lexemes first, and takes the longest one. GBNF knows no lexemes: in
`root ::= [a-z]+ "x"` the last x may belong to either. So a lexeme must not be the beginning of
another. That holds for single characters, whose UTF-8 is no prefix of another's, and for one lexeme
that is the whole text. A grammar without recursion becomes one lexeme, a regular expression, which
makes masks fast; any other one gets a lexeme for each character, or for each run of them where that
is the same (`character_runs`).

Syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mtj_loader.errors import GrammarError
from mtj_loader.grammar.character_runs import find_runs
from mtj_loader.grammar.syntax_tree import (
    Characters,
    Choice,
    Node,
    Reference,
    Repetition,
    Rules,
    Sequence,
    children,
    fixed_point,
    references,
)

_HEADER = '%llguidance {"no_forcing": true}\n'  # the model chooses among all spellings of a text

# Characters in a regular expression, references and counts expanded: about 10 ms to compile.
_MAX_REGEX_CHARACTERS = 10_000


def write_lark(rules: Rules) -> str:
    """The grammar whose texts are those of the rule `root`.

    Raises:
      GrammarError: there is no such text, because every choice leads back to a rule.
    """
    rules = {name: _unroll(name, node) for name, node in _without_endless(rules).items()}
    size = _expanded_sizes(rules).get("root")
    is_regular = size is not None and size <= _MAX_REGEX_CHARACTERS
    # In upper case, a rule is part of a lexeme.
    names = {name: f"{'R' if is_regular else 'r'}{number}" for number, name in enumerate(rules)}
    writer = _Writer(names, () if is_regular else find_runs(rules))
    lines = [f"{names[name]}: {writer.write(node)}\n" for name, node in rules.items()]
    return "".join([_HEADER, f"start: {names['root']}\n", *lines])


def write_json_lark(schema: str) -> str:
    """The grammar whose texts are the documents of a JSON schema, itself written as JSON."""
    return f"{_HEADER}start: %json {schema}\n"


_MAX_COPIES = 8  # of one character, so that `character_runs` can tell them apart

_CHOICE, _SEQUENCE, _ITEM = range(3)  # how tightly the place of a node binds


@dataclass(frozen=True)
class _Writer:
    """Writes nodes in Lark.

    Attributes:
      names: of the rules.
      runs: the `id` of the characters that are written as runs, see `character_runs`.
    """

    names: Mapping[str, str]
    runs: Collection[int]

    def write(self, node: Node, place: int = _CHOICE) -> str:
        """A node, in parentheses only where they are needed: llguidance limits their depth."""
        match node:
            case Characters(ranges):
                parts = (f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges)
                return f"/[{''.join(parts)}]{'+' if id(node) in self.runs else ''}/"
            case Reference(name):
                return self.names[name]
            case Sequence(()):
                return '""'
            case Sequence(items):
                text = " ".join(self.write(item, _SEQUENCE) for item in items)
                return f"({text})" if place == _ITEM else text
            case Choice(options):
                text = " | ".join(self.write(option) for option in options)
                return text if place == _CHOICE else f"({text})"
            case Repetition(item, least, most):
                counts = f"{least},{'' if most is None else most}"
                text = f"{self.write(item, _ITEM)}{{{counts}}}"
                return f"({text})" if place == _ITEM else text


def _without_endless(rules: Rules) -> Rules:
    """Drops what no text can complete, and the rules that `root` does not use.

    The texts stay the same. Without this, a mask could lead into a choice that has no end.
    """
    complete = set(fixed_point(rules, _can_end))
    if "root" not in complete:
        what = "no text can match the grammar: every choice of root leads back to a rule"
        raise GrammarError(what, key="grammar")
    kept: dict[str, Node] = {}
    waiting = ["root"]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept[name] = _prune(rules[name], complete)
            waiting.extend(references(kept[name]))
    return kept


def _can_end(node: Node, complete: Collection[str]) -> bool:
    match node:
        case Reference(name):
            return name in complete
        case Choice(options):
            return any(_can_end(option, complete) for option in options)
        case Repetition(_, 0, _):
            return True
        case _:
            return all(_can_end(child, complete) for child in children(node))


def _prune(node: Node, complete: Collection[str]) -> Node:
    """A node that can end, without the parts that cannot, and with short counts written out."""
    match node:
        case Choice(options):
            return Choice(tuple(_prune(o, complete) for o in options if _can_end(o, complete)))
        case Sequence(items):
            return Sequence(tuple(_prune(item, complete) for item in items))
        case Repetition(item, least, most):
            if most == 0 or not _can_end(item, complete):
                return Sequence(())
            if isinstance(item, Characters) and least == most and least <= _MAX_COPIES:
                # Each with its place: as in "\\u" [0-9a-f]{4} beside other characters of a string.
                return Sequence(tuple(Characters(item.ranges) for _ in range(least)))
            return Repetition(_prune(item, complete), least, most)
        case _:
            return node


def _unroll(name: str, node: Node) -> Node:
    """Writes a rule that ends in itself as a repetition: `a ::= x a | y` is `x* y`.

    The work of llguidance's parser grows with the depth of such a recursion.
    """
    repeated: list[Node] = []
    last: list[Node] = []
    for option in _options(node):
        match option:
            case Sequence((*items, Reference(tail))) if tail == name:
                repeated.append(Sequence(tuple(items)))
            case _:
                last.append(option)
    if not repeated:
        return node
    return Sequence((Repetition(Choice(tuple(repeated)), 0, None), Choice(tuple(last))))


def _options(node: Node) -> list[Node]:
    match node:
        case Choice(options):
            return [inner for option in options for inner in _options(option)]
        case Repetition(item, 0, 1):
            return [*_options(item), Sequence(())]
        case _:
            return [node]


def _expanded_sizes(rules: Rules) -> dict[str, int]:
    """The characters of every rule without recursion, its references and counts expanded."""
    sizes: dict[str, int] = {}
    for name in fixed_point(
        rules, lambda node, known: all(used in known for used in references(node))
    ):
        sizes[name] = _size(rules[name], sizes)
    return sizes


def _size(node: Node, sizes: dict[str, int]) -> int:
    match node:
        case Reference(name):
            return sizes[name]
        case Repetition(item, least, most):
            return max(1, least if most is None else most) * _size(item, sizes)
        case _:
            return 1 + sum(_size(child, sizes) for child in children(node))
