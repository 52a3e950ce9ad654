"""A sorting network as a loop.

For rows of 50,000 numbers it is twice as fast on CPUs as XLA's sort, and it adds little to the time
that programs take to compile for TPUs, where XLA's sort adds several seconds.

Axes: b rows, V numbers in a row, N = V rounded up to a power of 2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_State = tuple[jax.Array, jax.Array, jax.Array]


def sort_descending(x: jax.Array) -> jax.Array:
    """Each row from the largest to the smallest number, float32 [b, V], by bitonic sorting.

    Batcher 1968, "Sorting networks and their applications". log2(N) · (log2(N) + 1) / 2 passes.
    """
    size = x.shape[1]
    padded_size = 1 << (size - 1).bit_length()
    places = jnp.arange(padded_size)

    def exchange(state: _State) -> _State:
        """Compares numbers `distance` apart; directions alternate between blocks."""
        x, block, distance = state
        is_first = (places & distance) == 0
        other = jnp.where(is_first, jnp.roll(x, -distance, axis=1), jnp.roll(x, distance, axis=1))
        takes_larger = is_first == ((places & block) == 0)
        x = jnp.where(takes_larger, jnp.maximum(x, other), jnp.minimum(x, other))
        block = jnp.where(distance == 1, 2 * block, block)
        return x, block, jnp.where(distance == 1, block // 2, distance // 2)

    padded = jnp.pad(x, ((0, 0), (0, padded_size - size)), constant_values=-jnp.inf)
    start = padded, jnp.int32(2), jnp.int32(1)
    sorted_rows, *_ = jax.lax.while_loop(lambda state: state[1] <= padded_size, exchange, start)
    return sorted_rows[:, :size]
