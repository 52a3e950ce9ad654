"""Adding low-rank terms to parameters: on the devices, in float32, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from mtj_loader.errors import NonFiniteError
from mtj_loader.loading.placement import Params
from mtj_loader.lora.factors import FactorReader
from mtj_loader.lora.low_rank import LowRank
from mtj_loader.planning.param_plan import ParamPlan


def merge_all(
    params: Params,
    adapted: Sequence[ParamPlan],
    mesh: Mesh,
    host_memory_bytes: int,
    *,
    donate: bool,
) -> tuple[Params, int]:
    """Adds their low-rank terms to some parameters; the others are shared.

    Args:
      params: the parameters without terms, in any float dtype.
      adapted: those that have some.
      mesh: where they lie; axes dp and mp, Auto.
      host_memory_bytes: the most in flight.
      donate: what is added to is not needed any more.

    Returns:
      The parameters, and the bytes of adapters that this host read.

    Raises:
      NonFiniteError: a sum overflows in the parameter's dtype.
    """
    tree = {module: dict(arrays) for module, arrays in params.items()}
    terms = [term for param in adapted for term in param.terms]
    with closing(FactorReader(terms, mesh, host_memory_bytes)) as reader:
        for param in adapted:
            module = tree[param.spec.path]
            module[param.spec.param] = _merged(param, module[param.spec.param], reader, donate)
    return tree, reader.bytes_read


def _merged(param: ParamPlan, base: jax.Array, reader: FactorReader, donate: bool) -> jax.Array:
    """One of them; `base` is placed as the sum will be."""
    read = [(term, *reader.read(term)) for term in param.terms]
    factors = [(_scaled(term, left, len(param.shards)), right) for term, left, right in read]
    add = _add_in_place if donate else _add
    total, finite = add(base, factors, param.dtype, base.sharding)
    if not all(np.asarray(shard.data).all() for shard in finite.addressable_shards):
        raise NonFiniteError(
            f"the parameter is not finite in {param.dtype.name} once the adapter is added",
            tensor=param.view.records[0].name,
            hint="another dtype holds it: float32, or bfloat16",
        )
    return total


def _sum(
    base: jax.Array,  # [n, ..., rows, columns]
    factors: Sequence[tuple[jax.Array, jax.Array]],  # [n, ..., rows, r], [n, ..., r, columns]
    dtype: np.dtype,
    sharding: Sharding,
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


def _scaled(term: LowRank, left: jax.Array, shards: int) -> jax.Array:
    """The left factor, times the factor of each rank."""
    experts = term.left_spec.groups[0][0] if term.scales.ndim == 2 else None
    split = experts is not None and experts.name == term.spec.split
    scales = (
        term.scales.reshape((shards, -1, *term.scales.shape[1:])) if split else term.scales[None]
    )
    return left * scales[..., None, :]
