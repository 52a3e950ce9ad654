"""Rotary position embedding: the inverse frequencies of every rope type of transformers 5.

Rotary embedding (Su et al., 2021, arXiv:2104.09864) rotates pair i of a head's first r dimensions
by position · theta^(-2i/r). The types below stretch those frequencies to contexts longer than the
model was trained on. Two of them depend on the length of the sequence; here they are fixed for
each row by its total length (the prompt and all tokens to generate), so that a cached step
computes the same as a full forward pass.

Everything is numpy in float32, in the order of operations that published models were trained
with: the exponent 2i/r is rounded to float32 before the power, which matters at long distances.

  r rotated dimensions of a head, r/2 pairs   b batch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtj_loader.formats.config_reader import Reader
from mtj_loader.formats.typed_reader import MAX_INT

HEAD_SIZES = ("head_dim", "hidden_size", "num_attention_heads")  # settings that give head_dim
DEFAULT_THETA = 10_000.0  # Su et al., and the default of every transformers family


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rope type "default", and the base of the other types.

    Attributes:
      theta: the base of the wavelengths.
      head_dim: size of a head, k.
      fraction: share of each head that is rotated.
      trained_positions: the context length that the model was trained on.
      factor: how much longer a context may be.
    """

    theta: float
    head_dim: int
    fraction: float
    trained_positions: int
    factor: float = 1.0

    @property
    def exponent_dim(self) -> int:
        """Divisor of the exponents 2i/r: the share of the head, rounded down."""
        return int(self.head_dim * self.fraction)

    @property
    def scale(self) -> float:
        """The factor of cosine and sine; only yarn and longrope have another than 1."""
        return 1.0

    @property
    def rotated_pairs(self) -> int:
        """How many pairs are rotated: the first ones."""
        return len(self._exponents())

    def frequencies(self, total: int) -> np.ndarray:
        """Inverse frequencies, float32 [r/2], of a row of `total` tokens."""
        return self._powers(self.theta)

    def longest_context(self, stated: int) -> int:
        """The longest context in tokens, given max_position_embeddings."""
        return int(min(max(stated, self.trained_positions * self.factor), MAX_INT))

    def _exponents(self) -> np.ndarray:  # float32 [r/2]
        return np.arange(0, self.exponent_dim, 2, dtype=np.float32) / np.float32(self.exponent_dim)

    def _powers(self, theta: float) -> np.ndarray:  # float32 [r/2]
        return np.float32(1) / _power(theta, self._exponents())

    @classmethod
    def read(cls, config: Reader, shared: dict[str, Any]) -> Rope:
        """Reads what this type needs in addition to the `shared` attributes above."""
        return cls(**shared)


@dataclass(frozen=True, kw_only=True)
class Linear(Rope):
    """Position interpolation (Chen et al., 2023, arXiv:2306.15595): positions are divided."""

    def frequencies(self, total: int) -> np.ndarray:
        """Inverse frequencies, float32 [r/2]."""
        return super().frequencies(total) / np.float32(self.factor)

    @classmethod
    def read(cls, config: Reader, shared: dict[str, Any]) -> Rope:
        """Reads `factor`."""
        return cls(**shared, factor=_factor(config))


