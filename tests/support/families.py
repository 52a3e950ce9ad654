"""Checks of a model of any family against reference logits."""

from __future__ import annotations

import numpy as np

from mtj_loader import Model
from mtj_loader.models import usable_shards
from mtj_loader.models.config import ModelConfig
from tests.support.passes import prefill, step

TOLERANCE = 1e-4  # of logits in float32

# Four rows (dp=2 divides them) of unequal prompts, and the number of tokens added to each.
LENGTHS = np.array([7, 3, 5, 1], np.int32)
STEPS = 4
_CACHE_LENGTH = 16  # more than any row needs


def meshes(config: ModelConfig) -> list[str]:
    """All shard counts up to 8 that the model allows, and meshes with both axes."""
    counts = usable_shards(config, 8)
    both = [f"dp=2,mp={n}" for n in counts[-1:] if n in (3, 4)]
    both += ["dp=2,mp=4"] if 4 in counts[:-1] else []
    return [f"mp={n}" for n in counts] + both


def assert_logits(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    """The full forward of `ids` [b, t] gives the expected logits [b, t, vocab_size]."""
    logits = model.logits(ids)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def assert_cached_logits(model: Model, ids: np.ndarray, expected: np.ndarray) -> None:
    """Prefill and steps give the full forward's logits, for rows of unequal length.

    Args:
      model: of ours.
      ids: [4, t] with t at least 11.
      expected: [4, t, vocab_size].
    """
    forward, each = model.forward, np.arange(len(LENGTHS))
    width = LENGTHS.max()
    padded = np.where(np.arange(width) < LENGTHS[:, None], ids[:, :width], 1)
    totals = LENGTHS + STEPS
    logits, cache = prefill(forward, model.params, padded, LENGTHS, totals, _CACHE_LENGTH)
    for n in range(STEPS):
        wanted = expected[each, LENGTHS + n - 1]
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE, err_msg=f"step {n}")
        at = LENGTHS + n
        logits, cache = step(forward, model.params, cache, ids[each, at], at, totals)
