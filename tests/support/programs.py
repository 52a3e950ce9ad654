"""A small program for tests of stored programs: a collective, a donated and an unused argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtj_loader.programs import CompiledProgram, ProgramFacts, Signature, compile_all
from tests.support.models import make_mesh


@dataclass(frozen=True)
class Config:
    """Stands for a model's config."""

    layers: int = 2


def make_signature(mesh: Mesh | None = None, *, counters: int = 3) -> Signature:
    """Weights [4, 16, 8], rows [4, 64], counters [4, counters] (donated), an unused array [2]."""
    mesh = mesh or make_mesh(2, 4)

    def array(shape: tuple[int, ...], dtype: object, *axes: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    kept = array((4, counters), jnp.int32, "dp")
    weights = {"w": array((4, 16, 8), jnp.float32, "mp")}
    args = weights, array((4, 64), jnp.float32, "dp", "mp"), kept, array((2,), jnp.int32)
    return Signature(args, (array((4, 8), jnp.float32, "dp"), kept), donate_argnums=(2,))


def lower(signature: Signature) -> jax.stages.Lowered:
    """Lowers rows @ weights, summed over shards, and counters + 1."""

    def shard(weights, rows, counters, unused):
        del unused
        return jax.lax.psum(rows @ weights["w"][0], "mp"), counters + 1

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, (signature.args, signature.results))
    mesh = signature.results[0].sharding.mesh
    run = jax.shard_map(shard, mesh=mesh, in_specs=specs[0], out_specs=specs[1])
    return jax.jit(run, donate_argnums=signature.donate_argnums).lower(*signature.args)


def compile_program(signature: Signature) -> CompiledProgram:
    """The same, compiled."""
    return compile_signature(lambda: lower(signature), signature)


def compile_signature(
    lower: Callable[[], jax.stages.Lowered], signature: Signature
) -> CompiledProgram:
    """Any program, compiled so that it can be saved."""
    return CompiledProgram(compile_all({"sum": lower})["sum"], signature)


def make_arguments(signature: Signature) -> tuple:
    """Random arguments with a fixed seed, placed."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(0, 9, leaf.shape).astype(leaf.dtype), leaf.sharding),
        signature.args,
    )


def collect_facts(mesh: Mesh | None = None, **options: object) -> ProgramFacts:
    """Facts of programs for `Config` on a mesh."""
    defaults = {
        "dtype": np.dtype("float32"), "slots": 4, "context": 64, "transposed_linear": False,
    }  # fmt: skip
    return ProgramFacts.collect(Config(), mesh or make_mesh(2, 4), **defaults | options)
