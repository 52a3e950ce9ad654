"""Checks before a batch runs that its KV cache fits into memory.

Contexts may be as long as the user asks for. Without the check, JAX would fail in the middle of a
pass, or the kernel would end the process.
"""

from __future__ import annotations

import jax

from mtj_loader.display import show_bytes
from mtj_loader.errors import MemoryLimitError
from mtj_loader.generation.prompts import Shape
from mtj_loader.loading.memory_check import free_device_bytes
from mtj_loader.loading.process_memory import available
from mtj_loader.models.forward import Forward

# Per device. For less, asking for the free memory takes longer than it saves.
_UNCHECKED_BYTES = 64 << 20


def check_cache(forward: Forward, shape: Shape) -> None:
    """Compares the KV cache of a batch with the free memory.

    Raises:
      MemoryLimitError: the cache alone needs more than there is.
    """
    mesh = forward.mesh
    rows = shape.rows // mesh.shape["dp"]
    per_token = forward.config.cache_bytes_per_token(mesh.shape["mp"], forward.dtype)
    needed = rows * shape.cache * per_token  # on each device
    if needed < _UNCHECKED_BYTES:
        return
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if local and local[0].platform == "cpu":
        needed *= len(local)
        limits = list(available())
    else:
        limits = [(str(d), free) for d in local if (free := free_device_bytes(d)) is not None]
    limit, free_bytes = min(limits, key=lambda found: found[1], default=("", needed))
    if needed > free_bytes:
        raise MemoryLimitError(
            "the KV cache does not fit into memory",
            expected=f"{show_bytes(needed)} for {rows:,} x {shape.cache:,} tokens on each device",
            found=f"{show_bytes(free_bytes)} within {limit}",
            hint="use fewer prompts at a time or a smaller max_new_tokens",
        )
