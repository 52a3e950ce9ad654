"""The programs that serving a model runs, lowered for devices that need not exist."""

from __future__ import annotations

from collections.abc import Callable

from jax.stages import Lowered

from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.keys import prefill_key, step_key
from mtj_loader.engine.sizes import Sizes
from mtj_loader.models.forward import Forward, Tree


def serving_programs(
    forward: Forward, params: Tree, slots: int, context: int
) -> dict[str, Callable[[], Lowered]]:
    """The largest programs of an engine, by name; each is lowered when it is called.

    Args:
      forward: the model on a mesh.
      params: shapes, dtypes and shardings of the parameters.
      slots: sequences at a time, a multiple of dp.
      context: tokens that each slot has room for.
    """
    groups = forward.mesh.shape["dp"]
    sizes = Sizes(groups, slots // groups, context)
    programs = Programs(forward, params)
    longest = max(chunk for chunk in sizes.chunks if chunk.rows == 1)
    return {
        "prefill": lambda: programs.lower(sizes, prefill_key(longest)),
        "decode": lambda: programs.lower(sizes, step_key(sizes.slots)),
    }
