"""Prompts of unequal lengths as one batch whose shapes do not depend too closely on them.

Axes: b batch, t time (padded prompt), T cache length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtj_loader.generation.prompts import Prompt

_SMALLEST_BUCKET = 16  # below, a shorter pass saves no time worth a compilation


@dataclass(frozen=True)
class Batch:
    """What prefill takes; rows beyond the prompts fill the last multiple of dp.

    Attributes:
      ids: int32 [b, t], padded on the right with 0.
      lengths: int32 [b], the prompt's tokens in each row.
      totals: int32 [b], the tokens that each row has when it is as long as it may get.
      cache_length: T.
    """

    ids: np.ndarray
    lengths: np.ndarray
    totals: np.ndarray
    cache_length: int


def make_batch(
    prompts: Sequence[Prompt], max_new_tokens: int, max_positions: int, dp: int
) -> Batch:
    """Pads the prompts, which are known to fit, on the right and to a multiple of dp rows."""
    rows = [prompt.ids for prompt in prompts]
    rows += rows[:1] * (-len(rows) % dp)  # computed and never looked at
    lengths = np.array([len(row) for row in rows], np.int32)
    totals = lengths + np.int32(max_new_tokens)
    ids = np.zeros((len(rows), bucket(lengths.max(), max_positions)), np.int32)
    for row, prompt in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt
    return Batch(ids, lengths, totals, bucket(totals.max(), max_positions))


def bucket(length: int, max_positions: int) -> int:
    """The length to compile for: the next power of two, but never more than the model's positions.

    Each shape is compiled once, which takes as long as hundreds of tokens; powers of two leave a
    dozen shapes for 32,768 positions, and at most half of any is padding.
    """
    power = 1 << (int(length) - 1).bit_length()
    return min(max(power, _SMALLEST_BUCKET), max_positions)
