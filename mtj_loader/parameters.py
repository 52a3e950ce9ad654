"""Parameters as data: what the map's resolver and the planner know of a model.

The vocabulary of axes, used here, in the maps and in the modules:

  n shards   d model   e embedding   f feed-forward   V padded vocabulary
  h heads    k head_dim   g KV heads   E experts   b batch   t time
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

ROOT = "causal_transformer_shard/~/"  # every MTJ module path begins with this

# The axes that can be split, in tables and messages.
AXIS_NAMES = {
    "E": "experts",
    "V": "vocabulary",
    "d": "d_model",
    "e": "d_embed",
    "f": "feed-forward",
    "g": "key-value heads",
    "h": "heads",
}


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is at least the number."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter: a letter of the vocabulary above, and its full (unsplit) size."""

    name: str
    size: int

    def part(self, shards: int) -> int:
        """The size of one shard's part if this axis is split."""
        return max(1, self.size // shards)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its name, its axes, and the axis that is split over the shards.

    `groups` are the dimensions of the checkpoint's tensor after the map's transforms; the axes of
    one group are merged, row-major: `(d,), (h, 3, k)` is a matrix [d, h·3·k] with 3·k columns for
    each head. The split axis is divided into n equal parts, which become a leading axis: the array
    is [n, …]. An axis shorter than n (KV heads) must divide n, and neighboring shards then hold the
    same part. Without a split, every shard holds a full copy.
    """

    module: str  # without ROOT, as in the map
    param: str
    groups: tuple[tuple[Axis, ...], ...]
    split: str | None = None

    @property
    def path(self) -> str:
        """The full Haiku module path."""
        return ROOT + self.module

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape, before it is split: one number per group."""
        return tuple(math.prod(axis.size for axis in group) for group in self.groups)

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """The whole parameter's shape, with one number per axis."""
        return tuple(axis.size for group in self.groups for axis in group)

    def shard_shape(self, shards: int) -> tuple[int, ...]:
        """The shape of one shard's part, without the leading axis."""
        return tuple(
            math.prod(a.part(shards) if a.name == self.split else a.size for a in group)
            for group in self.groups
        )

    def array_shape(self, shards: int) -> tuple[int, ...]:
        """The shape of the `jax.Array`, [n, …], which is placed with `PartitionSpec("mp", …)`."""
        return (shards, *self.shard_shape(shards))

    def split_size(self) -> int | None:
        """Full size of the split axis; None for a replicated parameter."""
        return next((a.size for g in self.groups for a in g if a.name == self.split), None)


def axes(pattern: str, sizes: Mapping[str, int]) -> tuple[tuple[Axis, ...], ...]:
    """Parses `"d (h 3 k)"` into groups; a number is an axis of that size.

    Args:
      pattern: axis names; those in parentheses are merged into one dimension.
      sizes: the full size of every named axis.
    """
    groups = re.findall(r"\(([^)]*)\)|(\S+)", pattern)
    return tuple(
        tuple(
            Axis(name, int(name) if name.isdigit() else sizes[name])
            for name in (merged or single).split()
        )
        for merged, single in groups
    )
