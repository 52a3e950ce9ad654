"""From what the devices read to the parameters they hold, over the interconnect.

It begins when all hosts have read all of their blocks: an interconnect is so much faster than any
storage that little would be won by sending while reading, and a host that fails to read has said so
before any other waits for it inside a collective operation. The parameters come one after another,
and the blocks of one are given back before the next, so that no device holds more than one twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtj_loader.distributed.hosts import SINGLE_HOST, Hosts
from mtj_loader.errors import DeviceError
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan
from mtj_loader.planning.read_assignment import SharedBlocks

_BITS = {2: jnp.uint16, 4: jnp.uint32}


def reshard(
    params: dict[str, dict[str, jax.Array]], plan: LoadPlan, mesh: Mesh, hosts: Hosts = SINGLE_HOST
) -> None:
    """Makes the parameters of what was read, in place; all hosts take them in the same order.

    Args:
      params: as `Placer.params` gives them.
      plan: what was read, without adapters.
      mesh: axes dp and mp, Auto.
      hosts: who exchanges with this one.

    Raises:
      DeviceError: a device has no room, or another does not answer.
      HostError: another host failed.
    """
    for param in plan.params:
        if param.reads.is_shared:
            hosts.check()
            module = params[param.spec.path]
            module[param.spec.param] = exchanged(param, module[param.spec.param], mesh, hosts)


def exchanged(
    param: ParamPlan, array: jax.Array, mesh: Mesh, hosts: Hosts = SINGLE_HOST
) -> jax.Array:
    """A parameter [n, …], placed `PartitionSpec("mp")`; all hosts call this together.

    Args:
      param: read in blocks.
      array: what was read, placed by `SharedBlocks.sharding`; given back.
      mesh: axes dp and mp, Auto.
      hosts: who exchanges with this one.

    Raises:
      DeviceError, HostError: as `exchange_all`.
    """
    try:
        made = hosts.wait_until_ready(_program(*_kind(param, mesh))(array))
    except jax.errors.JaxRuntimeError as error:
        what = "the devices could not exchange what they had read"
        key = f"{param.spec.path} {param.spec.param}"
        hint = "another host may have died meanwhile; its own messages say why"
        raise DeviceError(what, key=key, found=str(error), hint=hint) from error
    array.delete()  # donating would not do: the sizes differ
    return made


@contextmanager
def compiling(plan: LoadPlan, mesh: Mesh) -> Iterator[None]:
    """Compiles what the exchange will run while files are read; what is left then, it compiles.

    Args:
      plan: what is read, without adapters.
      mesh: axes dp and mp, Auto.
    """
    shared = [param for param in plan.params if param.reads.is_shared]
    if not shared:
        yield
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="mtj_loader_exchange")
    try:
        for kind in dict.fromkeys(_kind(param, mesh) for param in shared):
            pool.submit(_program, *kind)
        yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_Kind = tuple[SharedBlocks, tuple[int, ...], np.dtype, Mesh]


def _kind(param: ParamPlan, mesh: Mesh) -> _Kind:
    """All that the program of a parameter follows from; layers are alike."""
    assert isinstance(param.reads, SharedBlocks)
    return param.reads, param.shard_shape, param.dtype, mesh


@lru_cache(maxsize=1024)  # kinds of parameters that one process loads
def _program(
    reads: SharedBlocks, shard_shape: tuple[int, ...], dtype: np.dtype, mesh: Mesh
) -> Callable[[jax.Array], jax.Array]:
    """What makes the parameters of one kind: [g, *axes] as it was read -> [n, *shard_shape]."""
    before = reads.sharding(mesh)
    # Replicas hold the same after the gather, which check_vma cannot see.
    mapped = jax.shard_map(
        partial(_shard, reads, shard_shape),
        mesh=before.mesh,
        in_specs=before.spec,
        out_specs=PartitionSpec(("g", "r")),
        check_vma=False,
    )
    whole = jax.ShapeDtypeStruct(reads.array_shape, dtype, sharding=before)
    final = NamedSharding(mesh, PartitionSpec("mp"))
    return jax.jit(mapped, out_shardings=final).lower(whole).compile()


def _shard(
    reads: SharedBlocks,
    shard_shape: tuple[int, ...],
    block: jax.Array,  # [g or 1, …, part, …]
) -> jax.Array:  # [1, *shard_shape]
    """On each device: from its block to its shard."""
    axis = 1 + reads.axis
    # As integers, so that nothing on the way takes them for numbers: not one bit may change.
    bits = jax.lax.bitcast_convert_type(block, _BITS[block.dtype.itemsize])
    if reads.is_mixed:
        bits = jax.lax.all_to_all(bits, "g", split_axis=0, concat_axis=axis, tiled=True)
    bits = jax.lax.all_gather(bits, ("dp", "r"), axis=axis, tiled=True)
    bits = jax.lax.slice_in_dim(bits, 0, reads.length, axis=axis)  # without the padding
    return jax.lax.bitcast_convert_type(bits, block.dtype).reshape(1, *shard_shape)
