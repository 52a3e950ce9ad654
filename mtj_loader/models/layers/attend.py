"""Softmax attention to the keys and values of a cache, block by block.

Only the blocks up to the longest row are read, so a step costs what its rows need, whatever the
cache has room for. The softmax is computed while the blocks are read (Milakov and Gimelshein, 2018,
arXiv:1805.02867). Blocks that a row does not see change nothing in its sums, so a row's result
does not depend on the other rows.

  S slots of the cache   b rows   t time (queries)   T time (keys)   B keys of one block
  h heads and g KV heads of one shard   k head_dim
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtj_loader.models.layers.linears import SHARDS, TPU_ROWS, on_tpu, soft_cap
from mtj_loader.models.layers.positions import Positions

# One layer's keys and values, [S, g, T, k] each: in this order, the products of attention read a
# head's keys and values in a row.
KVCache = tuple[jax.Array, jax.Array]

# Keys per block; the length of a longer cache is a multiple of it. Compared with 256, on a CPU, 16
# short rows take less than half the time, and one row of 1,500 keys takes a third more.
BLOCK = 128
# Keys per block on TPUs, where a block costs the fixed time of 16 operations, 19 µs on v5e; reading
# 256 keys of GPT-NeoX-20B's eight heads takes 1 µs.
TPU_BLOCK = 1024

ScoreBias = Callable[[Positions, jax.Array], jax.Array]  # keys' positions -> [b or 1, h, t, B]

_MESH_AXES = ("dp", SHARDS)
_NONE = -1e30  # the largest score before any key was seen; finite, so that differences are too


def update_cache(cache: KVCache | None, new: KVCache, positions: Positions) -> KVCache:
    """The keys and values to attend to: the cache with the new ones, or only the new ones.

    Args:
      cache: [S, g, T, k] each; None in a pass over whole rows.
      new: those of this pass, [b, t, g, k] each.
      positions: where they are written; what does not fit into the cache is dropped.
    """
    keys, values = (x.swapaxes(1, 2) for x in new)
    if cache is None:
        return _pad_blocks(keys), _pad_blocks(values)
    return _write(cache[0], keys, positions), _write(cache[1], values, positions)


def _write(cache: jax.Array, new: jax.Array, positions: Positions) -> jax.Array:
    """Writes [b, g, t, k] into the cache, [S, g, T, k], in place if it is donated.

    One slice after another: a scatter copies the cache on TPUs.
    """
    rows, heads, t, width = new.shape
    length = cache.shape[2]

    def write_row(row: jax.Array | int, cache: jax.Array) -> jax.Array:
        start, count = positions.starts[row], positions.counts[row]
        first = jnp.minimum(start, length - t)  # a slice that exceeds the cache would be moved
        where = positions.slots[row], 0, first, 0
        old = jax.lax.dynamic_slice(cache, where, (1, heads, t, width))
        fresh = jnp.roll(jax.lax.dynamic_slice_in_dim(new, row, 1), start - first, axis=2)
        offsets = first + jnp.arange(t) - start
        kept = ((offsets < 0) | (offsets >= count))[:, None]  # [t, 1]
        return jax.lax.dynamic_update_slice(cache, jnp.where(kept, old, fresh), where)

    return write_row(0, cache) if rows == 1 else jax.lax.fori_loop(0, rows, write_row, cache)


def attend(
    q: jax.Array,  # [b, t, h, k]
    cache: KVCache,  # [S, g, T, k] each
    positions: Positions,
    scale: float,
    *,
    cap: float | None = None,
    window: int | None = None,
    bias: ScoreBias | None = None,
) -> jax.Array:  # [b, t, h, k]
    """Softmax attention; scores are scaled, bounded by `cap` if there is one, and `bias` is added.

    Scores and softmax are in float32.

    With g < h, every h/g neighboring heads attend to the same keys and values (grouped queries,
    Ainslie et al., 2023, arXiv:2305.13245).

    Args:
      q: the queries.
      cache: the keys and values; those after a row's last token may be anything.
      positions: of the queries.
      scale: of the scores.
      cap: the soft bound of the scaled scores; None for no bound.
      window: how many positions back a query sees, its own included; None for all.
      bias: what is added to the scores.
    """
    b, t, h, k = q.shape
    g, length = cache[0].shape[1:3]
    block = min(TPU_BLOCK if on_tpu() else BLOCK, length)
    # The queries that share keys: [b, g, m, k] with m = h/g · t.
    grouped = q.reshape(b, t, g, h // g, k).transpose(0, 2, 3, 1, 4).reshape(b, g, -1, k)

    def add_block(index: jax.Array | int, state: _State) -> _State:
        start = jnp.minimum(index * block, length - block)  # the last block may overlap
        numbers = start + jnp.arange(block)  # positions of these keys
        keys, values = (_read(x, start, block, positions.slots) for x in cache)
        values = _drop_unwritten(values, numbers, positions)
        scores = _product("bgmk,bgBk->bgmB", grouped, keys) * scale
        scores = soft_cap(scores, cap).reshape(b, h, t, block)
        scores = scores if bias is None else scores + bias(positions, numbers)
        visible = positions.visible(numbers, window)[:, None]  # [b, 1, t, B]
        visible = visible if length % block == 0 else visible & (numbers >= index * block)
        return _accumulate(state, scores, visible, values)

    state = _start(grouped)
    if length == block:
        state = add_block(0, state)
    else:
        first = 0 if window is None else jnp.maximum(positions.first - window + 1, 0) // block
        # The type of a loop's state must not change: it will vary over the mesh as the queries do.
        state = jax.lax.pcast(state, _MESH_AXES, to="varying")
        state = jax.lax.fori_loop(first, (positions.end + block - 1) // block, add_block, state)
    _, total, sums = state
    heads = sums / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    heads = heads.reshape(b, h, t, k).swapaxes(1, 2)
    return heads.astype(cache[1].dtype)


# Of each query, float32: the largest score and the sum of the weights, [b, g, m], and the weighted
# values, [b, g, m, k]. Weights are relative to the largest score.
_State = tuple[jax.Array, jax.Array, jax.Array]


def _start(q: jax.Array) -> _State:
    rows = q.shape[:-1]
    zeros = jnp.zeros(rows, jnp.float32)
    return jnp.full_like(zeros, _NONE), zeros, jnp.zeros(q.shape, jnp.float32)


def _accumulate(
    state: _State, scores: jax.Array, visible: jax.Array, values: jax.Array
) -> _State:  # scores float32 [b, h, t, B], visible bool [b, 1, t, B], values [b, g, B, k]
    largest, total, sums = state
    scores = jnp.where(visible, scores, -jnp.inf).reshape(*total.shape, -1)
    new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_largest[..., None])
    kept = jnp.exp(largest - new_largest)
    change = _product("bgmB,bgBk->bgmk", weights.astype(values.dtype), values)
    total = total * kept + jnp.sum(weights, axis=-1)
    return new_largest, total, sums * kept[..., None] + change


def _read(
    x: jax.Array, start: jax.Array | int, block: int, slots: jax.Array | None
) -> jax.Array:  # [S, g, T, k] -> [b, g, B, k]
    """A block of the rows' keys or values."""
    if slots is None:
        return jax.lax.dynamic_slice_in_dim(x, start, block, axis=2)
    sizes = 1, x.shape[1], block, x.shape[3]

    def read_row(slot: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (slot, 0, start, 0), sizes)

    if on_tpu():  # a gather copies the cache
        return jnp.concatenate([read_row(slots[row]) for row in range(len(slots))])
    return jax.vmap(read_row)(slots)[:, 0]


def _drop_unwritten(values: jax.Array, numbers: jax.Array, positions: Positions) -> jax.Array:
    """Zeros for what former sequences left: a weight of 0 does not cancel NaN."""
    if positions.slots is None:
        return values
    written = numbers < (positions.starts + positions.counts)[:, None]  # [b, B]
    return jnp.where(written[:, None, :, None], values, 0)


def _pad_blocks(x: jax.Array) -> jax.Array:  # [b, g, t, k] -> [b, g, T, k]
    length = x.shape[2]
    extra = -length % BLOCK if length > BLOCK else 0
    return jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:  # float32
    """A product for each row and KV head; axis 2 of `x` and of the result are the queries."""
    queries = x.shape[2]
    if queries < TPU_ROWS and on_tpu():
        x = jnp.pad(x, ((0, 0), (0, 0), (0, TPU_ROWS - queries), (0, 0)))
    product = jnp.einsum(
        equation,
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product[:, :, :queries]
