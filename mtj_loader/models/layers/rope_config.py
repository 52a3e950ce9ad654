"""Reads the rotary embedding of a config: its type, and the settings that the type has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mtj_loader.formats.config_reader import Reader
from mtj_loader.formats.known_settings import reads_rope
from mtj_loader.models.layers.rope import DEFAULT_THETA, HEAD_SIZES, TYPES, Proportional, Rope


def read_rope(
    config: Reader,
    *,
    head_dim: int,
    max_positions: int,
    fraction: float,
    theta: float = DEFAULT_THETA,
    whole_heads: bool = False,
    types: Mapping[str, str] | None = None,
    layer_type: str | None = None,
) -> Rope:
    """Reads the rotary embedding of a config.

    Args:
      config: the family's reader.
      head_dim: size of a head.
      max_positions: the longest context, as the config states it.
      fraction: share of the head that is rotated, if the config does not say.
      theta: the base of the wavelengths, if the config does not say.
      whole_heads: refuse fractions other than 1, because transformers ignores them here.
      types: the names of the types that the family has, and the key of `TYPES`; all if None.
      layer_type: the layers whose settings are read, if there are several rotary embeddings.

    Raises:
      ConfigError: an unknown rope type (the message lists the known ones), a key that does not
        belong to the type, or an invalid value.
    """
    rope = config.rope() if layer_type is None else config.rope().section(layer_type)
    types = types or {name: name for name in TYPES}
    rope_type = types[rope.choice("rope_type", types, "default")]
    kind = TYPES[rope_type]
    shared: dict[str, Any] = {
        "theta": rope.number("rope_theta", theta),
        "head_dim": head_dim,
        "fraction": rope.number("partial_rotary_factor", fraction),
        "trained_positions": max_positions,
    }
    _check_shared(rope, shared)
    if whole_heads and shared["fraction"] != 1 and kind is not Proportional:
        what = "this family rotates whole heads"
        rope.refuse(what, "partial_rotary_factor", "1")
    result = kind.read(rope, shared)
    if layer_type is not None and not getattr(result, "truncate", True):
        what = "transformers does not read this in the section of a layer type"
        rope.refuse(what, "truncate", "true")
    rope.refuse_unsupported(partial(reads_rope, rope_type))
    if not rope.has_problems:
        _check_usable(rope, result)
    return result


def _check_usable(config: Reader, rope: Rope) -> None:
    """Raises ConfigError if positions are indistinguishable, up to twice the trained length."""
    try:
        with np.errstate(all="ignore"):
            usable = all(_is_distinct(rope, n * rope.trained_positions) for n in (1, 2))
    except (ArithmeticError, ValueError):
        usable = False
    if not usable:
        what = "settings of the rotary embedding give angles that are zero or not finite"
        config.refuse(what, "rope_type", "settings of the usual size")


def _is_distinct(rope: Rope, total: int) -> bool:
    """Whether every pair rotates in a row of `total` tokens, and nothing overflows."""
    row = rope.frequencies(total)
    angles = row * np.float32(total)
    product = np.float32(rope.scale) ** 2  # a query's times a key's
    rotates = (row[: rope.rotated_pairs] > 0).all()
    return bool(rotates and np.isfinite(angles).all() and 0 < product < np.inf)


def _check_shared(config: Reader, shared: dict[str, Any]) -> None:
    """Refuses a base or a share out of range, and puts a legal one in its place."""
    if shared["theta"] <= 1:
        config.refuse("not a legal value", "rope_theta", "a number above 1")
        shared["theta"] = DEFAULT_THETA
    share = min(shared["fraction"], 2.0)  # anything above 1 is refused, however large
    pairs = math.ceil(int(shared["head_dim"] * share) / 2)
    if not 2 <= 2 * pairs <= shared["head_dim"]:
        what = f"the rotated dimensions are not pairs within a head of {shared['head_dim']}"
        config.refuse(what, "partial_rotary_factor", "a share from 0 to 1", given=HEAD_SIZES)
        shared["fraction"] = 1.0
