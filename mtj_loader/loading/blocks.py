"""Shards that are larger than the staging memory: cut into blocks, put together on the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mtj_loader.loading.buffers import Device
from mtj_loader.weights.view import Layout


def cut(layout: Layout, most: int) -> Iterator[tuple[tuple[int, ...], Layout]]:
    """Blocks of at most `most` elements that tile a shard, each with its first corner.

    Cuts along the axis that is slowest in the file, so that the reads stay long.
    """
    origin = (0,) * len(layout.shape)
    if layout.size <= most or layout.size == 1:
        yield origin, layout
        return
    axis = _slowest_axis(layout)
    middle = layout.shape[axis] // 2
    for low, high in ((0, middle), (middle, layout.shape[axis])):
        start = (*origin[:axis], low, *origin[axis + 1 :])
        stop = (*layout.shape[:axis], high, *layout.shape[axis + 1 :])
        for inner, block in cut(layout.slice(start, stop), most):
            yield tuple(a + b for a, b in zip(start, inner, strict=True)), block


def _slowest_axis(layout: Layout) -> int:
    """The axis longer than 1 along which neighbors lie farthest apart in the file."""
    widest = max(layout.pieces, key=lambda piece: max(piece.strides, default=0))
    long = [axis for axis, size in enumerate(layout.shape) if size > 1]
    return max(long, key=lambda axis: widest.strides[axis])


def empty(shape: tuple[int, ...], dtype: np.dtype, device: Device) -> jax.Array:
    """Memory on the device that blocks are written into."""
    return jnp.zeros(shape, dtype, device=device)


@partial(jax.jit, donate_argnums=0, static_argnums=3)  # in place: the shard is there once
def write(
    whole: jax.Array, block: jax.Array, corner: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
    """`whole` with one block in its place.

    Args:
      whole: the shard as the device holds it; donated.
      block: part of it.
      corner: where the part begins, in `shape`.
      shape: the shard's shape with all of its axes, of which `whole` is a merge.
    """
    split = whole.reshape(shape)
    return jax.lax.dynamic_update_slice(split, block, corner).reshape(whole.shape)
