"""The load plan as data: everything that will be read and where it will go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from jax.sharding import Mesh

from mtj_loader.display import counted, show_bytes
from mtj_loader.dtypes import BITS
from mtj_loader.errors import CheckpointError
from mtj_loader.formats.checkpoint import Checkpoint
from mtj_loader.lora.adapter import Adapter
from mtj_loader.lora.low_rank import BaseWeightCopy, LowRank
from mtj_loader.models.config import ModelConfig
from mtj_loader.names import group_by
from mtj_loader.options import LoadOptions
from mtj_loader.planning.param_plan import ParamPlan
from mtj_loader.planning.topology import Topology
from mtj_loader.storage.base import Storage
from mtj_loader.weights.copies import distinct_layouts, elements_by_source
from mtj_loader.weights.resolve import Comparison
from mtj_loader.weights.weight_map import WeightMap


@dataclass(frozen=True)
class PlanData:
    """A checkpoint, a model and a mesh brought together.

    Attributes:
      checkpoint: what is read.
      weight_map: which tensor fills which parameter.
      hf_config: config.json, normalized.
      config: the model.
      topology: the mesh, as dp × mp positions and their hosts.
      options: what the caller chose. `adapters` below are those that are merged.
      params: every parameter, in file order.
      comparisons: tied copies that are compared while loading.
      skipped: tensors that the map lists as not needed.
      unmapped: tensors that are not in the map (only with allow_unmapped).
      mesh: the devices that the plan was made for, if they were given.
      adapters: the adapters that are added to the weights.
      base_weights: copies of base weights in the adapters; they are compared.
      notices: findings of the planner that are not errors.
      notes: what else is worth knowing.
    """

    checkpoint: Checkpoint
    weight_map: WeightMap
    hf_config: Mapping[str, object]
    config: ModelConfig
    topology: Topology
    options: LoadOptions
    params: tuple[ParamPlan, ...]
    comparisons: tuple[Comparison, ...]
    skipped: tuple[str, ...]
    unmapped: tuple[str, ...]
    mesh: Mesh | None = None
    adapters: tuple[Adapter, ...] = ()
    base_weights: tuple[BaseWeightCopy, ...] = ()
    notices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """The model's family."""
        return self.config.model_type

    @property
    def map_file(self) -> str:
        """The weight map's file."""
        return self.weight_map.file

    @property
    def has_weights(self) -> bool:
        """Whether there is anything to load; otherwise the plan is that of config.json alone."""
        return bool(self.checkpoint.index.records)

    def check_weights(self) -> None:
        """Raises CheckpointError if there are no weights."""
        if not self.has_weights:
            what = "the plan was made without weights, from config.json alone"
            raise CheckpointError(what, file=self.checkpoint.location)

    @property
    def headline(self) -> str:
        """What is loaded, in one line."""
        arrays, held = counted(len(self.params), "array"), show_bytes(self.device_bytes)
        return (
            f"{self.model_type} from {self.checkpoint.location} on {self.topology}: "
            f"{arrays}, {held} on each device"
        )

    @property
    def as_read(self) -> Self:
        """The plan to read the parameters that adapters are added to; see `ParamPlan.as_read`."""
        params = tuple(param.as_read for param in self.params)
        return replace(self, params=params, adapters=(), base_weights=())

    @property
    def without_adapters(self) -> Self:
        """The plan of the checkpoint alone."""
        params = tuple(replace(param, terms=()) for param in self.params)
        return replace(self, params=params, adapters=(), base_weights=())

    @property
    def without_exchange(self) -> Self:
        """The plan for hosts that exchange nothing: each reads all that its devices hold."""
        return replace(self, params=tuple(param.without_exchange for param in self.params))

    @property
    def is_exchanged(self) -> bool:
        """Whether hosts read for each other."""
        return any(param.assignment.is_shared for param in self.params)

    @property
    def adapted(self) -> tuple[ParamPlan, ...]:
        """The parameters that adapters change."""
        return tuple(param for param in self.params if param.terms)

    @property
    def storages(self) -> tuple[Storage, ...]:
        """The storages that are read: the checkpoint's, then each adapter's."""
        return self.checkpoint.storage, *(adapter.storage for adapter in self.adapters)

    @property
    def shards(self) -> int:
        """n, the size of the mesh axis `mp`."""
        return self.topology.mp

    def host_bytes(self, host: int) -> int:
        """Bytes of weights that one host has to read; process 0 also compares tied copies."""
        device_indices = self.topology.device_indices_of(host)
        weights = sum(n * param.source_bytes(device_indices) for param, n in self._kinds)
        compared = self._comparison_bytes if host == self.topology.host_ids[0] else 0
        return weights + self.adapter_bytes(host) + compared

    def adapter_bytes(self, host: int) -> int:
        """Bytes of adapters' factors that one host has to read."""
        numbers = self.topology.shards_of(host)
        terms = (term for param in self.adapted for term in param.terms)
        return sum(_factor_bytes(term, self.shards, numbers) for term in terms)

    def received_bytes(self, host: int) -> int:
        """Bytes of weights that one host's devices receive from the hosts that read them."""
        device_indices = self.topology.device_indices_of(host)
        return sum(n * param.received_bytes(device_indices) for param, n in self._kinds)

    @cached_property
    def bytes_of_hosts(self) -> dict[int, int]:
        """`host_bytes` of every host in the mesh."""
        return {host: self.host_bytes(host) for host in self.topology.host_ids}

    @cached_property
    def _kinds(self) -> list[tuple[ParamPlan, int]]:
        """One parameter of each `ParamPlan.kind`, and how many there are."""
        kinds = group_by(self.params, lambda param: param.kind)
        return [(params[0], len(params)) for params in kinds]

    @property
    def _comparison_bytes(self) -> int:
        pairs = (*self.comparisons, *self.base_weights)
        return sum(pair.copy.size_bytes + pair.original.size_bytes for pair in pairs)

    @cached_property
    def device_bytes(self) -> int:
        """Bytes of parameters on each device; they are the same on all."""
        return sum(param.shard_bytes for param in self.params)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Findings that are not errors, of the checkpoint and of the planner."""
        unmapped = [f"skipped {name}: it is not in the weight map" for name in self.unmapped]
        return (*self.checkpoint.index.warnings, *self.notices, *unmapped)


def _factor_bytes(term: LowRank, shards: int, numbers: Sequence[int]) -> int:
    """Bytes of a term's factors that some shards need, each distinct part once."""
    total = 0
    for view, spec in term.factors:
        for layout in distinct_layouts(view.layout, spec, shards, numbers):
            for source, count in elements_by_source(layout).items():
                total += count * BITS[view.records[source].dtype] // 8
    return total
