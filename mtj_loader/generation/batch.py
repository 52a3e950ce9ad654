"""Prompts of unequal lengths as one batch whose shapes do not depend too closely on them.

Axes: b batch, t time (padded prompt), T cache length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtj_loader.generation.prompts import Prompt

_SMALLEST_BUCKET = 16  # below, a shorter pass saves no time worth a compilation


@dataclass(frozen=True, order=True)
class Shape:
    """What a batch is compiled for; the smallest comes first.

    Attributes:
      rows: b, a multiple of dp.
      prompt: t.
      cache: T.
    """

    rows: int
    prompt: int
    cache: int

    def holds(self, other: Shape) -> bool:
        """Whether a batch of the other shape can run in this one; rows are never added."""
        return self.rows == other.rows and self.prompt >= other.prompt and self.cache >= other.cache


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

    @property
    def shape(self) -> Shape:
        """What it runs in."""
        rows, prompt = self.ids.shape
        return Shape(rows, prompt, self.cache_length)


def make_batch(
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    max_positions: int,
    dp: int,
    warm: Sequence[Shape] = (),
) -> Batch:
    """Pads the prompts, which are known to fit, on the right and to a multiple of dp rows.

    Args:
      prompts: at least one.
      max_new_tokens: the most that each may get.
      max_positions: of the model.
      dp: the mesh axis that rows are split over.
      warm: what is compiled already: the smallest of these that holds the batch is taken.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    least = make_shape(len(prompts), longest, max_new_tokens, max_positions, dp)
    shape = min((shape for shape in warm if shape.holds(least)), default=least)
    rows = [prompt.ids for prompt in prompts]
    rows += rows[:1] * (shape.rows - len(rows))  # computed and never looked at
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((shape.rows, shape.prompt), np.int32)
    for row, prompt in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt
    return Batch(ids, lengths, lengths + np.int32(max_new_tokens), shape.cache)


def make_shape(
    prompts: int, longest: int, max_new_tokens: int, max_positions: int, dp: int
) -> Shape:
    """The shape of a number of prompts, given the tokens of the longest of them."""
    cache = bucket(longest + max_new_tokens, max_positions)
    return Shape(prompts + -prompts % dp, bucket(longest, max_positions), cache)


def bucket(length: int, max_positions: int) -> int:
    """The length to compile for: the next power of two, but never more than the model's positions.

    Each shape is compiled once, which takes as long as hundreds of tokens; powers of two leave a
    dozen shapes for 32,768 positions, and at most half of any is padding.
    """
    power = 1 << (int(length) - 1).bit_length()
    return min(max(power, _SMALLEST_BUCKET), max_positions)
