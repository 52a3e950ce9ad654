"""Prefill and single steps of whole batches, by `Forward.extend`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike

from mtj_loader.models.forward import Forward, Params, dispatch
from mtj_loader.models.passes import Cache, Rows


def empty_cache(forward: Forward, slots: int, length: int) -> Cache:
    """A cache of zeros."""
    shapes = forward.cache_shapes(slots, length)
    return jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), shapes)


def first_slots(forward: Forward, rows: int) -> np.ndarray:
    """A slot for each row, counted within the groups."""
    groups = forward.mesh.shape["dp"]
    return np.tile(np.arange(rows // groups, dtype=np.int32), groups)


def prefill(  # noqa: PLR0917
    forward: Forward,
    params: Params,
    ids: np.ndarray,
    lengths: np.ndarray,
    totals: Sequence[int] | np.ndarray,
    length: int,
) -> tuple[jax.Array, Cache]:
    """Logits after each prompt [b, V], and a cache with room for `length` tokens."""
    rows = Rows(
        ids,
        np.zeros_like(lengths),
        lengths,
        forward.frequencies(list(totals)),
        first_slots(forward, len(ids)),
    )
    return extend(forward, params, empty_cache(forward, len(ids), length), rows)


def step(  # noqa: PLR0917
    forward: Forward,
    params: Params,
    cache: Cache,
    tokens: ArrayLike,
    positions: ArrayLike,
    totals: Sequence[int] | np.ndarray,
) -> tuple[jax.Array, Cache]:
    """Logits after one more token of each row, and the cache with it."""
    tokens, positions = np.asarray(tokens, np.int32), np.asarray(positions, np.int32)
    ones = np.ones_like(positions)
    frequencies = forward.frequencies(list(totals))
    slots = first_slots(forward, len(tokens))
    rows = Rows(tokens[:, None], positions, ones, frequencies, slots)
    return extend(forward, params, cache, rows)


def extend(forward: Forward, params: Params, cache: Cache, rows: Rows) -> tuple[jax.Array, Cache]:
    """`Forward.extend`, compiled; the cache is donated."""
    return dispatch(forward.mesh, _compiled(forward), params, cache, rows)


@functools.cache
def _compiled(forward: Forward) -> jax.stages.Wrapped:
    return jax.jit(forward.extend, donate_argnums=1)
