"""Declaring parameters: the one table from which maps, plan and Haiku modules take their shapes.

A family lists its parameters with the functions here. The modules look theirs up by path and
name, so shape, dtype and presence cannot differ from what the loader fills: a bias that is not
declared does not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mtj_loader.parameters import ParamSpec, axes


@dataclass(frozen=True)
class Declaration:
    """Builds the specs of common parts.

    Attributes:
      sizes: full size of every axis that the patterns below name (see `parameters.axes`).
      transposed_linear: weights are [out, in], as torch keeps them, instead of [in, out].
    """

    sizes: Mapping[str, int]
    transposed_linear: bool

    def linear(
        self, module: str, ins: str, outs: str, *, split: str, bias: bool
    ) -> list[ParamSpec]:
        """A linear layer whose inputs (row-parallel) or outputs (column-parallel) are split.

        Args:
          module: path without the root.
          ins: axis pattern of the inputs, such as "d".
          outs: axis pattern of the outputs, such as "(h 3 k)".
          split: the axis that is split over the shards.
          bias: whether there is one. A bias without the split axis is a full vector in every
            shard; MTJ keeps it divided by n there, since the sum over shards adds it n times.
        """
        specs = [self.matrix(module, "w", ins, outs, split=split)]
        if bias:
            own = split in outs.strip("()").split()
            specs.append(self.parameter(module, "b", outs, split if own else None))
        return specs

    def matrix(
        self, module: str, param: str, ins: str, outs: str, *, split: str | None, each: str = ""
    ) -> ParamSpec:
        """A weight that is kept as the layout of linear weights says.

        Args:
          module: path without the root.
          param: its name.
          ins: axis pattern of the inputs.
          outs: axis pattern of the outputs.
          split: the axis that is split over the shards, None for a full copy in each.
          each: the axis of a stack of such weights, which stands first.
        """
        matrix = f"{outs} {ins}" if self.transposed_linear else f"{ins} {outs}"
        return self.parameter(module, param, f"{each} {matrix}", split)

    def layer_norm(self, module: str) -> list[ParamSpec]:
        """A layer norm over d, whole in every shard."""
        return [*self.norm_scale(module), self.parameter(module, "offset", "d", None)]

    def norm_scale(self, module: str) -> list[ParamSpec]:
        """The scale of a norm over d that has no offset, whole in every shard."""
        return [self.parameter(module, "scale", "d", None)]

    def parameter(self, module: str, param: str, pattern: str, split: str | None) -> ParamSpec:
        """Any one parameter."""
        return ParamSpec(module, param, axes(pattern, self.sizes), split)


@dataclass(frozen=True)
class Declared:
    """The declared parameters of one shard, as the modules look them up."""

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]  # module path, parameter name
    dtype: np.dtype
    transposed_linear: bool


def declared(
    specs: Iterable[ParamSpec], *, shards: int, dtype: np.dtype, transposed_linear: bool
) -> Declared:
    """What one of `shards` shards holds."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for spec in specs:
        shapes.setdefault(spec.path, {})[spec.param] = spec.shard_shape(shards)
    return Declared(shapes, dtype, transposed_linear)
