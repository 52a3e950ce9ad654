"""The weight map: which checkpoint tensor fills which MTJ parameters.

The format is KoboldAI's, with additions of ours; `configs/schema.json` documents it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mtj_loader.errors import MapError
from mtj_loader.weights.merging import NO_CONVERSIONS, Conversions

TargetKey = tuple[str, str]  # (module without root, param)


@dataclass(frozen=True)
class Target:
    """A parameter that a tensor fills, and how the tensor is transformed."""

    module: str  # without the root, may contain {layer}
    param: str
    transforms: frozenset[str] = frozenset()

    @property
    def key(self) -> TargetKey:
        """The parameter that this target fills."""
        return self.module, self.param

    def at(self, layer: int) -> Target:
        """The target with its `{layer}` filled in."""
        return replace(self, module=self.module.replace("{layer}", str(layer)))


# The parameters that one tensor fills. Usually one; none if the tensor is known and not needed;
# several if its rows are split between them, in this order.
Targets = tuple[Target, ...]


@dataclass(frozen=True)
class ConfigRule:
    """How to find one of our config values in config.json: keys in order, then a default."""

    keys: tuple[str, ...]
    default: object = None
    has_default: bool = False


@dataclass(frozen=True)
class WeightMap:
    """A map file, checked.

    Attributes:
      file: the path it was read from.
      compat: the MTJ family: "neox", "j", …
      positions: the MTJ kind of position encoding: "neox_rotary", …
      config_rules: our config values, and how to find them.
      static: the targets of tensors that occur once, by tensor name.
      layer: the targets of tensors that occur in every layer; names contain `{layer}`.
      zero_weights: parameters that no checkpoint has and that are filled with zeros.
      conversions: other layouts that a checkpoint may have, and how they become this one.
    """

    file: str
    compat: str
    positions: str
    config_rules: Mapping[str, ConfigRule]
    static: Mapping[str, Targets]
    layer: Mapping[str, Targets]
    zero_weights: tuple[Target, ...] = ()
    conversions: Conversions = NO_CONVERSIONS

    def __repr__(self) -> str:
        return f"<WeightMap {self.file}>"

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
        what = f"the config has no key that {self.file} reads"
        raise MapError(what, file=file, key=" or ".join(rule.keys))

    def expand(self, layers: int) -> dict[str, Targets]:
        """Every tensor name that a model of this many layers can have, with its targets.

        Raises:
          MapError: a layer's entry, filled in, names the same tensor as a static entry.
        """
        names = dict(self.static)
        for pattern, targets in self.layer.items():
            for i in range(layers):
                name = pattern.replace("{layer}", str(i))
                if name in self.static:
                    what = "a layer entry names the same tensor as a static entry"
                    raise MapError(what, file=self.file, key=pattern)
                names[name] = tuple(target.at(i) for target in targets)
        return names

    def zeros(self, layers: int) -> frozenset[TargetKey]:
        """The parameters that no checkpoint has and that are filled with zeros."""
        return frozenset(target.at(i).key for target in self.zero_weights for i in range(layers))
