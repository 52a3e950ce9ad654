"""Names of tensors and modules: sorted by number, grouped, folded, escaped for printing."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

# A layer or expert index: a whole part of a dotted name (so not `norm_1`), or MTJ's `layer_7/`.
# At most nine digits, because names are untrusted input.
_NUMBER = "(?:0|[1-9][0-9]{0,8})"
_INDEX = re.compile(rf"(?<=\.){_NUMBER}(?=\.|$)|(?<=\blayer_){_NUMBER}(?=/)")


_T = TypeVar("_T")


def escape(value: object) -> str:
    """The text of a value, with everything but printable characters escaped, also line breaks.

    Names and values in files are untrusted input: printed as they are, they could control the
    terminal, reverse the order of what follows, or forge lines of our messages.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def escape_lines(text: object) -> str:
    """Like `escape`, for text whose line breaks are ours."""
    return "\n".join(map(escape, str(text).split("\n")))


def group_by(items: Iterable[_T], key: Callable[[_T], Hashable]) -> list[list[_T]]:
    """Groups of items with equal keys, in the order of first appearance."""
    groups: dict[Hashable, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def blank_indices(name: str) -> str:
    """The name with `#` for every index, so that names that differ only in indices become equal."""
    return _INDEX.sub("#", name)


def indices(name: str) -> list[int]:
    """The layer and expert indices in a name, from left to right."""
    return [int(index) for index in _INDEX.findall(name)]


def dotted_ends(name: str) -> list[str]:
    """The name, and what follows each dot in it: `a.b.c`, `b.c`, `c`."""
    return [name, *(name[i:] for i, char in enumerate(name, 1) if char == ".")]


def natural_key(name: str) -> list[tuple[int, str]]:
    """A sort key that compares indices as numbers: `h.2.w` comes before `h.10.w`."""
    texts, numbers = _INDEX.split(name), indices(name)
    return [(0, texts[0]), *((n, text) for n, text in zip(numbers, texts[1:], strict=True))]


def fold_names(names: Sequence[str]) -> str:
    """One name for names that differ only in indices: `h.{0...47}.w`, `h.{0,2,5...8}.w`."""
    columns = iter(list(zip(*map(indices, names), strict=True)))
    return _INDEX.sub(lambda _: number_set(next(columns)), names[0])


def fold_all(names: Sequence[str]) -> list[str]:
    """Names with their indices folded, in the order of first appearance."""
    return [fold_names(group) for group in group_by(names, blank_indices)]


def number_set(numbers: Sequence[int]) -> str:
    """Distinct numbers with runs folded, `{0...5,7}`; a single number has no braces."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(low) if low == high else f"{low}...{high}" for low, high in runs]
    return shown[0] if len(set(numbers)) == 1 else "{" + ",".join(shown) + "}"
