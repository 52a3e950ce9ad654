"""The load plan: everything that will be read and where it will go, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from jax.sharding import Mesh

from mtj_loader.dtypes import BITS
from mtj_loader.formats.checkpoint import Checkpoint
from mtj_loader.lora.adapter import Adapter
from mtj_loader.lora.low_rank import CarriedCopy, LowRank
from mtj_loader.models.config import ModelConfig
from mtj_loader.parameters import ParamSpec
from mtj_loader.planning import plan_json, summary
from mtj_loader.planning.read_assignment import ReadAssignment
from mtj_loader.planning.topology import Topology
from mtj_loader.storage.base import Storage
from mtj_loader.weights.copies import distinct_layouts, elements_by_source, source_elements
from mtj_loader.weights.resolve import Comparison
from mtj_loader.weights.view import Layout, View


@dataclass(frozen=True)
class LoadOptions:
    """What a caller chooses; see `mtj_loader.load`."""

    dtype: str = "auto"
    transposed_linear: bool = False
    expert_parallel: bool = False
    host_memory_bytes: int = 1 << 30
    check_finite: bool = False
    allow_unmapped: bool = False
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class ParamPlan:
    """One parameter on its way.

    Attributes:
      spec: the parameter.
      view: where its elements come from.
      shards: the layout of each of its n shards, one dimension for every axis of the spec; in a
        simulation (see `simulate`) only of those that one host holds.
      source_dtype: in the file.
      dtype: on the devices.
      divisor: what every element is divided by.
      terms: what adapters add to it.
      reading: how devices of several hosts share it out for reading; None where every device reads
        its own shard.
    """

    spec: ParamSpec
    view: View
    shards: tuple[Layout, ...]
    source_dtype: np.dtype
    dtype: np.dtype
    divisor: int
    terms: tuple[LowRank, ...] = ()
    reading: ReadAssignment | None = None

    @property
    def base(self) -> ParamPlan:
        """The same without its terms, in the file's dtype, so that their sum is rounded once."""
        return replace(self, dtype=self.source_dtype, terms=()) if self.terms else self

    @cached_property
    def shard_shape(self) -> tuple[int, ...]:
        """One shard as its device holds it, without the leading axis: merged axes are one."""
        sizes = iter(self.shards[0].shape)
        return tuple(math.prod(next(sizes) for _ in group) for group in self.spec.groups)

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of the `jax.Array`: [n, …]."""
        return (len(self.shards), *self.shard_shape)

    @property
    def shard_bytes(self) -> int:
        """What one shard takes on its device."""
        return self.shards[0].size * self.dtype.itemsize

    def number_at(self, device_index: int) -> int:
        """Which shard the device at a seat reads, or which block of `reading`."""
        return (
            device_index % len(self.shards)
            if self.reading is None
            else self.reading.number_at(device_index)
        )

    def distinct(self, device_indices: Sequence[int]) -> Mapping[Layout, Sequence[int]]:
        """The different layouts that devices at some seats read, and the numbers that share each.

        Seats are those of `Topology.seats_of`; for numbers see `number_at`.
        """
        numbers = tuple(dict.fromkeys(map(self.number_at, device_indices)))
        layout_of = self.shards.__getitem__ if self.reading is None else self.reading.block
        return _alike(numbers, tuple(map(layout_of, numbers)))

    def source_bytes(self, device_indices: Sequence[int]) -> int:
        """Bytes that devices at some seats have to read, each distinct layout once."""
        if self.reading is not None:
            return self.reading.read_elements(device_indices) * self.source_dtype.itemsize
        elements = sum(source_elements(layout) for layout in self.distinct(device_indices))
        return elements * self.source_dtype.itemsize

    def received_bytes(self, device_indices: Sequence[int]) -> int:
        """Bytes, as the file has them, that devices at some seats get from other hosts' devices."""
        if self.reading is None:
            return 0
        return self.reading.received_elements(device_indices) * self.source_dtype.itemsize


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint, a model and a mesh brought together.

    Attributes:
      checkpoint: what is read.
      model_type: the family.
      config: the model.
      map_file: the weight map that was applied.
      topology: the mesh, as dp × mp positions and their hosts.
      options: what the caller chose.
      params: every parameter, in file order.
      comparisons: tied copies that are compared while loading.
      skipped: tensors that the map names as not needed.
      unmapped: tensors that no entry of the map knows (only with allow_unmapped).
      mesh: the devices that were planned for, where they were given.
      adapters: what is added to the weights.
      carried: copies of base weights in the adapters, which are compared.
      noticed: what planning found strange and is no error.
    """

    checkpoint: Checkpoint
    model_type: str
    config: ModelConfig
    map_file: str
    topology: Topology
    options: LoadOptions
    params: tuple[ParamPlan, ...]
    comparisons: tuple[Comparison, ...]
    skipped: tuple[str, ...]
    unmapped: tuple[str, ...]
    mesh: Mesh | None = None
    adapters: tuple[Adapter, ...] = ()
    carried: tuple[CarriedCopy, ...] = ()
    noticed: tuple[str, ...] = ()

    @property
    def base(self) -> LoadPlan:
        """The plan without its adapters; see `ParamPlan.base`."""
        params = tuple(param.base for param in self.params)
        return replace(self, params=params, adapters=(), carried=())

    @property
    def unshared(self) -> LoadPlan:
        """The plan for hosts that exchange nothing: each reads all that its devices hold."""
        return replace(self, params=tuple(replace(param, reading=None) for param in self.params))

    @property
    def is_exchanged(self) -> bool:
        """Whether hosts read for each other."""
        return any(param.reading is not None for param in self.params)

    @property
    def adapted(self) -> tuple[ParamPlan, ...]:
        """The parameters that adapters change."""
        return tuple(param for param in self.params if param.terms)

    @property
    def storages(self) -> tuple[Storage, ...]:
        """Where bytes are read: of the checkpoint first, then of each adapter."""
        return self.checkpoint.storage, *(adapter.storage for adapter in self.adapters)

    @property
    def shards(self) -> int:
        """n, the size of the mesh axis `mp`."""
        return self.topology.mp

    def host_bytes(self, host: int) -> int:
        """Bytes of weights that one host needs to read; process 0 also compares tied copies."""
        device_indices = self.topology.device_indices_of(host)
        weights = sum(n * param.source_bytes(device_indices) for param, n in self._kinds)
        compared = self._comparison_bytes if host == self.topology.host_ids[0] else 0
        return weights + self.adapter_bytes(host) + compared

    def adapter_bytes(self, host: int) -> int:
        """Bytes of adapters' factors that one host needs to read."""
        numbers = self.topology.shards_of(host)
        terms = (term for param in self.adapted for term in param.terms)
        return sum(_factor_bytes(term, self.shards, numbers) for term in terms)

    def received_bytes(self, host: int) -> int:
        """Bytes of weights that one host's devices get from other hosts, which read them."""
        device_indices = self.topology.device_indices_of(host)
        return sum(n * param.received_bytes(device_indices) for param, n in self._kinds)

    @cached_property
    def bytes_of_hosts(self) -> dict[int, int]:
        """`host_bytes` of every host in the mesh."""
        return {host: self.host_bytes(host) for host in self.topology.host_ids}

    @cached_property
    def _kinds(self) -> list[tuple[ParamPlan, int]]:
        """One of each kind of parameters that are read alike, and how many; layers are alike."""
        alike: dict[tuple[int, np.dtype], list[ParamPlan]] = {}
        for param in self.params:
            alike.setdefault((id(param.shards), param.source_dtype), []).append(param)
        return [(params[0], len(params)) for params in alike.values()]

    @property
    def _comparison_bytes(self) -> int:
        pairs = (*self.comparisons, *self.carried)
        return sum(pair.copy.size_bytes + pair.original.size_bytes for pair in pairs)

    @cached_property
    def device_bytes(self) -> int:
        """Bytes of parameters on every device; all devices hold alike."""
        return sum(param.shard_bytes for param in self.params)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was noticed and is no error."""
        unmapped = [f"no entry of the map knows {name}; it was left out" for name in self.unmapped]
        return (*self.checkpoint.index.warnings, *self.noticed, *unmapped)

    def summary(self) -> str:
        """The plan for people: a table with the layers folded, and the totals."""
        return summary.summary(self)

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON types; docs/json.md describes them."""
        return plan_json.to_dict(self)


@lru_cache(maxsize=1024)  # kinds of parameters × hosts that one process plans for
def _alike(numbers: tuple[int, ...], layouts: tuple[Layout, ...]) -> Mapping[Layout, list[int]]:
    """The different ones of some layouts, each with the numbers of those that are equal."""
    groups: dict[Layout, list[int]] = {}
    for number, layout in zip(numbers, layouts, strict=True):
        groups.setdefault(layout, []).append(number)
    return groups


def _factor_bytes(term: LowRank, shards: int, numbers: Sequence[int]) -> int:
    """Bytes of a term's factors that some shards need, each distinct part once."""
    total = 0
    for view, spec in term.factors:
        for layout in distinct_layouts(view.layout, spec, shards, numbers):
            for source, count in elements_by_source(layout).items():
                total += count * BITS[view.records[source].dtype] // 8
    return total
