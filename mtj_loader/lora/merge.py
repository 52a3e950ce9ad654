"""Reads low-rank factors onto the devices and adds them to parameters: in float32, rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mtj_loader.errors import NonFiniteError
from mtj_loader.lora.low_rank import LowRank
from mtj_loader.parameters import ParamSpec
from mtj_loader.storage.base import ByteRange, Storage
from mtj_loader.storage.prefetch import prefetch_bytes
from mtj_loader.weights.copies import distinct_layouts, shard_layouts
from mtj_loader.weights.read_layouts import byte_ranges, element_ranges, read_layouts
from mtj_loader.weights.view import View


@dataclass(frozen=True)
class AdaptedParam:
    """A parameter that adapters change.

    Attributes:
      spec: the parameter.
      terms: what is added to it.
      dtype: of the sum.
      tensor: the first tensor that fills it, for messages.
    """

    spec: ParamSpec
    terms: tuple[LowRank, ...]
    dtype: np.dtype
    tensor: str


def merge_all(
    params: Mapping[str, dict[str, jax.Array]],
    adapted: Sequence[AdaptedParam],
    mesh: Mesh,
    shard_numbers: Sequence[int],
    host_memory_bytes: int,
    *,
    donate: bool,
) -> int:
    """Adds low-rank terms to some parameters; returns the adapter bytes that this host read.

    Args:
      params: the parameters without terms, in any float dtype; the sums replace them.
      adapted: those that have terms.
      mesh: the devices they are on; axes dp and mp, Auto.
      shard_numbers: the shards that this host's devices hold.
      host_memory_bytes: the limit on bytes in flight.
      donate: the arrays that are added to are no longer needed.

    Raises:
      NonFiniteError: a sum overflows in the parameter's dtype.
    """
    terms = [term for param in adapted for term in param.terms]
    with closing(_FactorReader(terms, mesh, shard_numbers, host_memory_bytes)) as reader:
        for param in adapted:
            module = params[param.spec.path]
            module[param.spec.param] = _merge(param, module[param.spec.param], reader, donate)
    return reader.bytes_read


class _FactorReader:
    """Reads the parts of factors that this host's shards need; prefetches from remote storage.

    Args:
      terms: all terms whose factors will be read, in this order.
      mesh: the devices to put them on.
      shard_numbers: the shards that this host's devices hold.
      host_memory_bytes: the limit on bytes in flight.
    """

    def __init__(
        self,
        terms: Sequence[LowRank],
        mesh: Mesh,
        shard_numbers: Sequence[int],
        host_memory_bytes: int,
    ) -> None:
        self._mesh, self._shards, self._numbers = mesh, mesh.shape["mp"], shard_numbers
        storages = dict.fromkeys(term.storage for term in terms)
        self._readers = {
            storage: storage.reader(
                self._all_ranges(terms, storage),
                prefetch_bytes(storage, host_memory_bytes) // len(storages),
            )
            for storage in storages
        }
        self._read_bytes = 0

    def read(self, term: LowRank) -> tuple[jax.Array, jax.Array]:
        """Both factors of the next term, float32 [n, …], split like the parameter; unscaled."""
        left, right = (self._factor(term.storage, *factor) for factor in term.factors)
        return left, right

    @property
    def bytes_read(self) -> int:
        """Bytes that this host has read; final after `close`."""
        return self._read_bytes + sum(reader.extra_bytes for reader in self._readers.values())

    def close(self) -> None:
        """Stops prefetching."""
        for reader in self._readers.values():
            reader.stop()

    def _factor(self, storage: Storage, view: View, spec: ParamSpec) -> jax.Array:
        layouts = shard_layouts(view.layout, spec.groups, spec.split, self._shards)
        mine = distinct_layouts(view.layout, spec, self._shards, self._numbers)
        ranges = element_ranges(mine, len(view.records), merge=storage.costs.high_latency)
        arrays = read_layouts(self._readers[storage], view.records, mine, ranges)
        self._read_bytes += sum(
            stop - start for _, start, stop in byte_ranges(view.records, ranges)
        )
        of_layout = dict(zip(mine, arrays, strict=True))
        shape = (1, *spec.shard_shape(self._shards))

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX passes the slices of the array that a device holds
            return of_layout[layouts[index[0].start or 0]].reshape(shape)

        sharding = NamedSharding(self._mesh, PartitionSpec("mp"))
        return jax.make_array_from_callback(spec.array_shape(self._shards), sharding, shard)

    def _all_ranges(self, terms: Iterable[LowRank], storage: Storage) -> Iterator[ByteRange]:
        """Everything that will be read from a storage, in order."""
        for view, spec in (factor for t in terms if t.storage is storage for factor in t.factors):
            mine = distinct_layouts(view.layout, spec, self._shards, self._numbers)
            ranges = element_ranges(mine, len(view.records), merge=storage.costs.high_latency)
            yield from byte_ranges(view.records, ranges)


def _merge(param: AdaptedParam, base: jax.Array, reader: _FactorReader, donate: bool) -> jax.Array:
    """Adds the terms of one parameter; the sum has the sharding of `base`."""
    read = [(term, *reader.read(term)) for term in param.terms]
    factors = [(_scale(term, left), right) for term, left, right in read]
    add = _add_in_place if donate else _add
    total, finite = add(base, factors, param.dtype, base.sharding)
    if not all(np.asarray(shard.data).all() for shard in finite.addressable_shards):
        raise NonFiniteError(
            f"adding the adapter makes the parameter NaN or infinite in {param.dtype.name}",
            file=param.terms[0].storage.location,
            tensor=param.tensor,
            hint="load it as float32 or bfloat16",
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
    # `finite` is also computed shard by shard: no host may wait for another one here.
    within = tuple(range(1, base.ndim))
    rounded = jax.lax.with_sharding_constraint(total.astype(dtype), sharding)
    finite = jnp.isfinite(rounded).all(within) | ~jnp.isfinite(base).all(within)
    return rounded, jax.lax.with_sharding_constraint(finite, sharding)


_add = jax.jit(_sum, static_argnums=(2, 3))
_add_in_place = jax.jit(_sum, static_argnums=(2, 3), donate_argnums=0)


def _scale(term: LowRank, left: jax.Array) -> jax.Array:
    """The left factor, each rank times its scale."""
    experts = term.left_spec.groups[0][0] if term.scales.ndim == 2 else None
    if experts is not None and experts.name == term.spec.split:
        scales = term.scales.reshape((left.shape[0], -1, *term.scales.shape[1:]))
    else:
        scales = term.scales[None]
    return left * scales[..., None, :]
