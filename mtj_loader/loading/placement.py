"""Transfers buffers to their devices, and combines single-device arrays into sharded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtj_loader.loading.buffers import Buffers, Device, device_errors
from mtj_loader.loading.schedule import Batch, Target
from mtj_loader.planning.assignments import ReadAssignment
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan

Params = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class _Placement:
    """Where arrays with the same read assignment are placed.

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
        self._plan, self._mesh, self._buffers = plan, mesh, buffers
        self._devices = [
            (device_index, device)
            for device_index, device in enumerate(mesh.devices.flat)
            if device.process_index == host
        ]
        self._placements: dict[ReadAssignment, _Placement] = {}
        self._arrays: dict[tuple[str, str], jax.Array] = {}
        self._shards: dict[tuple[str, str], dict[Device, jax.Array]] = {}

    def place(self, batch: Batch) -> None:
        """Transfers a batch to the devices and releases its memory."""
        filled = list(zip(batch.targets, batch.buffers, strict=True))
        whole = [(target, buffer) for target, buffer in filled if target.is_whole]
        with device_errors():
            arrays = jax.block_until_ready([self._make_array(*one) for one in whole])
        self._arrays |= zip((_key(target.param) for target, _ in whole), arrays, strict=True)
        parts = [
            (target, shard, device)
            for target, buffer in filled
            if not target.is_whole
            for shard, device in self._shards_of(target, buffer)
        ]
        devices = [device for _, _, device in parts]
        placed = self._buffers.put([shard for _, shard, _ in parts], devices)
        self._buffers.release(batch.memory)
        for (target, _, device), array in zip(parts, placed, strict=True):
            self._store(target, device, array)

    def params(self) -> Params:
        """The arrays as they were read: `params[module][param]`; see `reshard`."""
        tree: Params = {}
        for param in sorted(self._plan.params, key=_key):
            key = _key(param)
            array = self._arrays[key] if key in self._arrays else self._combine(param)
            tree.setdefault(param.spec.path, {})[param.spec.param] = array
        return tree

    def clear(self) -> None:
        """Drops all arrays."""
        self._arrays.clear()
        self._shards.clear()

    def _make_array(self, target: Target, buffer: np.ndarray) -> jax.Array:
        """A whole parameter in one call; one call per device takes four times as long."""
        by_number = _split_by_number(target, buffer)
        placement, shape = self._placement(target.param), target.param.assignment.array_shape

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX passes the slices of the array that a device holds
            return by_number[placement.number_of(index)]

        return jax.make_array_from_callback(shape, placement.sharding, shard)

    def _combine(self, param: ParamPlan) -> jax.Array:
        """A parameter whose shards were transferred one by one."""
        shards = self._shards[_key(param)]
        local = [shards[device] for _, device in self._devices]
        shape, sharding = param.assignment.array_shape, self._placement(param).sharding
        return jax.make_array_from_single_device_arrays(shape, sharding, local)

    def _shards_of(self, target: Target, buffer: np.ndarray) -> Iterator[tuple[np.ndarray, Device]]:
        """Each shard or block in a buffer with each device that reads it."""
        by_number = _split_by_number(target, buffer)
        for number, device in self._placement(target.param).devices:
            if number in by_number:
                yield by_number[number], device

    def _store(self, target: Target, device: Device, array: jax.Array) -> None:
        """Stores a shard of a parameter, or writes a block into its shard."""
        shards = self._shards.setdefault(_key(target.param), {})
        if target.corner is None:
            shards[device] = array
            return
        reads = target.param.assignment
        shard = shards.get(device)
        if shard is None:
            shard = jnp.zeros(reads.block_shape, target.param.dtype, device=device)
        shards[device] = _write_block(shard, array, target.corner, reads.layout_shape)

    def _placement(self, param: ParamPlan) -> _Placement:
        """Where a parameter is placed; parameters with the same read assignment share it."""
        reads = param.assignment
        if reads not in self._placements:
            self._placements[reads] = _Placement(
                reads.sharding(self._mesh),
                [(reads.number_at(index), device) for index, device in self._devices],
                reads.number_of,
            )
        return self._placements[reads]


def _split_by_number(target: Target, buffer: np.ndarray) -> dict[int, np.ndarray]:
    """The number of each shard or block → its part of a buffer, in the shape on the devices."""
    found: dict[int, np.ndarray] = {}
    for flat, (layout, numbers) in zip(target.split(buffer), target.shards.items(), strict=True):
        part = flat.reshape(
            target.param.assignment.block_shape if target.corner is None else layout.shape
        )
        found |= dict.fromkeys(numbers, part)
    return found


def _key(param: ParamPlan) -> tuple[str, str]:
    return param.spec.path, param.spec.param


@partial(jax.jit, donate_argnums=0, static_argnums=3)  # in place, so that the shard exists once
def _write_block(
    shard: jax.Array, block: jax.Array, corner: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
    """`shard` with one block of it replaced.

    Args:
      shard: in its shape on the device, in which axes may be merged; donated.
      block: the new block.
      corner: the position of the block's first element, in `shape`.
      shape: the shard's shape without merged axes.
    """
    unmerged = shard.reshape(shape)
    return jax.lax.dynamic_update_slice(unmerged, block, corner).reshape(shard.shape)


def abstract_params(plan: LoadPlan, mesh: Mesh) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes, dtypes and shardings of the loaded parameters."""
    sharding = NamedSharding(mesh, PartitionSpec("mp"))
    tree: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for param in plan.params:
        abstract = jax.ShapeDtypeStruct(param.array_shape, param.dtype, sharding=sharding)
        tree.setdefault(param.spec.path, {})[param.spec.param] = abstract
    return tree
