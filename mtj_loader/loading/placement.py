"""Finished buffers onto their devices, and single-device arrays together into sharded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtj_loader.loading import blocks
from mtj_loader.loading.buffers import Buffers, Device, device_refusals
from mtj_loader.loading.jobs import Batch, Job
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan
from mtj_loader.planning.read_assignment import ReadAssignment

Params = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class _Place:
    """Where arrays go that are read alike.

    Attributes:
      sharding: of the whole array.
      devices: this host's, each with the number of what it reads; see `ReadAssignment`.
      number_of: the same number, from the slices of the array that a device holds.
    """

    sharding: NamedSharding
    devices: list[tuple[int, Device]]
    number_of: Callable[[tuple[slice, ...]], int]


class Placer:
    """Collects the shards of one host's devices.

    Args:
      plan: what is loaded.
      mesh: the devices; axes dp and mp, Auto.
      host: this process.
      buffers: the memory policy.
    """

    def __init__(self, plan: LoadPlan, mesh: Mesh, host: int, buffers: Buffers) -> None:
        self.plan, self.mesh, self.buffers = plan, mesh, buffers
        device_indices = enumerate(mesh.devices.flat)
        self.devices = [
            (device_index, device)
            for device_index, device in device_indices
            if device.process_index == host
        ]
        self._places: dict[ReadAssignment, _Place] = {}
        self._arrays: dict[tuple[str, str], jax.Array] = {}
        self._shards: dict[tuple[str, str], dict[Device, jax.Array]] = {}

    def place(self, batch: Batch) -> None:
        """Hands a batch to the devices; its memory is free afterwards."""
        whole = [job for job in batch.jobs if job.is_whole]
        with device_refusals():
            arrays = jax.block_until_ready([self._sharded(job) for job in whole])
        self._arrays |= zip(map(_key, whole), arrays, strict=True)
        parts = [job for job in batch.jobs if not job.is_whole]
        found = [(job, *piece) for job in parts for piece in self._pieces(job)]
        placed = self.buffers.put([array for _, array, _ in found], [d for _, _, d in found])
        self.buffers.give_back(batch.memory)
        for (job, _, device), array in zip(found, placed, strict=True):
            self._keep(job, device, array)

    def params(self) -> Params:
        """The arrays as they were read: `params[module][param]`; see `exchange`."""
        tree: Params = {}
        for param in sorted(self.plan.params, key=lambda p: (p.spec.path, p.spec.param)):
            key = (param.spec.path, param.spec.param)
            array = self._arrays[key] if key in self._arrays else self._joined(param)
            tree.setdefault(param.spec.path, {})[param.spec.param] = array
        return tree

    def _sharded(self, job: Job) -> jax.Array:
        """A whole parameter in one call; a put per device takes four times as long."""
        of_shard = self._of_shard(job)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX asks with the slices of the array that a device holds
            return of_shard[place.number_of(index)]

        place, shape = self._place_of(job.plan), job.plan.reads.array_shape
        return jax.make_array_from_callback(shape, place.sharding, shard)

    def _joined(self, param: ParamPlan) -> jax.Array:
        """A parameter whose shards came one by one."""
        shards = self._shards[param.spec.path, param.spec.param]
        mine = [shards[device] for _, device in self.devices]
        sharding = self._place_of(param).sharding
        return jax.make_array_from_single_device_arrays(param.reads.array_shape, sharding, mine)

    def _of_shard(self, job: Job) -> dict[int, np.ndarray]:
        """Number of a shard, or of a block → its buffer, in the shape that devices hold."""
        of_device = job.plan.reads.block_shape
        found = {}
        for target, (layout, owners) in zip(job.targets, job.shards.items(), strict=True):
            part = target.reshape(of_device if job.corner is None else layout.shape)
            for number in owners:
                found[number] = part
        return found

    def _pieces(self, job: Job) -> Iterator[tuple[np.ndarray, Device]]:
        """Every buffer of a job with each device it belongs on."""
        of_shard = self._of_shard(job)
        for number, device in self._place_of(job.plan).devices:
            if number in of_shard:
                yield of_shard[number], device

    def _keep(self, job: Job, device: Device, array: jax.Array) -> None:
        """Files a shard under its parameter, or writes a block into the shard it is part of."""
        mine = self._shards.setdefault(_key(job), {})
        if job.corner is None:
            mine[device] = array
            return
        whole = mine.get(device)
        if whole is None:
            whole = blocks.empty(job.plan.reads.block_shape, job.plan.dtype, device)
        mine[device] = blocks.write(whole, array, job.corner, job.plan.reads.layout_shape)

    def _place_of(self, param: ParamPlan) -> _Place:
        """Where a parameter goes; those that are read alike go alike."""
        reads = param.reads
        if reads not in self._places:
            self._places[reads] = _Place(
                reads.sharding(self.mesh),
                [(reads.number_at(device_index), device) for device_index, device in self.devices],
                reads.number_of,
            )
        return self._places[reads]


def _key(job: Job) -> tuple[str, str]:
    return job.plan.spec.path, job.plan.spec.param


def abstract_params(plan: LoadPlan, mesh: Mesh) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """What `Placer.params` will give, as shapes, dtypes and shardings."""
    sharding = NamedSharding(mesh, PartitionSpec("mp"))
    tree: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for param in plan.params:
        found = jax.ShapeDtypeStruct(param.array_shape, param.dtype, sharding=sharding)
        tree.setdefault(param.spec.path, {})[param.spec.param] = found
    return tree
