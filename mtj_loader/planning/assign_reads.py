"""Which parameters hosts share out among themselves for reading, by what reading and sending take.

On local files hosts share what several of them need: replicas over `dp`, and shards that are equal.
On a storage with high latency, also weights that are split across the rows of the file: there every
host needs a short range of every row, and each range would be a request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mtj_loader.planning.load_plan import ParamPlan
from mtj_loader.planning.read_assignment import ReadAssignment, slowest_axis
from mtj_loader.planning.topology import Topology
from mtj_loader.storage.base import ReadCosts
from mtj_loader.weights.copies import Copy, Loop, runs, shard_copies
from mtj_loader.weights.view import Layout

# A TPU v5e pod of 32 hosts has 6.4 Tbit/s of data-center network (Google Cloud's documentation,
# "TPU v5e"), 200 Gbit/s a host; half of it is counted. Inside a slice a chip has 1,600 Gbit/s.
INTERCONNECT_BYTES_PER_SECOND = 12.5e9
_LONGEST_REQUEST_BYTES = 16 << 20  # longer ranges are cut up, so they are several requests


def assign_reads(
    params: Sequence[ParamPlan], topology: Topology, speed: ReadCosts
) -> tuple[ParamPlan, ...]:
    """The parameters, each with the reading that takes least time.

    Args:
      params: without a reading.
      topology: the mesh.
      speed: of the storage that they are read from.
    """
    if len(topology.host_ids) == 1:
        return tuple(params)
    chosen: dict[object, ReadAssignment | None] = {}  # layers are alike and share their shards

    def choose(param: ParamPlan) -> ParamPlan:
        key = id(param.shards), param.source_dtype
        if key not in chosen:
            chosen[key] = _fastest(param, topology, speed)
        return param if chosen[key] is None else replace(param, reading=chosen[key])

    return tuple(map(choose, params))


def _fastest(param: ParamPlan, topology: Topology, speed: ReadCosts) -> ReadAssignment | None:
    """The best of the candidates, the first of those that are equally good."""
    candidates = list(_candidates(param, topology, speed))
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda one: _seconds(replace(param, reading=one), topology, speed))


def _candidates(
    param: ParamPlan, topology: Topology, speed: ReadCosts
) -> Iterator[ReadAssignment | None]:
    """The ways to read a parameter once in all; None: each host reads what its devices hold.

    A parameter that several hosts hold is never read by each of them. Sending is ten times faster
    than any storage here; the millisecond that it takes at the least would be more than a read of a
    few KB on each host, but then no host could say that every byte is read once.
    """
    shards = len(param.shards)
    size = param.spec.split_size()
    repeats = shards if size is None else max(1, shards // size)
    distinct = param.shards[::repeats]
    if not param.view.records:  # zeros come from no file
        yield None
        return
    one_by_one = _reading(distinct, topology, repeats, is_mixed=False)
    yield one_by_one if _is_shared(topology, repeats) else None
    if speed.high_latency and len(distinct) > 1:
        mixed = _reading(distinct, topology, repeats, is_mixed=True)
        if mixed is not None:
            yield mixed


def _reading(
    distinct: tuple[Layout, ...], topology: Topology, repeats: int, *, is_mixed: bool
) -> ReadAssignment | None:
    parts = topology.dp * repeats * (len(distinct) if is_mixed else 1)
    axis = slowest_axis(distinct[0], parts)
    return None if axis is None else ReadAssignment(distinct, topology.dp, repeats, axis, is_mixed)


def _is_shared(topology: Topology, repeats: int) -> bool:
    """Whether several hosts hold the same shard."""
    for first in range(0, topology.mp, repeats):
        if len({host for row in topology.hosts for host in row[first : first + repeats]}) > 1:
            return True
    return False


def _seconds(param: ParamPlan, topology: Topology, speed: ReadCosts) -> float:
    """What reading and exchanging a parameter take on the first host; the others are alike."""
    device_indices = topology.device_indices_of(topology.host_ids[0])
    requests = _requests(param, device_indices)
    reading = param.source_bytes(device_indices) / speed.bytes_per_second
    sending = param.received_bytes(device_indices) / INTERCONNECT_BYTES_PER_SECOND
    return max(reading, requests / speed.requests_per_second) + sending


def _requests(param: ParamPlan, device_indices: Sequence[int]) -> int:
    """How many ranges of the file devices at these seats need, neighbors joined."""
    of_source: dict[int, list[tuple[int, tuple[Loop, ...]]]] = {}
    for copy in (
        copy for layout in param.distinct(device_indices) for copy in shard_copies(layout).copies
    ):
        of_source.setdefault(copy.source, []).append((copy.src, copy.loops))
    most = _LONGEST_REQUEST_BYTES // param.source_dtype.itemsize
    alike = Counter(map(tuple, of_source.values()))  # hundreds of experts are
    return sum(n * _requests_of(blocks, most) for blocks, n in alike.items())


def _requests_of(blocks: Sequence[tuple[int, tuple[Loop, ...]]], most: int) -> int:
    """Ranges of one tensor, of at most so many elements, for blocks given by start and loops."""
    ranges = runs(tuple(Copy(0, first, 0, loops) for first, loops in blocks))
    return int((-(-(ranges[:, 1] - ranges[:, 0]) // most)).sum())
