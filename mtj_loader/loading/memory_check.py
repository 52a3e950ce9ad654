"""Is there room for what a plan promises? Asked before a byte of weights is read.

Devices that count their memory are asked themselves. Virtual CPU devices share the machine's: its
free memory, a container's limit and the process's own limit of address space all bound it. Only
what is known to be needed counts, so that nothing is refused that would work.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from mtj_loader.display import counted, show_bytes
from mtj_loader.errors import DeviceError, MemoryLimitError
from mtj_loader.loading.buffers import Device, aligned
from mtj_loader.loading.free_memory import available
from mtj_loader.models import usable_shards
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.tpu_fit import device_bytes


def check_memory(plan: LoadPlan, mesh: Mesh) -> None:
    """Compares what this process's devices have free with what they are to hold.

    Args:
      plan: without its adapters, which are added when the rest is in place.
      mesh: the devices.

    Raises:
      DeviceError: a device has too little free.
      MemoryLimitError: the machine has, for CPU devices.
    """
    host = jax.process_index()
    local = [device for device in mesh.devices.flat if device.process_index == host]
    if local and local[0].platform == "cpu":
        _check_machine(plan, host)
        return
    for device in local:
        _check_device(plan, device)


def adopted_bytes(plan: LoadPlan, host: int) -> int:
    """Memory that a host's CPU devices take.

    Each adopts the buffer that was read into, so devices that hold equal shards share one: replicas
    over dp, and all shards of a parameter that is not split. After an exchange each has its own.
    """
    device_indices = plan.topology.device_indices_of(host)
    return sum(
        param.reads.final_buffers(device_indices) * aligned(param.shard_bytes)
        for param in plan.params
    )


def _check_device(plan: LoadPlan, device: Device) -> None:
    """Raises DeviceError if a device says that it has too little."""
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # a backend that does not count
        return
    if "bytes_limit" not in stats:
        return
    free_bytes = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if plan.device_bytes > free_bytes:
        raise DeviceError(
            "the parameters do not fit on a device",
            expected=f"{show_bytes(plan.device_bytes)} free on each",
            found=f"{show_bytes(free_bytes)} on {device}",
            hint=_smaller(plan, free_bytes),
        )


def _check_machine(plan: LoadPlan, host: int) -> None:
    """Raises MemoryLimitError if the machine, or a limit on it, leaves too little."""
    needed = adopted_bytes(plan, host)
    limit, free_bytes = min(available(), key=lambda found: found[1], default=("", needed))
    if needed > free_bytes:
        devices = counted(sum(row.count(host) for row in plan.topology.hosts), "CPU device")
        raise MemoryLimitError(
            "the parameters do not fit into the memory that this process can have",
            expected=f"{show_bytes(needed)} for {devices}, which share it",
            found=f"{show_bytes(free_bytes)} within {limit}",
            hint=_narrower(plan) or "more hosts, or a smaller model",
        )


def _smaller(plan: LoadPlan, free_bytes: int) -> str:
    """What would make the parameters of a device fit."""
    for shards in usable_shards(plan.config, plan.config.n_heads):
        if shards > plan.shards and (held := device_bytes(plan, shards)) <= free_bytes:
            more = f"mp={shards} takes {show_bytes(held)} on each device"
            return f"{more}; {narrower}" if (narrower := _narrower(plan)) else more
    return _narrower(plan) or "a smaller model, or devices with more memory"


def _narrower(plan: LoadPlan) -> str | None:
    wide = plan.options.dtype == "float32"
    return "dtype bfloat16 takes half" if wide else None
