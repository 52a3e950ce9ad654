"""Chooses who reads what, by the time that reading and exchanging take.

On one host every device reads its own shards. Several hosts divide what more than one of them
needs, so that every byte is read once: on local files these are the replicas over `dp` and shards
that are equal; on a storage with high latency also weights that are split across the rows of the
file, because each host would otherwise request a short range of every row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from mtj_loader.planning.assignments import (
    OwnShards,
    ReadAssignment,
    SharedBlocks,
    distinct,
    slowest_axis,
)
from mtj_loader.planning.topology import Topology
from mtj_loader.storage.base import ReadCosts
from mtj_loader.weights.copies import Copy, Loop, runs, shard_copies
from mtj_loader.weights.view import ZEROS, Layout

# A TPU v5e pod of 32 hosts has 6.4 Tbit/s of data-center network (Google Cloud's documentation,
# "TPU v5e"), or 200 Gbit/s for each host; we count on half of it. Within a slice a chip has 1,600
# Gbit/s.
INTERCONNECT_BYTES_PER_SECOND = 12.5e9


def assign_reads(
    own: OwnShards, split_size: int | None, itemsize: int, topology: Topology, costs: ReadCosts
) -> ReadAssignment:
    """The assignment that takes the least time; the first of those that are equally good.

    Args:
      own: the shards of the parameter, each read by the devices that hold it.
      split_size: full size of the axis that is split; None if every shard is a full copy.
      itemsize: bytes per element in the file.
      topology: the mesh.
      costs: of the storage.
    """
    if len(topology.host_ids) == 1:
        return own
    candidates = list(_candidates(own, split_size, topology, costs))
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda one: _seconds(one, itemsize, topology, costs))


def _candidates(
    own: OwnShards, split_size: int | None, topology: Topology, costs: ReadCosts
) -> Iterator[ReadAssignment]:
    """The ways to read a parameter once in total.

    A parameter that several hosts hold is never read by each of them. Sending is ten times faster
    than any storage here. Its minimum of about a millisecond exceeds the time to read a few KB on
    each host, but the guarantee that every byte is read once is worth more.
    """
    n = len(own.shards)
    repeats = n if split_size is None else max(1, n // split_size)
    distinct_shards = own.shards[::repeats]
    if all(piece.source == ZEROS for layout in distinct_shards for piece in layout.pieces):
        yield own  # no file is read
        return
    per_shard = _blocks(distinct_shards, topology, repeats, is_mixed=False)
    yield per_shard if per_shard and _hosts_share_a_shard(topology, repeats) else own
    if costs.high_latency and len(distinct_shards) > 1:
        mixed = _blocks(distinct_shards, topology, repeats, is_mixed=True)
        if mixed is not None:
            yield mixed


def _blocks(
    shards: tuple[Layout, ...], topology: Topology, repeats: int, *, is_mixed: bool
) -> SharedBlocks | None:
    """An assignment in blocks; None if no axis can be divided."""
    parts = topology.dp * repeats * (len(shards) if is_mixed else 1)
    axis = slowest_axis(shards[0], parts)
    return None if axis is None else SharedBlocks(shards, topology.dp, repeats, axis, is_mixed)


def _hosts_share_a_shard(topology: Topology, repeats: int) -> bool:
    """Whether several hosts hold the same shard."""
    for first in range(0, topology.mp, repeats):
        if len({host for row in topology.hosts for host in row[first : first + repeats]}) > 1:
            return True
    return False


def _seconds(
    assignment: ReadAssignment, itemsize: int, topology: Topology, costs: ReadCosts
) -> float:
    """Time for the first host to read and exchange a parameter; the other hosts take as long."""
    device_indices = topology.device_indices_of(topology.host_ids[0])
    read_bytes = assignment.read_elements(device_indices) * itemsize
    received_bytes = assignment.received_elements(device_indices) * itemsize
    requests = _requests(assignment, device_indices, costs.range_bytes // itemsize)
    reading = max(read_bytes / costs.bytes_per_second, requests / costs.requests_per_second)
    return reading + received_bytes / INTERCONNECT_BYTES_PER_SECOND


def _requests(assignment: ReadAssignment, device_indices: Sequence[int], max_elements: int) -> int:
    """How many ranges of the files these devices need; adjacent ranges are joined."""
    blocks_of: dict[int, list[tuple[int, tuple[Loop, ...]]]] = {}
    for layout in distinct(assignment, device_indices):
        for copy in shard_copies(layout).copies:
            blocks_of.setdefault(copy.source, []).append((copy.src, copy.loops))
    counts = Counter(map(tuple, blocks_of.values()))  # hundreds of experts have equal blocks
    return sum(n * _ranges(blocks, max_elements) for blocks, n in counts.items())


def _ranges(blocks: Sequence[tuple[int, tuple[Loop, ...]]], max_elements: int) -> int:
    """Ranges in one tensor, each of at most `max_elements`, for blocks of (start, loops)."""
    found = runs(tuple(Copy(0, first, 0, loops) for first, loops in blocks))
    return int((-(-(found[:, 1] - found[:, 0]) // max_elements)).sum())
