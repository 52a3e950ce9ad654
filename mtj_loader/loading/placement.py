"""Transfers buffers to their devices, and combines single-device arrays into sharded ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mtj_loader.loading.buffers import Buffers, Device, device_errors
from mtj_loader.loading.schedule import Batch, Target
from mtj_loader.planning.assignments import ReadAssignment
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan

Params = dict[str, dict[str, jax.Array]]


class Placer:
    """Collects the blocks that one host's devices read; see `assignments`.

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
        self._shardings: dict[ReadAssignment, NamedSharding] = {}
        self._arrays: dict[tuple[str, str], jax.Array] = {}
        self._blocks: dict[tuple[str, str], dict[Device, jax.Array]] = {}

    def place(self, batch: Batch) -> None:
        """Transfers a batch to the devices and releases its memory."""
        filled = list(zip(batch.targets, batch.buffers, strict=True))
        whole = [(target, buffer) for target, buffer in filled if target.is_whole]
        with device_errors():
            arrays = jax.block_until_ready([self._make_array(*one) for one in whole])
        self._arrays |= zip((_key(target.param) for target, _ in whole), arrays, strict=True)
        parts = [
            (target, part, device)
            for target, buffer in filled
            if not target.is_whole
            for part, device in self._parts(target, buffer)
        ]
        devices = [device for _, _, device in parts]
        on_devices = self._buffers.put([part for _, part, _ in parts], devices)
        self._buffers.release(batch.memory)
        for (target, _, device), array in zip(parts, on_devices, strict=True):
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
        self._blocks.clear()

    def _make_array(self, target: Target, buffer: np.ndarray) -> jax.Array:
        """A whole parameter in one call; one call per device takes four times as long."""
        assignment, blocks = target.param.assignment, _split_buffer(target, buffer)

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX passes the slices of the array that a device holds
            return blocks[assignment.block_at(index)]

        return jax.make_array_from_callback(
            assignment.array_shape, self._sharding(assignment), block
        )

    def _combine(self, param: ParamPlan) -> jax.Array:
        """A parameter whose blocks were transferred one by one."""
        blocks, assignment = self._blocks[_key(param)], param.assignment
        return jax.make_array_from_single_device_arrays(
            assignment.array_shape,
            self._sharding(assignment),
            [blocks[device] for _, device in self._devices],
        )

    def _parts(self, target: Target, buffer: np.ndarray) -> Iterator[tuple[np.ndarray, Device]]:
        """Each block or section in a buffer with each device that reads it."""
        parts = _split_buffer(target, buffer)
        for device_index, device in self._devices:
            block = target.param.assignment.block_of_device(device_index)
            if block in parts:
                yield parts[block], device

    def _store(self, target: Target, device: Device, array: jax.Array) -> None:
        """Stores a block of a parameter, or writes a section into its block."""
        blocks = self._blocks.setdefault(_key(target.param), {})
        if target.corner is None:
            blocks[device] = array
            return
        assignment = target.param.assignment
        block = blocks.get(device)
        if block is None:
            block = jnp.zeros(assignment.block_shape, target.param.dtype, device=device)
        blocks[device] = _write_section(block, array, target.corner, assignment.layout_shape)

    def _sharding(self, assignment: ReadAssignment) -> NamedSharding:
        """The sharding of parameters as they are read, made once for each assignment."""
        if assignment not in self._shardings:
            self._shardings[assignment] = assignment.sharding(self._mesh)
        return self._shardings[assignment]


def _split_buffer(target: Target, buffer: np.ndarray) -> dict[int, np.ndarray]:
    """The number of each block → its part of a buffer, in the shape on the devices."""
    found: dict[int, np.ndarray] = {}
    for flat, (layout, blocks) in zip(target.split(buffer), target.layouts.items(), strict=True):
        is_section = target.corner is not None
        shape = layout.shape if is_section else target.param.assignment.block_shape
        found |= dict.fromkeys(blocks, flat.reshape(shape))
    return found


def _key(param: ParamPlan) -> tuple[str, str]:
    return param.spec.path, param.spec.param


@partial(jax.jit, donate_argnums=0, static_argnums=3)  # in place, so that the block exists once
def _write_section(
    block: jax.Array, section: jax.Array, corner: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
    """`block` with one section of it replaced.

    Args:
      block: in its shape on the device, in which axes may be merged; donated.
      section: the new section.
      corner: the position of the section's first element, in `shape`.
      shape: the block's shape without merged axes.
    """
    unmerged = block.reshape(shape)
    return jax.lax.dynamic_update_slice(unmerged, section, corner).reshape(block.shape)
