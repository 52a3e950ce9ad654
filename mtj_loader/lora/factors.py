"""Reading the factors of adapters: the rows and columns that this host's shards need.

Of a distant storage also what lies between them, where a request for each would take longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtj_loader import dtypes
from mtj_loader.dtypes import FLOAT32
from mtj_loader.formats.records import TensorRecord
from mtj_loader.lora.low_rank import LowRank
from mtj_loader.parameters import ParamSpec
from mtj_loader.planning.topology import topology
from mtj_loader.storage.base import Run, Storage
from mtj_loader.storage.prefetch import prefetch_bytes
from mtj_loader.weights import kernels
from mtj_loader.weights.copies import clip, distinct_layouts, runs, shard_copies, shard_layouts
from mtj_loader.weights.view import Layout, View


class FactorReader:
    """Reads factors onto the devices; a distant storage is asked for many at once.

    Args:
      terms: all whose factors will be read, in this order.
      mesh: where they go; axes dp and mp, Auto.
      host_memory_bytes: the most in flight.
    """

    def __init__(self, terms: Sequence[LowRank], mesh: Mesh, host_memory_bytes: int) -> None:
        self._mesh = mesh
        self._shards = topology(mesh).mp
        self._numbers = topology(mesh).shards_of(jax.process_index())
        storages = dict.fromkeys(term.storage for term in terms)
        self._readers = {
            storage: storage.reader(
                self._announced(terms, storage),
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
        """By this host; complete when it is closed."""
        return self._read_bytes + sum(reader.extra_bytes for reader in self._readers.values())

    def close(self) -> None:
        """Ends what is under way."""
        for reader in self._readers.values():
            reader.stop()

    def _factor(self, storage: Storage, view: View, spec: ParamSpec) -> jax.Array:
        layouts = shard_layouts(view.layout, spec.groups, spec.split, self._shards)
        mine = distinct_layouts(view.layout, spec, self._shards, self._numbers)
        reads = _reads(mine, len(view.records), storage.costs.high_latency)
        found = _gather(self._readers[storage], view.records, mine, reads)
        self._read_bytes += sum(stop - first for _, first, stop in _runs(view.records, reads))
        of_layout = dict(zip(mine, found, strict=True))
        shape = (1, *spec.shard_shape(self._shards))

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX asks with the slices of the array that a device holds
            return of_layout[layouts[index[0].start or 0]].reshape(shape)

        sharding = NamedSharding(self._mesh, PartitionSpec("mp"))
        return jax.make_array_from_callback(spec.array_shape(self._shards), sharding, shard)

    def _announced(self, terms: Iterable[LowRank], storage: Storage) -> Iterator[Run]:
        """All that will be read of a storage, in order."""
        for view, spec in (factor for t in terms if t.storage is storage for factor in t.factors):
            mine = distinct_layouts(view.layout, spec, self._shards, self._numbers)
            yield from _runs(
                view.records, _reads(mine, len(view.records), storage.costs.high_latency)
            )


_Read = tuple[int, int, int]  # which record, its first element, and the one after the last


class _Readable(Protocol):
    """A storage, or what reads ahead of one."""

    def read_into(self, path: str, offset_bytes: int, buffer: np.ndarray) -> None: ...


def gather(source: _Readable, records: Sequence[TensorRecord], layout: Layout) -> np.ndarray:
    """Reads what a small layout needs, and no more, as float32 in its shape."""
    return _gather(source, records, (layout,), _reads((layout,), len(records), at_once=False))[0]


def _gather(
    source: _Readable,
    records: Sequence[TensorRecord],
    layouts: Sequence[Layout],
    reads: Iterable[_Read],
) -> list[np.ndarray]:
    """Several layouts of the same records, reading what they share once."""
    targets = [np.zeros(layout.size, FLOAT32) for layout in layouts]
    copies = [shard_copies(layout).copies for layout in layouts]
    for i, start, stop in reads:
        record, dtype = records[i], _dtype(records[i])
        run = np.empty(stop - start, dtype)
        offset_bytes = record.offset_bytes + start * dtype.itemsize
        source.read_into(record.file, offset_bytes, run.view(np.uint8))
        wide = kernels.cast(run, FLOAT32)
        for target, its_copies in zip(targets, copies, strict=True):
            for copy in (copy for copy in its_copies if copy.source == i):
                for part in clip(copy, start, stop):
                    kernels.run_copy(part, wide, start, target)
    return [target.reshape(layout.shape) for target, layout in zip(targets, layouts, strict=True)]


def _reads(layouts: Sequence[Layout], records: int, at_once: bool) -> list[_Read]:
    """What several layouts of some records need, in the order of reading."""
    copies = [copy for layout in layouts for copy in shard_copies(layout).copies]
    found: list[_Read] = []
    for i in range(records):
        ranges = runs(tuple(copy for copy in copies if copy.source == i)).tolist()
        if at_once and ranges:
            ranges = [(ranges[0][0], ranges[-1][1])]
        found += [(i, start, stop) for start, stop in ranges]
    return found


def _runs(records: Sequence[TensorRecord], reads: Iterable[_Read]) -> Iterator[Run]:
    """The bytes of some reads."""
    for i, start, stop in reads:
        first, itemsize = records[i].offset_bytes, _dtype(records[i]).itemsize
        yield records[i].file, first + start * itemsize, first + stop * itemsize


def _dtype(record: TensorRecord) -> np.dtype:
    return dtypes.WEIGHT_DTYPES[record.dtype]
