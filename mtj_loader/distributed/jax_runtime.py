"""JAX's distributed runtime: the private names that this package needs, all in one place.

JAX has no public access to the key-value store that its processes share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax._src import distributed

from mtj_loader.errors import UsageError


class Runtime(NamedTuple):
    """The distributed runtime of this process.

    Attributes:
      client: JAX's client of the key-value store; it has no type annotations.
      process_id: this process, from 0.
      num_processes: the number of processes.
    """

    client: Any
    process_id: int
    num_processes: int


def find_runtime() -> Runtime | None:
    """Returns the runtime that connects this process to others, or None if it is the only one.

    Raises:
      UsageError: there are several processes, but `jax.distributed.initialize` was not called.
    """
    if not jax.distributed.is_initialized():
        if (count := jax.process_count()) > 1:
            raise UsageError(
                f"{count} processes share these devices but are not connected to each other",
                hint="call jax.distributed.initialize() before anything else asks for devices",
            )
        return None
    # Not jax.process_count(), which starts the devices and so waits for those of all other hosts.
    state = distributed.global_state
    if state.num_processes == 1:
        return None
    return Runtime(state.client, state.process_id, state.num_processes)
