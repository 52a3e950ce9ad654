"""Turns the blocks that devices read into their shards, over the interconnect.

This starts after all hosts have read all of their blocks. An interconnect is so much faster than
any storage that overlapping with reading would save little; and a host that fails to read has
reported this before other hosts wait for it in a collective operation. Parameters are exchanged one
after another, and the blocks of one are freed before the next, so that at most one parameter is on
the devices twice.
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
from mtj_loader.planning.assignments import SharedBlocks
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan

_BITS = {2: jnp.uint16, 4: jnp.uint32}


def reshard(
    params: dict[str, dict[str, jax.Array]], plan: LoadPlan, mesh: Mesh, hosts: Hosts = SINGLE_HOST
) -> None:
    """Replaces arrays of blocks by the parameters, in place and in the same order on all hosts.

    Args:
      params: as returned by `Placer.params`.
      plan: what was read, without adapters.
      mesh: axes dp and mp, Auto.
      hosts: the hosts of the mesh.

    Raises:
      DeviceError: a device has too little memory, or another does not respond.
      HostError: another host failed.
    """
    for param in plan.params:
        if param.assignment.is_shared:
            hosts.check()
            module = params[param.spec.path]
            module[param.spec.param] = reshard_param(param, module[param.spec.param], mesh, hosts)


def reshard_param(
    param: ParamPlan, array: jax.Array, mesh: Mesh, hosts: Hosts = SINGLE_HOST
) -> jax.Array:
    """A parameter [n, …] with `PartitionSpec("mp")`; all hosts call this together.

    Args:
      param: read in blocks.
      array: what was read, with `SharedBlocks.sharding`; deleted.
      mesh: axes dp and mp, Auto.
      hosts: the hosts of the mesh.

    Raises:
      DeviceError, HostError: see `reshard`.
    """
    try:
        resharded = hosts.wait_until_ready(_program(*_kind(param, mesh))(array))
    except jax.errors.JaxRuntimeError as error:
        what = "the devices could not exchange what they read"
        key = f"{param.spec.path} {param.spec.param}"
        hint = "another host may have died; its own messages say why"
        raise DeviceError(what, key=key, found=str(error), hint=hint) from error
    array.delete()  # it cannot be donated, because the sizes differ
    return resharded


@contextmanager
def precompile(plan: LoadPlan, mesh: Mesh) -> Iterator[None]:
    """Compiles the programs of `reshard` in the background; `reshard` compiles the remaining ones.

    Args:
      plan: what is read, without adapters.
      mesh: axes dp and mp, Auto.
    """
    shared = [param for param in plan.params if param.assignment.is_shared]
    if not shared:
        yield
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="mtj_loader_reshard")
    try:
        for kind in dict.fromkeys(_kind(param, mesh) for param in shared):
            pool.submit(_program, *kind)
        yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_Kind = tuple[SharedBlocks, tuple[int, ...], np.dtype, Mesh]


def _kind(param: ParamPlan, mesh: Mesh) -> _Kind:
    """Everything that determines the program of a parameter; layers have equal ones."""
    assert isinstance(param.assignment, SharedBlocks)
    return param.assignment, param.shard_shape, param.dtype, mesh


@lru_cache(maxsize=1024)  # kinds of parameters that one process loads
def _program(
    blocks: SharedBlocks, shard_shape: tuple[int, ...], dtype: np.dtype, mesh: Mesh
) -> Callable[[jax.Array], jax.Array]:
    """The program for one kind of parameters: blocks [g, *axes] -> shards [n, *shard_shape]."""
    before = blocks.sharding(mesh)
    # After the gather replicas are equal, which check_vma cannot infer.
    mapped = jax.shard_map(
        partial(_shard, blocks, shard_shape),
        mesh=before.mesh,
        in_specs=before.spec,
        out_specs=PartitionSpec(("g", "r")),
        check_vma=False,
    )
    whole = jax.ShapeDtypeStruct(blocks.array_shape, dtype, sharding=before)
    final = NamedSharding(mesh, PartitionSpec("mp"))
    return jax.jit(mapped, out_shardings=final).lower(whole).compile()


def _shard(
    blocks: SharedBlocks,
    shard_shape: tuple[int, ...],
    block: jax.Array,  # [g or 1, …, part, …]
) -> jax.Array:  # [1, *shard_shape]
    """Runs on each device: makes its shard from its block and those of other devices."""
    axis = 1 + blocks.axis
    # As integers, so that no operation on floats can change any bit.
    bits = jax.lax.bitcast_convert_type(block, _BITS[block.dtype.itemsize])
    if blocks.is_mixed:
        bits = jax.lax.all_to_all(bits, "g", split_axis=0, concat_axis=axis, tiled=True)
    bits = jax.lax.all_gather(bits, ("dp", "r"), axis=axis, tiled=True)
    bits = jax.lax.slice_in_dim(bits, 0, blocks.length, axis=axis)  # without the padding
    return jax.lax.bitcast_convert_type(bits, block.dtype).reshape(1, *shard_shape)
