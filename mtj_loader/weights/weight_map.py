"""The weight map: which checkpoint tensor fills which MTJ parameter.

The format is KoboldAI's, accepted as it is (`configs/schema.json` documents it). `{layer}` in a
name stands for every layer's number; an entry `{}` names a tensor that is known and not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtj_loader.errors import MapError
from mtj_loader.weights.merging import NO_CONVERSIONS, Conversions


@dataclass(frozen=True)
class Target:
    """The parameter that a tensor fills, and how the tensor is changed on the way."""

    module: str  # without the root, may hold {layer}
    param: str
    transforms: frozenset[str]

    def at(self, layer: int) -> Target:
        """The target with its `{layer}` filled in."""
        return Target(self.module.replace("{layer}", str(layer)), self.param, self.transforms)


@dataclass(frozen=True)
class ConfigRule:
    """How one of our config values is found in config.json: keys in order, then a default."""

    keys: tuple[str, ...]
    default: object = None
    has_default: bool = False


@dataclass(frozen=True)
class WeightMap:
    """A map file, checked.

    Attributes:
      file: where it was read.
      compat: the MTJ family: "neox", "j", …
      positions: the MTJ kind of positions: "neox_rotary", …
      config_rules: our config values, and how they are found.
      static, layer: tensor names to targets; None for tensors that are known and not needed.
      zero_weights: targets that no checkpoint has, and that are zeros.
      conversions: other layouts that a checkpoint may have, and how they become this one.
    """

    file: str
    compat: str
    positions: str
    config_rules: Mapping[str, ConfigRule]
    static: Mapping[str, Target | None]
    layer: Mapping[str, Target | None]
    zero_weights: tuple[Target, ...] = ()
    conversions: Conversions = NO_CONVERSIONS

    def config_values(self, config: Mapping[str, object], *, file: str) -> dict[str, object]:
        """Our config values, as `mtj_config_map` finds them in a normalized config.json.

        Raises:
          MapError: a key without a default is absent.
        """
        return {key: self._lookup(rule, config, file) for key, rule in self.config_rules.items()}

    def _lookup(self, rule: ConfigRule, config: Mapping[str, object], file: str) -> object:
        for key in rule.keys:
            if config.get(key) is not None:
                return config[key]
        if rule.has_default:
            return rule.default
        raise MapError(
            f"{self.file} reads a config key that is not there",
            file=file,
            key=" or ".join(rule.keys),
        )

    def expand(self, layers: int) -> dict[str, Target | None]:
        """Every tensor name that a model of this many layers can have, with its target."""
        names = dict(self.static)
        for pattern, target in self.layer.items():
            for i in range(layers):
                if pattern.replace("{layer}", str(i)) in self.static:
                    what = "a layer's entry names a tensor that a static entry names too"
                    raise MapError(what, file=self.file, key=pattern)
                names[pattern.replace("{layer}", str(i))] = target and target.at(i)
        return names

    def zeros(self, layers: int) -> frozenset[tuple[str, str]]:
        """The (module, param) that no checkpoint has, and that are zeros."""
        return frozenset(
            (target.at(i).module, target.param)
            for target in self.zero_weights
            for i in range(layers)
        )
