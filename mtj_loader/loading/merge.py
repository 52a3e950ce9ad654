"""Adding low-rank terms to parameters: on the devices, in float32, rounded once.

Each host reads only the rows and columns of the factors that its shards need.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtj_loader import dtypes
from mtj_loader.checkpoint.record import TensorRecord
from mtj_loader.checkpoint.storage import Storage
from mtj_loader.dtypes import FLOAT32
from mtj_loader.errors import NonFiniteError
from mtj_loader.loading import kernels
from mtj_loader.loading.copies import clip, runs, shard_copies, shard_layouts
from mtj_loader.loading.place import Params
from mtj_loader.loading.plan import ParamPlan
from mtj_loader.parameters import ParamSpec
from mtj_loader.weights.low_rank import LowRank
from mtj_loader.weights.view import Layout, View


def merged(param: ParamPlan, base: jax.Array, mesh: Mesh, *, donate: bool) -> jax.Array:
    """A parameter with its low-rank terms added.

    Args:
      param: the parameter and its terms.
      base: its array without them, in any float dtype.
      mesh: where it lies.
      donate: the base is not needed any more.

    Raises:
      NonFiniteError: the sum overflows in the parameter's dtype.
    """
    factors = [_factors(term, len(param.shards), mesh) for term in param.terms]
    add = _add_in_place if donate else _add
    sharding = NamedSharding(mesh, PartitionSpec("mp"))
    total, finite = add(base, factors, param.dtype, sharding)
    if not all(np.asarray(shard.data).all() for shard in finite.addressable_shards):
        raise NonFiniteError(
            f"the parameter is not finite in {param.dtype.name} once the adapter is added",
            tensor=param.view.records[0].name,
            hint="another dtype holds it: float32, or bfloat16",
        )
    return total


def merge_all(params: Params, adapted: Sequence[ParamPlan], mesh: Mesh, *, donate: bool) -> Params:
    """The tree with the terms of these parameters added; the others are shared."""
    tree = {module: dict(arrays) for module, arrays in params.items()}
    for param in adapted:
        module = tree[param.spec.path]
        module[param.spec.param] = merged(param, module[param.spec.param], mesh, donate=donate)
    return tree


def _sum(
    base: jax.Array,  # [n, ..., rows, columns]
    factors: Sequence[tuple[jax.Array, jax.Array]],  # [n, ..., rows, r], [n, ..., r, columns]
    dtype: np.dtype,
    sharding: NamedSharding,
) -> tuple[jax.Array, jax.Array]:
    total = base.astype(jnp.float32)
    for left, right in factors:
        total += jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    # Shard by shard, also what is finite: no host may wait for another one here.
    within = tuple(range(1, base.ndim))
    rounded = jax.lax.with_sharding_constraint(total.astype(dtype), sharding)
    finite = jnp.isfinite(rounded).all(within) | ~jnp.isfinite(base).all(within)
    return rounded, jax.lax.with_sharding_constraint(finite, sharding)


_add = jax.jit(_sum, static_argnums=(2, 3))
_add_in_place = jax.jit(_sum, static_argnums=(2, 3), donate_argnums=0)


def _factors(term: LowRank, shards: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Both factors, float32, split like the parameter; the left one scaled."""
    left = _sharded(term.storage, term.left, term.left_spec, shards, mesh)
    right = _sharded(term.storage, term.right, term.right_spec, shards, mesh)
    experts = term.left_spec.groups[0][0] if term.scales.ndim == 2 else None
    split = experts is not None and experts.name == term.spec.split
    scales = (
        term.scales.reshape((shards, -1, *term.scales.shape[1:])) if split else term.scales[None]
    )
    return left * scales[..., None, :], right


def _sharded(storage: Storage, view: View, spec: ParamSpec, shards: int, mesh: Mesh) -> jax.Array:
    """A factor as a sharded array [n, …]; only what this host's devices hold is read."""
    layouts = shard_layouts(view.layout, spec.groups, spec.split, shards)
    shape = (1, *spec.shard_shape(shards))
    read: dict[Layout, np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX asks with the slices of the array that a device holds
        layout = layouts[index[0].start or 0]
        if layout not in read:
            read[layout] = gather(storage, view.records, layout).reshape(shape)
        return read[layout]

    sharding = NamedSharding(mesh, PartitionSpec("mp"))
    return jax.make_array_from_callback(spec.array_shape(shards), sharding, shard)


def gather(storage: Storage, records: Sequence[TensorRecord], layout: Layout) -> np.ndarray:
    """Reads what a small layout needs, and no more, as float32 in its shape."""
    target = np.zeros(layout.size, FLOAT32)
    copies = shard_copies(layout).copies
    for source, record in enumerate(records):
        mine = tuple(copy for copy in copies if copy.source == source)
        dtype = dtypes.WEIGHT_DTYPES[record.dtype]
        for start, stop in runs(mine).tolist():
            run = np.empty(stop - start, dtype)
            offset_bytes = record.offset_bytes + start * dtype.itemsize
            storage.read_into(record.file, offset_bytes, run.view(np.uint8))
            wide = kernels.cast(run, FLOAT32)
            for part in (part for copy in mine for part in clip(copy, start, stop)):
                kernels.run_copy(part, wide, start, target)
    return target.reshape(layout.shape)
