"""Which modules an adapter adapts: PEFT's `target_modules` and `exclude_modules`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from mtj_loader.lora.patterns import Matcher, UnsupportedPatternError, Work, compile_pattern
from mtj_loader.names import dotted_ends

_ALL_LINEAR = "all-linear"
_LAYER = re.compile(r"\.[^.]*\.([0-9]{1,9})\.")  # the first index in a module's name


class ModuleNames:
    """Modules by the ends of their names, or by a regular expression that matches whole names.

    Args:
      names: ends of dotted names, a regular expression, or, for targets, "all-linear".
      excluded: whether these are excluded modules, not targets. An expression that is not supported
        here selects every target and excludes nothing, because the tensors show which modules PEFT
        saved.
    """

    def __init__(self, names: str | Collection[str], *, excluded: bool = False) -> None:
        self._names = frozenset() if isinstance(names, str) else frozenset(names)
        self._all, self._matcher = names == _ALL_LINEAR and not excluded, None
        if isinstance(names, str) and not self._all:
            work = Work()
            try:
                self._matcher = Matcher(compile_pattern(names, work), work)
            except UnsupportedPatternError:
                self._all = not excluded

    def includes(self, module: str) -> bool:
        """Whether a module is selected.

        Raises:
          UnsupportedPatternError: the expression takes too long.
        """
        if self._all or (self._matcher is not None and self._matcher.matches(module)):
            return True
        return not self._names.isdisjoint(dotted_ends(module))

    def names_in_full(self, module: str) -> bool:
        """Whether a module is listed by its whole name."""
        return module in self._names


@dataclass(frozen=True)
class ModuleSelection:
    """The modules that PEFT gives factors; it ignores the tensors of all others.

    Attributes:
      targets: `target_modules`.
      excluded: `exclude_modules`.
      layers: `layers_to_transform`, the numbers of the adapted layers; empty for all.
    """

    targets: ModuleNames
    excluded: ModuleNames
    layers: frozenset[int]

    def includes(self, module: str) -> bool:
        """Whether a module is adapted; as in PEFT's `check_target_module_exists`.

        Raises:
          UnsupportedPatternError: an expression takes too long.
        """
        if self.excluded.includes(module) or not self.targets.includes(module):
            return False
        if not self.layers or self.targets.names_in_full(module):
            return True
        found = _LAYER.search(module)
        return found is not None and int(found[1]) in self.layers
