"""Finished buffers onto their devices, and single-device arrays together into sharded ones."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtj_loader.loading import blocks
from mtj_loader.loading.buffers import Buffers, Device, device_refusals
from mtj_loader.loading.jobs import Batch, Job
from mtj_loader.loading.plan import LoadPlan, ParamPlan

Params = dict[str, dict[str, jax.Array]]


class Placer:
    """Collects the shards of one host's devices.

    Args:
      plan: what is loaded.
      mesh: the devices; axes dp and mp, Auto.
      host: this process.
      buffers: the memory policy.
    """

    def __init__(self, plan: LoadPlan, mesh: Mesh, host: int, buffers: Buffers) -> None:
        self.plan, self.buffers = plan, buffers
        self.sharding = NamedSharding(mesh, PartitionSpec("mp"))
        self.devices = [
            (j, device)
            for row in mesh.devices
            for j, device in enumerate(row)
            if device.process_index == host
        ]
        self._arrays: dict[tuple[str, str], jax.Array] = {}
        self._shards: dict[tuple[str, str], dict[Device, jax.Array]] = {}

    def place(self, batch: Batch) -> None:
        """Hands a batch to the devices; its memory is free afterwards."""
        whole = [job for job in batch.jobs if self._is_whole(job)]
        with device_refusals():
            arrays = jax.block_until_ready([self._sharded(job) for job in whole])
        self._arrays |= zip(map(_key, whole), arrays, strict=True)
        parts = [job for job in batch.jobs if not self._is_whole(job)]
        found = [(job, *piece) for job in parts for piece in self._pieces(job)]
        placed = self.buffers.put([array for _, array, _ in found], [d for _, _, d in found])
        self.buffers.give_back(batch.memory)
        for (job, _, device), array in zip(found, placed, strict=True):
            self._keep(job, device, array)

    def params(self) -> Params:
        """The sharded arrays: `params[module][param]`."""
        tree: Params = {}
        for param in sorted(self.plan.params, key=lambda p: (p.spec.path, p.spec.param)):
            key = (param.spec.path, param.spec.param)
            array = self._arrays[key] if key in self._arrays else self._joined(param)
            tree.setdefault(param.spec.path, {})[param.spec.param] = array
        return tree

    def _is_whole(self, job: Job) -> bool:
        """Whether a job has all that this host's devices hold of its parameter."""
        owned = {j for owners in job.shards.values() for j in owners}
        return job.corner is None and all(j in owned for j, _ in self.devices)

    def _sharded(self, job: Job) -> jax.Array:
        """A whole parameter in one call; a put per device takes four times as long."""
        of_shard = self._of_shard(job)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX asks with the slices of the array that a device holds
            return of_shard[index[0].start or 0]

        shape = job.plan.spec.array_shape(self.plan.shards)
        return jax.make_array_from_callback(shape, self.sharding, shard)

    def _joined(self, param: ParamPlan) -> jax.Array:
        """A parameter whose shards came one by one."""
        shards = self._shards[param.spec.path, param.spec.param]
        return jax.make_array_from_single_device_arrays(
            param.spec.array_shape(self.plan.shards),
            self.sharding,
            [shards[device] for _, device in self.devices],
        )

    def _of_shard(self, job: Job) -> dict[int, np.ndarray]:
        """Shard number → its buffer, in the shape that devices hold."""
        found = {}
        for target, (layout, owners) in zip(job.targets, job.shards.items(), strict=True):
            shape = self._shape(job) if job.corner is None else layout.shape
            found |= dict.fromkeys(owners, target.reshape(shape))
        return found

    def _pieces(self, job: Job) -> Iterator[tuple[np.ndarray, Device]]:
        """Every buffer of a job with each device it belongs on."""
        of_shard = self._of_shard(job)
        for j, device in self.devices:
            if j in of_shard:
                yield of_shard[j], device

    def _keep(self, job: Job, device: Device, array: jax.Array) -> None:
        """Files a shard under its parameter, or writes a block into the shard it is part of."""
        mine = self._shards.setdefault(_key(job), {})
        if job.corner is None:
            mine[device] = array
            return
        whole = mine.get(device)
        if whole is None:
            whole = blocks.empty(self._shape(job), job.plan.dtype, device)
        mine[device] = blocks.write(whole, array, job.corner, job.plan.shards[0].shape)

    def _shape(self, job: Job) -> tuple[int, ...]:
        """A shard as its device holds it."""
        return (1, *job.plan.spec.shard_shape(self.plan.shards))


def _key(job: Job) -> tuple[str, str]:
    return job.plan.spec.path, job.plan.spec.param
