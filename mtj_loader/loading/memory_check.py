"""Checks before any weights are read that the parameters fit into memory.

Accelerators report their own free memory. CPU devices share the machine's memory, which is limited
by what is free, by a container's limit and by the address space limit of the process. Only memory
that is certainly needed counts, so that no load is rejected that would succeed.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from mtj_loader.display import counted, show_bytes
from mtj_loader.errors import DeviceError, MemoryLimitError
from mtj_loader.loading.buffers import Device, align
from mtj_loader.loading.process_memory import available
from mtj_loader.models import usable_shards
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.tpu_fit import device_bytes


def check_memory(plan: LoadPlan, mesh: Mesh) -> None:
    """Compares the free memory of this process's devices with the size of the parameters.

    Args:
      plan: without its adapters, which are merged after the load.
      mesh: the devices.

    Raises:
      DeviceError: a device has too little free memory.
      MemoryLimitError: the devices are CPU devices, and the machine has too little.
    """
    host = jax.process_index()
    local = [device for device in mesh.devices.flat if device.process_index == host]
    if local and local[0].platform == "cpu":
        _check_machine(plan, host)
        return
    for device in local:
        _check_device(plan, device)


def adopted_bytes(plan: LoadPlan, host: int) -> int:
    """Memory for the parameters on a host's CPU devices.

    A device adopts the buffer that its shard was read into. Devices with equal shards share it:
    replicas over dp, and all shards of a parameter that is not split. After an exchange each device
    has its own.
    """
    device_indices = plan.topology.device_indices_of(host)
    return sum(
        param.assignment.final_buffers(device_indices) * align(param.shard_bytes)
        for param in plan.params
    )


def free_device_bytes(device: Device) -> int | None:
    """The free memory that an accelerator reports, if it does."""
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # this backend does not report memory
        return None
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)


def _check_device(plan: LoadPlan, device: Device) -> None:
    """Raises DeviceError if a device reports too little free memory."""
    free_bytes = free_device_bytes(device)
    if free_bytes is not None and plan.device_bytes > free_bytes:
        raise DeviceError(
            "the parameters do not fit on a device",
            expected=f"{show_bytes(plan.device_bytes)} free on each",
            found=f"{show_bytes(free_bytes)} on {device}",
            hint=_how_to_fit(plan, free_bytes),
        )


def _check_machine(plan: LoadPlan, host: int) -> None:
    """Raises MemoryLimitError if the machine or a limit leaves too little memory."""
    needed = adopted_bytes(plan, host)
    limit, free_bytes = min(available(), key=lambda found: found[1], default=("", needed))
    if needed > free_bytes:
        devices = counted(sum(row.count(host) for row in plan.topology.hosts), "CPU device")
        raise MemoryLimitError(
            "the parameters do not fit into the memory available to this process",
            expected=f"{show_bytes(needed)} for {devices}, which share it",
            found=f"{show_bytes(free_bytes)} within {limit}",
            hint=_smaller_dtype(plan) or "use more hosts or a smaller model",
        )


def _how_to_fit(plan: LoadPlan, free_bytes: int) -> str:
    """What would make the parameters fit on a device."""
    for shards in usable_shards(plan.config, plan.config.n_heads):
        if shards > plan.shards and (held := device_bytes(plan, shards)) <= free_bytes:
            more = f"mp={shards} takes {show_bytes(held)} on each device"
            return f"{more}; {narrower}" if (narrower := _smaller_dtype(plan)) else more
    return _smaller_dtype(plan) or "use a smaller model, or devices with more memory"


def _smaller_dtype(plan: LoadPlan) -> str | None:
    return "dtype bfloat16 takes half" if plan.options.dtype == "float32" else None