@dataclass(frozen=True, kw_only=True)
class Proportional(Linear):
    """The whole head is paired, but only the first `fraction` of the pairs are rotated.

    Exponents are 2i/head_dim, as if the whole head were rotated; the other frequencies are zero.
    """

    @property
    def rotated_pairs(self) -> int:
        """How many pairs are rotated: the first ones."""
        return int(self.fraction * self.head_dim // 2)

    def frequencies(self, total: int) -> np.ndarray:
        """Inverse frequencies, float32 [head_dim/2]."""
        rotated = np.arange(0, 2 * self.rotated_pairs, 2, dtype=np.float32)
        exponents = rotated / np.float32(self.head_dim)
        result = np.zeros(self.head_dim // 2, np.float32)
        result[: self.rotated_pairs] = np.float32(1) / _power(self.theta, exponents)
        return result / np.float32(self.factor)

    @classmethod
    def read(cls, config: Reader, shared: dict[str, Any]) -> Rope:
        """Reads `factor`, by default 1."""
        return cls(**shared, factor=_factor(config, 1.0))


@dataclass(frozen=True, kw_only=True)
class Dynamic(Linear):
    """NTK-aware scaling that starts beyond the trained length and grows with the row's length.

    theta' = theta · (factor·t/T − (factor−1))^(r/(r−2)), with t at least T, the trained length
    (bloc97 and emozilla, 2023; Peng et al., 2023, arXiv:2309.00071, section 3.3).
    """

    def frequencies(self, total: int) -> np.ndarray:
        """Inverse frequencies, float32 [r/2], of a row of `total` tokens."""
        trained, dim = self.trained_positions, self.exponent_dim
        stretch = self.factor * max(total, trained) / trained - (self.factor - 1)
        return self._powers(self.theta * stretch ** (dim / (dim - 2)))

    def longest_context(self, stated: int) -> int:
        """Any length: the frequencies are computed for it."""
        return MAX_INT

    @classmethod
    def read(cls, config: Reader, shared: dict[str, Any]) -> Rope:
        """Reads `factor`; needs at least two pairs, because r − 2 is a divisor."""
        rope = cls(**shared, factor=_factor(config))
        if rope.exponent_dim <= 2:
            what = "dynamic rope needs more than two rotated dimensions"
            config.refuse(what, "rope_type", given=HEAD_SIZES)
        return rope


@dataclass(frozen=True, kw_only=True)
class Llama3(Linear):
    """Divides low frequencies, keeps high ones, with a smooth ramp between (Llama 3.1)."""

    low_freq_factor: float
    high_freq_factor: float

    def frequencies(self, total: int) -> np.ndarray:
        """Inverse frequencies, float32 [r/2]."""
        plain = self._powers(self.theta)
        turns = self.trained_positions * plain / np.float32(2 * math.pi)  # in the trained context
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(ramp, 0, 1).astype(np.float32)
        return (1 - kept) * plain / np.float32(self.factor) + kept * plain

    @classmethod
    def read(cls, config: Reader, shared: dict[str, Any]) -> Rope:
        """Reads `factor` and the two ends of the ramp."""
        low = config.number("low_freq_factor")
        high = config.number("high_freq_factor")
        if high <= low:
            what = "the ramp's ends are in the wrong order"
            config.refuse(what, "high_freq_factor", f"more than low_freq_factor, {low}")
        shared = _original_positions(config, shared)
        return cls(**shared, factor=_factor(config), low_freq_factor=low, high_freq_factor=high)


@dataclass(frozen=True, kw_only=True)
class Yarn(Linear):
    """YaRN (Peng et al., 2023, arXiv:2309.00071): interpolation by parts and scaled attention."""

    beta_fast: float  # pairs with more rotations than this in the trained context are unchanged
    beta_slow: float  # pairs with fewer rotations than this are divided by the factor
    truncate: bool
    attention_factor: float

    @property
    def scale(self) -> float:
        """The factor of cosine and sine."""
        return self.attention_factor

    def frequencies(self, total: int) -> np.ndarray:
        """Inverse frequencies, float32 [r/2]."""
        positive = _power(self.theta, self._exponents())
        divided = np.float32(1) / (np.float32(self.factor) * positive)
        kept = np.float32(1) - self._ramp()
        return divided * (1 - kept) + np.float32(1) / positive * kept

    def _ramp(self) -> np.ndarray:  # float32 [r/2], 0 for an unchanged pair, 1 for a divided one
        low, high = self._pair_rotating(self.beta_fast), self._pair_rotating(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.exponent_dim - 1)
        if low == high:
            high += 0.001  # the reference's guard against a division by zero
        pairs = np.arange(self.exponent_dim // 2, dtype=np.float32)
        return np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)

    def _pair_rotating(self, rotations: float) -> float:
        """The (fractional) pair that rotates so many times within the trained context."""
        wavelength = self.trained_positions / (rotations * 2 * math.pi)
        return self.exponent_dim * math.log(wavelength) / (2 * math.log(self.theta))

    @classmethod
    def read(cls, config: Reader, shared: dict[str, Any]) -> Rope:
        """Reads the factor, the ends of the ramp, and the settings of the attention factor."""
        longest = shared["trained_positions"]
        shared = _original_positions(config, shared)
        factor = _factor(config, longest / shared["trained_positions"])
        rope = cls(
            **shared,
            factor=factor,
            beta_fast=config.number("beta_fast", 32.0) or 32.0,  # 0 means the paper's value
            beta_slow=config.number("beta_slow", 1.0) or 1.0,
            truncate=config.flag("truncate", True),
            attention_factor=_yarn_attention_factor(config, factor),
        )
        if rope.exponent_dim % 2:
            what = "yarn needs an even number of rotated dimensions"
            config.refuse(what, "rope_type", given=HEAD_SIZES)
        return rope


@dataclass(frozen=True, kw_only=True)
class LongRope(Rope):
    """LongRoPE (Ding et al., 2024, arXiv:2402.13753): a divisor for every pair."""

    short_factor: tuple[float, ...]  # for rows within the trained context
    long_factor: tuple[float, ...]  # for longer rows
    attention_factor: float

    @property
    def scale(self) -> float:
        """The factor of cosine and sine."""
        return self.attention_factor

    def frequencies(self, total: int) -> np.ndarray:
        """Inverse frequencies, float32 [r/2], of a row of `total` tokens."""
        divisors = self.long_factor if total > self.trained_positions else self.short_factor
        return np.float32(1) / (
            np.asarray(divisors, np.float32) * _power(self.theta, self._exponents())
        )

    @classmethod
    def read(cls, config: Reader, shared: dict[str, Any]) -> Rope:
        """Reads the two lists of divisors and the settings of the attention factor."""
        longest = shared["trained_positions"]
        shared = _original_positions(config, shared)
        trained = shared["trained_positions"]
        factor = _factor(config, longest / trained)
        grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        rope = cls(
            **shared,
            short_factor=config.numbers("short_factor"),
            long_factor=config.numbers("long_factor"),
            factor=factor,
            attention_factor=config.number("attention_factor", grown),
        )
        for key in ("short_factor", "long_factor"):
            _check_length(config, key, getattr(rope, key), len(rope._exponents()))
        return rope


def frequency_table(rope: Rope, totals: Sequence[int] | np.ndarray) -> np.ndarray:
    """Inverse frequencies of a batch, float32 [b, r/2]; row i is for `totals[i]` tokens."""
    rows = {total: rope.frequencies(total) for total in {int(total) for total in totals}}
    return np.stack([rows[int(total)] for total in totals])


def _power(theta: float, exponents: np.ndarray) -> np.ndarray:
    """theta^exponents, rounded once to float32."""
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _factor(config: Reader, default: float | None = None) -> float:
    factor = config.number("factor", default)
    if factor <= 0:
        config.refuse("not a legal value", "factor", "a number above 0")
        return 1.0
    return factor


def _original_positions(config: Reader, shared: dict[str, Any]) -> dict[str, Any]:
    """`shared` with the context length before stretching, if the config states it."""
    longest = shared["trained_positions"]
    trained = config.integer("original_max_position_embeddings", longest, low=2)  # ln is not 0
    return {**shared, "trained_positions": trained}


def _yarn_attention_factor(config: Reader, factor: float) -> float:
    """0.1·m·ln(factor) + 1 (section 3.4 of the paper); a ratio of two if both m are given."""

    def grown(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    m, m_all = config.number("mscale", 0.0), config.number("mscale_all_dim", 0.0)
    inferred = grown(m) / grown(m_all) if m and m_all else grown(1.0)
    return config.number("attention_factor", inferred)


def _check_length(config: Reader, key: str, values: Sequence[float], pairs: int) -> None:
    if len(values) != pairs or not all(values):
        expected = f"{pairs} numbers above 0"
        given = (*HEAD_SIZES, "rope_parameters.partial_rotary_factor")
        config.refuse("not a divisor for every pair", key, expected, given=given)


TYPES: dict[str, type[Rope]] = {
    "default": Rope,
    "linear": Linear,
    "dynamic": Dynamic,
    "llama3": Llama3,
    "yarn": Yarn,
    "longrope": LongRope,
    "proportional": Proportional,
}
