"""The plan of one parameter: where its bytes come from, who reads them, and how they change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mtj_loader.display import counted
from mtj_loader.lora.low_rank import LowRank
from mtj_loader.names import fold_all
from mtj_loader.parameters import ParamSpec
from mtj_loader.planning.assign_reads import assign_reads
from mtj_loader.planning.assignments import OwnShards, ReadAssignment
from mtj_loader.planning.topology import Topology
from mtj_loader.storage.base import ReadCosts
from mtj_loader.weights.view import ZEROS, Layout, Piece, View


@dataclass(frozen=True)
class Changes:
    """How a parameter differs from the tensors that fill it, apart from dtype and sharding.

    Attributes:
      transposed: torch's [out, in] becomes Haiku's [in, out].
      regrouped: blocks of all queries, all keys and all values become q, k, v of each head in turn.
      zero_rows: rows of zeros that pad the vocabulary.
      stored_rows: rows of the tensors.
      used_rows: those that it takes; the other rows fill other parameters, or none.
      divided_by: what every element is divided by; 1 if nothing is divided.
      adapters: how many LoRA adapters are merged into it.
    """

    transposed: bool
    regrouped: bool
    zero_rows: int
    stored_rows: int
    used_rows: int
    divided_by: int
    adapters: int = 0

    def __str__(self) -> str:
        texts = [
            (self.transposed, "transposed"),
            (self.regrouped, "regrouped by heads"),
            (self.zero_rows, f"{counted(self.zero_rows, 'row')} of zeros added"),
            (
                self.used_rows < self.stored_rows,
                f"{self.used_rows:,} of {counted(self.stored_rows, 'row')}",
            ),
            (self.divided_by != 1, f"divided by {self.divided_by}"),
            (self.adapters, f"{counted(self.adapters, 'adapter')} added"),
        ]
        return ", ".join(text for applies, text in texts if applies)


@dataclass(frozen=True)
class ParamPlan:
    """The plan of one parameter.

    Attributes:
      spec: the parameter.
      view: where its elements come from.
      shards: the layout of each of its n shards, one dimension for every axis of the spec; in a
        simulation (see `simulate`) only of the shards that one host holds.
      source_dtype: in the file.
      dtype: on the devices.
      divisor: what every element is divided by.
      assignment: which part of it each device reads.
      terms: what adapters add to it.
    """

    spec: ParamSpec
    view: View
    shards: tuple[Layout, ...]
    source_dtype: np.dtype
    dtype: np.dtype
    divisor: int
    assignment: ReadAssignment
    terms: tuple[LowRank, ...] = ()

    def __repr__(self) -> str:
        names = fold_all([record.name for record in self.view.records])
        array = f"{list(self.array_shape)} {self.dtype.name}"
        return f"<ParamPlan {self.spec.module} {self.spec.param}, {array} from {', '.join(names)}>"

    @property
    def as_read(self) -> ParamPlan:
        """The plan without its terms, in the file's dtype, so that the sum is rounded once."""
        return replace(self, dtype=self.source_dtype, terms=()) if self.terms else self

    @property
    def without_exchange(self) -> ParamPlan:
        """The plan in which every device reads its own shard."""
        return replace(self, assignment=own_shards(self.spec, self.shards))

    @property
    def kind(self) -> Hashable:
        """Equal for parameters of one plan that are read in the same way, such as equal layers."""
        return self.view.layout, self.spec.groups, self.spec.split, self.source_dtype

    @cached_property
    def shard_shape(self) -> tuple[int, ...]:
        """One shard on its device, without the leading axis: [*groups]."""
        return own_shards(self.spec, self.shards).shape

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of the `jax.Array`: [n, *groups]."""
        return (len(self.shards), *self.shard_shape)

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard on its device."""
        return self.shards[0].size * self.dtype.itemsize

    def source_bytes(self, device_indices: Sequence[int]) -> int:
        """Bytes that some devices have to read, each distinct layout once."""
        return self.assignment.read_elements(device_indices) * self.source_dtype.itemsize

    def received_bytes(self, device_indices: Sequence[int]) -> int:
        """Bytes, in the file's dtype, that some devices receive from other hosts' devices."""
        return self.assignment.received_elements(device_indices) * self.source_dtype.itemsize

    @property
    def changes(self) -> Changes:
        """How the tensors change; a row is a row of the first tensor."""
        records, layout = self.view.records, self.view.layout
        row = (math.prod(records[0].shape[1:]) if records else math.prod(layout.shape[1:])) or 1
        zeros = sum(math.prod(piece.shape) for piece in layout.pieces if piece.source == ZEROS)
        used = sum(math.prod(piece.shape) for piece in layout.pieces if piece.source != ZEROS)
        stored = sum(math.prod(record.shape) for record in records)
        return Changes(
            transposed=any(map(_is_transposed, layout.pieces)),
            regrouped=any(map(_is_regrouped, layout.pieces)),
            zero_rows=zeros // row,
            stored_rows=stored // row,
            used_rows=used // row,
            divided_by=self.divisor,
            adapters=len(self.terms),
        )

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON types; docs/json.md describes them."""
        return {
            "module": self.spec.path,
            "param": self.spec.param,
            "shape": list(self.array_shape),
            "dtype": self.dtype.name,
            "split": self.spec.split,
            "device_bytes": self.shard_bytes,
            "read": self.assignment.description,
            "changes": dict(vars(self.changes)),  # asdict would make deep copies
            "tensors": [record.to_dict() for record in self.view.records],
        }


def own_shards(spec: ParamSpec, shards: tuple[Layout, ...]) -> OwnShards:
    """The assignment in which every device reads its own shard of a parameter."""
    merged: list[int] = []
    first = 0
    for group in spec.groups:
        merged.append(math.prod(shards[0].shape[first : first + len(group)]))
        first += len(group)
    return OwnShards(shards, tuple(merged))


def with_reads(
    params: Sequence[ParamPlan], topology: Topology, costs: ReadCosts
) -> tuple[ParamPlan, ...]:
    """The parameters with the read assignments that take the least time.

    Args:
      params: planned so that every device reads its own shard.
      topology: the mesh.
      costs: of the storage that they are read from.
    """
    chosen: dict[Hashable, ReadAssignment] = {}  # identical layers share their shards
    for param in params:
        if param.kind not in chosen:
            own, size = own_shards(param.spec, param.shards), param.spec.split_size()
            itemsize = param.source_dtype.itemsize
            chosen[param.kind] = assign_reads(own, size, itemsize, topology, costs)
    return tuple(replace(param, assignment=chosen[param.kind]) for param in params)


def dtype_changes(params: Iterable[ParamPlan]) -> dict[str, int]:
    """How many parameters change their dtype, by "from → to"."""
    changed = (p for p in params if p.source_dtype != p.dtype)
    return dict(Counter(f"{p.source_dtype.name} → {p.dtype.name}" for p in changed))


def _is_transposed(piece: Piece) -> bool:
    """Whether neighbors in the file are no longer neighbors along the last axis."""
    strides = _moving_strides(piece)
    return bool(strides) and strides[-1] != min(strides)


def _is_regrouped(piece: Piece) -> bool:
    """Whether the slower axes are in another order than in the file."""
    strides = _moving_strides(piece)
    slower = [stride for stride in strides if stride != min(strides)]
    return slower != sorted(slower, reverse=True)


def _moving_strides(piece: Piece) -> list[int]:
    """Strides of the axes along which the position in the file changes; none for zeros."""
    return [s for n, s in zip(piece.shape, piece.strides, strict=True) if n > 1 and s]
