"""The table of a model's parameters, filled by the Haiku modules that use them.

Each module declares its parameters when it is created. Creating a model without running it gives
the whole table, from which the map's resolver and the planner work, and running it asks for the
same parameters: shapes and presence cannot differ between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mtj_loader.parameters import ROOT, ParamSpec, axes


@dataclass(frozen=True, repr=False)  # Haiku formats the arguments of every module
class ParameterBuilder:
    """Collects the parameters that modules declare.

    Attributes:
      sizes: full size of every axis that patterns name (see `parameters.axes`).
      shards: n.
      transposed_linear: linear weights are [out, in], as in torch, instead of [in, out].
      dtype: of the parameters.
      specs: what was declared, in order.
    """

    sizes: Mapping[str, int]
    shards: int
    transposed_linear: bool
    dtype: np.dtype
    specs: list[ParamSpec] = field(default_factory=list)

    def declare(self, path: str, param: str, pattern: str, split: str | None) -> ParamSpec:
        """Adds a parameter to the table.

        Args:
          path: the Haiku path of the module.
          param: the name of the parameter.
          pattern: its axes, such as "d (h 3 k)".
          split: the axis that is split over the shards; None for a full copy in each.
        """
        spec = ParamSpec(path.removeprefix(ROOT), param, axes(pattern, self.sizes), split)
        self.specs.append(spec)
        return spec

    def declare_matrix(
        self, path: str, param: str, *, ins: str, outs: str, split: str | None, stack: str = ""
    ) -> ParamSpec:
        """Adds a linear weight, [in, out] or [out, in] as `transposed_linear` says.

        Args:
          path: the Haiku path of the module.
          param: the name of the parameter.
          ins: axes of the inputs.
          outs: axes of the outputs.
          split: the axis that is split over the shards; None for a full copy in each.
          stack: the leading axis of a stack of such weights.
        """
        matrix = f"{outs} {ins}" if self.transposed_linear else f"{ins} {outs}"
        return self.declare(path, param, f"{stack} {matrix}", split)
