"""Low-rank terms of parameters: their factors as views, and merging those of many matrices.

The factors have the parameter's own order and axis groups, so that a shard's rows of B and columns
of A are cut out before they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtj_loader.formats.records import TensorRecord
from mtj_loader.parameters import Axis, ParamSpec
from mtj_loader.storage.base import Storage
from mtj_loader.weights.view import View, concat, stack, zeros
from mtj_loader.weights.weight_map import TargetKey


@dataclass(frozen=True, eq=False)
class LowRank:
    """A term left · right of a parameter, in the parameter's own order.

    Attributes:
      spec: the parameter.
      storage: where to read the factors.
      left: [..., rows, r], grouped as the parameter's rows.
      right: [..., r, columns], grouped as its columns.
      scales: float32 [..., r], one factor per rank.
    """

    spec: ParamSpec
    storage: Storage
    left: View
    right: View
    scales: np.ndarray

    @property
    def left_spec(self) -> ParamSpec:
        """The left factor as a parameter, split like the parameter itself."""
        return self._factor_spec((self.spec.groups[-2], (self._rank,)))

    @property
    def right_spec(self) -> ParamSpec:
        """The right factor as a parameter, split like the parameter itself."""
        return self._factor_spec(((self._rank,), self.spec.groups[-1]))

    @property
    def factors(self) -> tuple[tuple[View, ParamSpec], tuple[View, ParamSpec]]:
        """The left and the right factor, with their specs."""
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
class BaseWeightCopy:
    """A base weight that is stored in the adapter; it must equal the checkpoint's."""

    storage: Storage
    copy: TensorRecord
    original: TensorRecord


@dataclass(frozen=True)
class AdapterTerms:
    """What one adapter adds to a model, and the base weights that it contains."""

    terms: Mapping[TargetKey, LowRank]
    copies: tuple[BaseWeightCopy, ...]


@dataclass(frozen=True, eq=False)
class Factors:
    """A pair of factors in torch's order: `a` [..., r, in], `b` [..., out, r]."""

    a: View
    b: View
    scales: np.ndarray  # float32 [..., r]


def merge_factors(parts: Sequence[Mapping[int, Factors]], *, experts: int) -> Factors:
    """Merges the factors of many small matrices into those of the one parameter they are part of.

    Args:
      parts: for each pattern of a merge, number → factors; a matrix without factors is unchanged.
      experts: the number of matrices per pattern.

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
    """One expert's factors: the A blocks stacked, the B blocks along the diagonal."""
    a: list[View] = []
    b: list[View] = []
    scales = np.zeros(rank, np.float32)
    for i, part in enumerate(parts):
        if expert not in part:
            continue
        own = part[expert]
        used = sum(view.shape[0] for view in a)
        scales[used : used + own.scales.size] = own.scales
        a.append(own.a)
        above, below = i * outs, (len(parts) - 1 - i) * outs
        blocks = [zeros((above, own.scales.size)), own.b, zeros((below, own.scales.size))]
        b.append(concat([block for block in blocks if block.shape[0]], 0))
    if not a:
        return Factors(zeros((rank, ins)), zeros((len(parts) * outs, rank)), scales)
    left, right = concat(b, 1), concat(a, 0)
    return Factors(right.pad(0, rank), left.pad(1, rank), scales)
