"""Strict reading of config.json: every key that may change the logits is read or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Self

from mtj_loader.errors import ConfigError
from mtj_loader.formats.hf_config import Problems, rope_keys
from mtj_loader.formats.known_settings import KEYS_WITHOUT_EFFECT, SUPPORTED_AT
from mtj_loader.formats.typed_reader import TypedReader


class Reader(TypedReader):
    """Typed access to a normalized config.json; null means absent. Raises ConfigError.

    Attributes:
      ignored: paths of keys that `refuse_unsupported` let in although nothing reads them.
    """

    error_class = ConfigError

    def __init__(
        self,
        values: Mapping[str, object],
        file: str,
        prefix: str = "",
        problems: Problems = None,
    ) -> None:
        super().__init__(values, file, prefix, problems)
        self.ignored: list[str] = []

    def rope(self) -> Self:
        """The settings of the rotary embedding under their new names; empty if there are none."""
        self._read |= rope_keys(self._values)
        return self.section("rope_parameters")

    def refuse_unsupported(
        self,
        matters: Callable[[str], bool],
        without_effect: Collection[str] = (),
        supported: Mapping[str, object] | None = None,
    ) -> None:
        """Refuses the keys that were not read and may change the logits; the rest are ignored.

        Args:
          matters: whether transformers reads a key.
          without_effect: keys of this family that never change the logits.
          supported: keys of this family that do, and the value at which they do not.
        """
        supported = {**SUPPORTED_AT, **(supported or {})}
        for key in sorted(
            self._values.keys() - self._read - KEYS_WITHOUT_EFFECT - set(without_effect)
        ):
            value, neutral = self._values[key], supported.get(key)
            if value is None or (key in supported and value == neutral):
                continue
            if key in supported or matters(key):
                self._refuse_setting(key, neutral)
            else:
                self.ignored.append(self._prefix + self.spelling(key))

    def _refuse_setting(self, key: str, neutral: object) -> None:
        expected = "no such key" if neutral is None else json.dumps(neutral)
        hint = "--ignore-setting KEY, or ignore_settings=[KEY], loads the model without a setting"
        self.refuse("a setting that is not supported", key, expected, hint)

    def _child(self, value: object, name: str) -> Self:
        child = super()._child(value, name)
        child.ignored = self.ignored
        return child
