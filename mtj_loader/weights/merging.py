"""Checkpoint layouts that store a tensor in parts: renames, and merges of many tensors into one.

A map's `conversions` describe them with the vocabulary of transformers' weight converters:
`source_patterns` with `*` for a number, then `merge_modulelist` (each pattern's tensors, in the
order of their numbers, stacked on a new axis) and `concatenate`. They are compiled to views, so
that a shard is cut from every part before anything is merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mtj_loader.errors import Problem
from mtj_loader.formats.records import TensorRecord
from mtj_loader.weights.view import View, concat, stack, view_of

# Prefixes that published files add to, or drop from, the names that transformers saves.
BASE_PREFIXES = ("transformer.", "model.", "gpt_neox.")

_NUMBER = "(0|[1-9][0-9]{0,5})"  # at most six digits: names are untrusted input


@dataclass(frozen=True)
class SourceTensor:
    """A tensor under the name that the map's entries use, however it is stored."""

    name: str
    view: View

    @property
    def file(self) -> str:
        """The file, or the first of several."""
        return self.view.records[0].file

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The distinct dtypes of its parts."""
        return tuple(dict.fromkeys(record.dtype for record in self.view.records))


@dataclass(frozen=True)
class Rename:
    """Replaces the leading components of a name inside a layer."""

    old: str
    new: str

    def __call__(self, name: str) -> str:
        """The new name; a name with other leading components is returned unchanged."""
        if name == self.old or name.startswith(self.old + "."):
            return self.new + name[len(self.old) :]
        return name


@dataclass(frozen=True)
class Merge:
    """Merges many tensors into one.

    Attributes:
      sources: name patterns inside a layer, each with one `*` for a number.
      target: the name of the merged tensor.
      stack_axis: the new axis along which the tensors of one pattern are stacked.
      concat_axis: the axis along which the stacks are joined; None if there is only one pattern.
    """

    sources: tuple[str, ...]
    target: str
    stack_axis: int
    concat_axis: int | None

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(re.escape(s).replace(r"\*", _NUMBER)) for s in self.sources]

    def match(self, name: str) -> tuple[int, int] | None:
        """The index of the pattern that a name matches, and its number."""
        for i, pattern in enumerate(self._patterns):
            if found := pattern.fullmatch(name):
                return i, int(found[1])
        return None

    def build(self, parts: Sequence[Mapping[int, TensorRecord]]) -> View:
        """The merged view, in numeric order.

        Args:
          parts: for each pattern, number → tensor.

        Raises:
          ValueError: a number is missing, or the shapes do not fit together.
        """
        count = max((max(part, default=-1) for part in parts), default=-1) + 1
        for pattern, part in zip(self.sources, parts, strict=True):
            if len(part) < count:
                missing = next(i for i in range(count) if i not in part)
                raise ValueError(f"there is no {pattern.replace('*', str(missing))}")
        self._check_axes(len(parts[0][0].shape))
        stacks = [
            stack([view_of(part[i]) for i in range(count)], self.stack_axis) for part in parts
        ]
        return stacks[0] if self.concat_axis is None else concat(stacks, self.concat_axis)

    def _check_axes(self, ndim: int) -> None:
        """Raises ValueError if a stack of tensors with `ndim` dimensions lacks one of the axes."""
        axes = {"merge_modulelist": self.stack_axis, "concatenate": self.concat_axis or 0}
        for operation, axis in axes.items():
            if axis > ndim:
                raise ValueError(f"{operation} has dim {axis}, but there are {ndim + 1} dimensions")


@dataclass(frozen=True)
class Conversions:
    """A map's conversions, and the prefix of the layers that they apply to."""

    layer_prefix: str
    renames: tuple[Rename, ...] = ()
    merges: tuple[Merge, ...] = ()

    @cached_property
    def _prefix(self) -> re.Pattern[str]:
        number = "(?P<layer>0|[1-9][0-9]*)"
        return re.compile(re.escape(self.layer_prefix).replace(r"\{layer\}", number))

    def locate(self, name: str) -> tuple[str, str] | None:
        """A name's layer prefix, as in the map, and the renamed rest; None outside a layer."""
        for spelling in spellings(name):
            if found := self._prefix.match(spelling):
                rest = spelling[found.end() :]
                for rename in self.renames:
                    rest = rename(rest)
                return found[0], rest
        return None


NO_CONVERSIONS = Conversions("")


@dataclass
class _Merger:
    """Collects the parts of merged tensors: (prefix, merge) → parts."""

    parts: dict[tuple[str, Merge], list[dict[int, TensorRecord]]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, prefix: str, rest: str, record: TensorRecord, merges: Sequence[Merge]) -> bool:
        """Adds a tensor if it is a part of a merged one; returns whether it is."""
        for merge in merges:
            if (found := merge.match(rest)) is not None:
                pattern, number = found
                empty: list[dict[int, TensorRecord]] = [{} for _ in merge.sources]
                parts = self.parts.setdefault((prefix, merge), empty)[pattern]
                other = parts.setdefault(number, record)
                if other is not record:
                    what = "two tensors for one part of a parameter"
                    self.problems.append(Problem(what, record.file, record.name, found=other.name))
                return True
        return False


def convert(
    records: Mapping[str, TensorRecord], conversions: Conversions
) -> tuple[list[SourceTensor], list[Problem]]:
    """Every tensor under its converted name, and a problem for each that cannot be converted."""
    merger = _Merger()
    tensors: list[SourceTensor] = []
    for name, record in records.items():
        located = conversions.locate(name) if conversions.layer_prefix else None
        if located is not None and merger.add(*located, record, conversions.merges):
            continue
        tensors.append(SourceTensor("".join(located) if located else name, view_of(record)))
    problems = merger.problems
    for (prefix, merge), parts in merger.parts.items():
        try:
            tensors.append(SourceTensor(prefix + merge.target, merge.build(parts)))
        except ValueError as error:
            what = f"tensors cannot be merged into one: {error}"
            file = next(record.file for part in parts for record in part.values())
            problems.append(Problem(what, file, tensor=prefix + merge.target))
    return tensors, problems


def spellings(name: str) -> Iterator[str]:
    """A tensor's name, and its variants with a known base prefix added or dropped."""
    yield name
    for prefix in BASE_PREFIXES:
        yield prefix + name
        if name.startswith(prefix):
            yield name.removeprefix(prefix)
