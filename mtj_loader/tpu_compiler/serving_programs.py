"""The programs that serving a model runs, lowered for devices that need not exist."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Lowered

from mtj_loader.models.forward import Forward, Tree

PREFILL_TOKENS = 512  # of one pass over prompts; longer ones temporarily take more memory


def serving_programs(
    forward: Forward, params: Tree, slots: int, context: int
) -> dict[str, Callable[[], Lowered]]:
    """The programs that serving needs, by name; each is lowered when it is called.

    Args:
      forward: the model on a mesh.
      params: shapes, dtypes and shardings of the parameters.
      slots: sequences at a time, a multiple of dp.
      context: tokens that each slot has room for.
    """

    def prefill() -> Lowered:
        rows, tokens = forward.mesh.shape["dp"], min(PREFILL_TOKENS, context)
        return forward.lower_prefill(params, rows, tokens, context)

    def decode() -> Lowered:
        replicated = NamedSharding(forward.mesh, PartitionSpec())
        tokens = jax.ShapeDtypeStruct((slots,), np.int32, sharding=replicated)
        _, cache = forward.lower_prefill(params, slots, 1, context).out_info
        return forward.lower_step(params, cache, tokens)

    return {"prefill": prefill, "decode": decode}
