"""Pads prompts of unequal lengths to a batch with one of a few shapes, to limit compilations.

Axes: b batch, t time (padded prompt), T cache length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtj_loader.generation.prompts import Prompt

_MIN_BUCKET = 16  # shorter passes save less time than their compilation takes


@dataclass(frozen=True, order=True)
class Shape:
    """The shape that a batch is compiled for; ordered by size.

    Attributes:
      rows: b, a multiple of dp.
      prompt: t.
      cache: T.
    """

    rows: int
    prompt: int
    cache: int

    def holds(self, other: Shape) -> bool:
        """Whether a batch of the other shape can be padded to this one; rows are never added."""
        return self.rows == other.rows and self.prompt >= other.prompt and self.cache >= other.cache


@dataclass(frozen=True)
class PromptBatch:
    """The input of prefill; rows beyond the prompts pad to a multiple of dp.

    Attributes:
      ids: int32 [b, t], padded on the right with 0.
      lengths: int32 [b], the number of prompt tokens in each row.
      totals: int32 [b], the most tokens that each row may have at the end.
      cache_length: T.
    """

    ids: np.ndarray
    lengths: np.ndarray
    totals: np.ndarray
    cache_length: int

    @property
    def shape(self) -> Shape:
        """The shape it is compiled for."""
        rows, prompt = self.ids.shape
        return Shape(rows, prompt, self.cache_length)


def make_batch(
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    max_positions: int,
    dp: int,
    compiled: Sequence[Shape] = (),
) -> PromptBatch:
    """Pads prompts on the right and to a multiple of dp rows.

    Args:
      prompts: at least one; they fit the model's context.
      max_new_tokens: the most tokens to generate for each.
      max_positions: of the model.
      dp: the size of the mesh axis over which rows are split.
      compiled: shapes that are compiled already; the smallest that holds the batch is used.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    least = make_shape(len(prompts), longest, max_new_tokens, max_positions, dp)
    shape = min((shape for shape in compiled if shape.holds(least)), default=least)
    rows = [prompt.ids for prompt in prompts]
    rows += rows[:1] * (shape.rows - len(rows))  # computed and ignored
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((shape.rows, shape.prompt), np.int32)
    for row, prompt in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt
    return PromptBatch(ids, lengths, lengths + np.int32(max_new_tokens), shape.cache)


def make_shape(
    prompts: int, longest: int, max_new_tokens: int, max_positions: int, dp: int
) -> Shape:
    """The shape for a number of prompts, given the length of the longest."""
    cache = bucket(longest + max_new_tokens, max_positions)
    return Shape(prompts + -prompts % dp, bucket(longest, max_positions), cache)


def bucket(length: int, max_positions: int) -> int:
    """The length to compile for: the next power of two, at most the model's positions.

    Compiling a shape takes as long as generating hundreds of tokens. Powers of two give a dozen
    shapes for 32,768 positions, with at most half of each being padding.
    """
    power = 1 << (int(length) - 1).bit_length()
    return min(max(power, _MIN_BUCKET), max_positions)
