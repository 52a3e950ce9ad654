"""Finished buffers onto their devices, and single-device arrays together into sharded ones."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtj_loader.loading import blocks
from mtj_loader.loading.buffers import Buffers, Device
from mtj_loader.loading.jobs import Batch, Job
from mtj_loader.loading.plan import LoadPlan

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
        self._shards: dict[tuple[str, str], dict[Device, jax.Array]] = {}

    def place(self, batch: Batch) -> None:
        """Hands a batch to the devices in one call; its memory is free afterwards."""
        found = [(job, *piece) for job in batch.jobs for piece in self._pieces(job)]
        placed = self.buffers.put([array for _, array, _ in found], [d for _, _, d in found])
        self.buffers.give_back(batch.memory)
        for (job, _, device), array in zip(found, placed, strict=True):
            self._keep(job, device, array)

    def params(self) -> Params:
        """The sharded arrays: `params[module][param]`."""
        tree: Params = {}
        for param in sorted(self.plan.params, key=lambda p: (p.spec.path, p.spec.param)):
            shards = self._shards[param.spec.path, param.spec.param]
            tree.setdefault(param.spec.path, {})[param.spec.param] = (
                jax.make_array_from_single_device_arrays(
                    param.spec.array_shape(self.plan.shards),
                    self.sharding,
                    [shards[device] for _, device in self.devices],
                )
            )
        return tree

    def _pieces(self, job: Job) -> Iterator[tuple[np.ndarray, Device]]:
        """Every buffer of a job with each device it belongs on."""
        of_shard = {}
        for target, (layout, owners) in zip(job.targets, job.shards.items(), strict=True):
            shape = self._shape(job) if job.corner is None else layout.shape
            of_shard |= dict.fromkeys(owners, target.reshape(shape))
        for j, device in self.devices:
            if j in of_shard:
                yield of_shard[j], device

    def _keep(self, job: Job, device: Device, array: jax.Array) -> None:
        """Files a shard under its parameter, or writes a block into the shard it is part of."""
        mine = self._shards.setdefault((job.plan.spec.path, job.plan.spec.param), {})
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
