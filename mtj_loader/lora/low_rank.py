"""Low-rank terms of parameters: their factors as views, and those of many matrices merged to one.

The factors are brought to the parameter's own order and grouped like it, so that a shard's rows of
B and columns of A are cut before they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtj_loader.formats.records import TensorRecord
from mtj_loader.parameters import Axis, ParamSpec
from mtj_loader.storage.base import Storage
from mtj_loader.weights.resolve import TargetKey
from mtj_loader.weights.view import View, concat, stack, zeros


@dataclass(frozen=True, eq=False)
class LowRank:
    """A term left · right of a parameter, in the parameter's own order.

    Attributes:
      spec: the parameter.
      storage: where the factors are read.
      left: [..., rows, r], grouped as the parameter's rows.
      right: [..., r, columns], grouped as its columns.
      scales: float32 [..., r], a factor for each rank.
    """

    spec: ParamSpec
    storage: Storage
    left: View
    right: View
    scales: np.ndarray

    @property
    def left_spec(self) -> ParamSpec:
        """The left factor, declared as a parameter that is split like the parameter itself."""
        return self._factor_spec((self.spec.groups[-2], (self._rank,)))

    @property
    def right_spec(self) -> ParamSpec:
        """The right factor, likewise."""
        return self._factor_spec(((self._rank,), self.spec.groups[-1]))

    @property
    def factors(self) -> tuple[tuple[View, ParamSpec], tuple[View, ParamSpec]]:
        """The left one and the right one."""
        return (self.left, self.left_spec), (self.right, self.right_spec)

    @property
    def _rank(self) -> Axis:
        return Axis("r", self.scales.shape[-1])

    def _factor_spec(self, groups: tuple[tuple[Axis, ...], ...]) -> ParamSpec:
        groups = self.spec.groups[:-2] + groups
        names = [axis.name for group in groups for axis in group]
        split = self.spec.split if self.spec.split in names else None
        return ParamSpec(self.spec.module, self.spec.param, groups, split)


@dataclass(frozen=True)
class CarriedCopy:
    """A base weight that the adapter carries; it must be equal to the checkpoint's."""

    storage: Storage
    copy: TensorRecord
    original: TensorRecord


@dataclass(frozen=True)
class AdapterTerms:
    """What one adapter adds to a model."""

    terms: Mapping[TargetKey, LowRank]
    copies: tuple[CarriedCopy, ...]


@dataclass(frozen=True, eq=False)
class Factors:
    """A pair of factors in torch's order: `a` [..., r, in], `b` [..., out, r]."""

    a: View
    b: View
    scales: np.ndarray  # float32 [..., r]


def merged_factors(parts: Sequence[Mapping[int, Factors]], *, experts: int) -> Factors:
    """Factors of many small matrices as those of the one parameter that they are merged into.

    Args:
      parts: for each pattern of a merge, number → factors; a matrix without any stays as it is.
      experts: how many numbers there are.

    Raises:
      ValueError: a number is too large, or shapes differ.
    """
    if beyond := [e for part in parts for e in part if e >= experts]:
        raise ValueError(f"there is no expert {beyond[0]} among {experts}")
    first = next(factors for part in parts for factors in part.values())
    outs, ins = first.b.shape[0], first.a.shape[1]
    rank = max(sum(p[e].scales.size for p in parts if e in p) for e in range(experts))
    built = [_one_expert(parts, e, rank, outs, ins) for e in range(experts)]
    return Factors(
        stack([factors.a for factors in built], 0),
        stack([factors.b for factors in built], 0),
        np.stack([factors.scales for factors in built]),
    )


def _one_expert(
    parts: Sequence[Mapping[int, Factors]], expert: int, rank: int, outs: int, ins: int
) -> Factors:
    """One expert's factors: A's one below the other, B's block by block along the diagonal."""
    a: list[View] = []
    b: list[View] = []
    scales = np.zeros(rank, np.float32)
    for i, part in enumerate(parts):
        if expert not in part:
            continue
        own = part[expert]
        done = sum(view.shape[0] for view in a)
        scales[done : done + own.scales.size] = own.scales
        a.append(own.a)
        above, below = i * outs, (len(parts) - 1 - i) * outs
        blocks = [zeros((above, own.scales.size)), own.b, zeros((below, own.scales.size))]
        b.append(concat([block for block in blocks if block.shape[0]], 0))
    if not a:
        return Factors(zeros((rank, ins)), zeros((len(parts) * outs, rank)), scales)
    left, right = concat(b, 1), concat(a, 0)
    return Factors(right.pad(0, rank), left.pad(1, rank), scales)
