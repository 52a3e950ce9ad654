"""How large an engine may be in the memory that is free.

Contexts may be as long as the user asks for. Without a check, JAX would fail in the middle of a
request, or the kernel would end the process.
"""

from __future__ import annotations

from typing import Any

import jax

from mtj_loader.display import show_bytes
from mtj_loader.engine.device import Extends
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import MemoryLimitError
from mtj_loader.loading.memory_check import free_device_bytes
from mtj_loader.loading.process_memory import available
from mtj_loader.models.layers.attend import BLOCK

# Per device. For less, asking for the free memory takes longer than it saves.
_UNCHECKED_BYTES = 64 << 20

_SHARE = 0.9  # of the free memory; the rest is for programs and their temporaries
_DEFAULT_SLOTS = 16  # of each group; more gain little throughput for a handful of writers
_LEAST_CONTEXT = 2048  # of a slot, before there are more slots


Room = tuple[str, int | None]  # the name of a limit, and the bytes left within it if known


def check_cache(forward: Extends, sizes: Sizes, room: Room | None = None) -> None:
    """Compares an engine's cache with the free memory.

    Args:
      forward: the model.
      sizes: of the engine.
      room: for the cache; by default the free memory.

    Raises:
      MemoryLimitError: the cache alone needs more than there is.
    """
    needed = _cache_bytes(forward, sizes)
    if needed < _UNCHECKED_BYTES:
        return
    limit, free_bytes = free_memory(forward) if room is None else room
    if free_bytes is not None and needed > free_bytes:
        slots, length = sizes.slots, sizes.cache_length(BLOCK)
        raise MemoryLimitError(
            "the KV cache does not fit into memory",
            expected=f"{show_bytes(needed)} for {slots:,} x {length:,} tokens on each device",
            found=f"{show_bytes(free_bytes)} within {limit}",
            hint="use fewer prompts at a time, or a smaller max_new_tokens or context_length",
        )


def choose_sizes(
    forward: Extends,
    max_context: int,
    slots: int | None,
    context: int | None,
    room: Room | None = None,
) -> Sizes:
    """The sizes that fit into the free memory, for a server.

    The context is the model's, or the longest that fits; then there are up to 16 slots.

    Args:
      forward: the model; its parameters are loaded, unless `room` is given.
      max_context: the longest that it allows.
      slots: of all groups; None to choose.
      context: tokens of each slot; None to choose.
      room: for the cache; by default the free memory.

    Raises:
      MemoryLimitError: not even the smallest cache fits.
    """
    groups = forward.mesh.shape["dp"]
    per_group = None if slots is None else -(-slots // groups)
    room = free_memory(forward) if room is None else room
    _, free_bytes = room
    if context is None:
        context = max_context
        while context > _LEAST_CONTEXT and not _fits(
            forward, Sizes(groups, per_group or 1, context), free_bytes
        ):
            context = max(_LEAST_CONTEXT, context // 2)
    if per_group is None:
        options = [n for n in Sizes(groups, _DEFAULT_SLOTS, context).widths if n > 1]
        fitting = [n for n in options if _fits(forward, Sizes(groups, n, context), free_bytes)]
        per_group = max(fitting, default=1)
    sizes = Sizes(groups, per_group, context)
    check_cache(forward, sizes, room)
    return sizes


def default_limit(forward: Extends, max_context: int) -> Sizes:
    """How far an engine grows that was given no sizes."""
    return Sizes(forward.mesh.shape["dp"], _DEFAULT_SLOTS, max_context)


def _fits(forward: Extends, sizes: Sizes, free_bytes: int | None) -> bool:
    return free_bytes is None or _cache_bytes(forward, sizes) <= _SHARE * free_bytes


def _cache_bytes(forward: Extends, sizes: Sizes) -> int:
    """Bytes of the cache on each device; on CPUs, which share their memory, of all devices."""
    mesh = forward.mesh
    per_token = forward.config.cache_bytes_per_token(mesh.shape["mp"], forward.dtype)
    needed = sizes.slots * sizes.cache_length(BLOCK) * per_token
    local = _local_devices(forward)
    return needed * len(local) if local and local[0].platform == "cpu" else needed


def free_memory(forward: Extends) -> Room:
    """The name of the tightest limit and the bytes left within it; None if nothing is known."""
    local = _local_devices(forward)
    if local and local[0].platform == "cpu":
        limits = list(available())
    else:
        limits = [(str(d), free) for d in local if (free := free_device_bytes(d)) is not None]
    return min(limits, key=lambda found: found[1], default=("", None))


def _local_devices(forward: Extends) -> list[Any]:
    return [d for d in forward.mesh.devices.flat if d.process_index == jax.process_index()]
