"""The sampling settings of one request, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal

from mtj_loader.display import show_value
from mtj_loader.errors import UsageError

SAMPLERS = 7  # ids 0 to 6 in `sampler_order`
MAX_LOGPROBS = 20  # as OpenAI's API
MAX_BIASES = 512  # as koboldcpp

_REPETITION_PENALTY = 6
_MAX_INT = 2**31 - 1  # positions are int32
_MAX_SEED = 2**64 - 1  # two uint32 words make a threefry key
_GREEDY_BELOW = 1e-6  # logits divided by less could overflow, and nothing but the maximum is left


@dataclass(frozen=True)
class SamplingParams:
    """The settings of one request. docs/sampling.md gives the formulas and their sources.

    Attributes:
      max_new_tokens: the most tokens to generate; 0 only scores the prompt.
      temperature: divides the logits; 0 (and less than 1e-6) is greedy: the most likely token
        after bias, bans and penalties; all other samplers are skipped.
      top_k: keep the k most likely tokens (and ties with the last of them); 0 keeps all.
      top_p: keep the fewest tokens whose probabilities sum to at least this; 1 keeps all.
      min_p: keep tokens with at least this fraction of the largest probability.
      top_a: keep tokens with at least this times the square of the largest probability.
      tfs: tail-free sampling; 1 keeps all.
      typical_p: keep the fewest typical tokens whose probabilities sum to this; 1 keeps all.
      top_n_sigma: keep logits within this many standard deviations of the largest; 0 keeps all.
      dynatemp_range: the temperature varies by this much in both directions with the entropy.
      dynatemp_exponent: of the normalized entropy.
      smoothing_factor: quadratic smoothing; 0 is off.
      smoothing_curve: shape of the smoothing; 1 is purely quadratic.
      repetition_penalty: divides positive logits of earlier tokens, and multiplies others.
      repetition_penalty_range: look at this many last tokens, prompt included; 0 is all.
      repetition_penalty_slope: how the penalty depends on the distance.
      repetition_penalty_curve: "koboldcpp": the farther half of the range gets
        1 + (penalty - 1) · slope; "kobold": KoboldAI United's curve over the range.
      presence_penalty: subtracted from the logits of tokens in the range.
      frequency_penalty: subtracted once per occurrence in the range.
      xtc_threshold, xtc_probability: with this probability drop every token with at least the
        threshold's probability but the least likely of them.
      dry_multiplier: subtract multiplier · base^(n - allowed) from a token that would continue
        a repeated sequence of n tokens; 0 is off.
      dry_base, dry_allowed_length: of that formula.
      dry_range: look at this many last tokens; 0 is all.
      dry_sequence_breakers: ids of tokens that no repeated sequence contains;
        `breakers.breaker_tokens` makes them from texts.
      mirostat: 2 replaces all samplers but the repetition penalty and the temperature; 0 is off.
      mirostat_tau: the target surprise, in bits.
      mirostat_eta: the learning rate.
      logit_bias: token id to a number that is added to its logit.
      banned_tokens: ids that are never chosen.
      ban_eos: never choose an end-of-text token.
      min_new_tokens: choose no end-of-text token before this many others.
      sampler_order: a permutation of 0 top_k, 1 top_a, 2 top_p and min_p, 3 tfs, 4 typical_p,
        5 temperature, 6 penalties. One without 6 gets it in front.
      seed: 0 … 2^64 - 1.
      logprobs: how many of the most likely tokens to report with their log-probabilities,
        besides the chosen one; None reports nothing.

    Raises:
      UsageError: a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_a: float = 0.0
    tfs: float = 1.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    smoothing_factor: float = 0.0
    smoothing_curve: float = 1.0
    repetition_penalty: float = 1.0
    repetition_penalty_range: int = 0
    repetition_penalty_slope: float = 1.0
    repetition_penalty_curve: Literal["koboldcpp", "kobold"] = "koboldcpp"
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    xtc_threshold: float = 0.1
    xtc_probability: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_sequence_breakers: Sequence[int] = ()
    mirostat: Literal[0, 2] = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: Sequence[int] = ()
    ban_eos: bool = False
    min_new_tokens: int = 0
    # Temperature first, as transformers and as this package before it had an order.
    sampler_order: Sequence[int] = (6, 5, 0, 1, 2, 3, 4)
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_reals()
        _check_choice("repetition_penalty_curve", self, ("koboldcpp", "kobold"))
        _check_choice("mirostat", self, (0, 2))
        _check_choice("ban_eos", self, (False, True))
        self._set("dry_sequence_breakers", _ids("dry_sequence_breakers", self))
        self._set("banned_tokens", _ids("banned_tokens", self))
        self._set("logit_bias", _bias(self.logit_bias))
        self._set("sampler_order", _order(self.sampler_order))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature < _GREEDY_BELOW

    def _check_integers(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens)
        _check_integer("seed", self.seed, high=_MAX_SEED)
        names = ("repetition_penalty_range", "dry_allowed_length", "dry_range", "min_new_tokens")
        for name in ("top_k", *names):
            _check_integer(name, getattr(self, name))
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, high=MAX_LOGPROBS)

    def _check_reals(self) -> None:
        for name in _ANY:
            _check_real(name, getattr(self, name), "a finite number", lambda _: True)
        for name in _NOT_NEGATIVE:
            _check_real(name, getattr(self, name), "a finite number, 0 or more", lambda x: x >= 0)
        for name in _FRACTIONS:
            expected = "a number from 0 to 1"
            _check_real(name, getattr(self, name), expected, lambda x: 0 <= x <= 1)
        for name in ("repetition_penalty", "dry_base"):
            _check_real(name, getattr(self, name), "a finite number over 0", lambda x: x > 0)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


_ANY = ("smoothing_curve", "presence_penalty", "frequency_penalty")
_NOT_NEGATIVE = (
    "temperature",
    "top_a",
    "top_n_sigma",
    "dynatemp_range",
    "dynatemp_exponent",
    "smoothing_factor",
    "repetition_penalty_slope",
    "dry_multiplier",
    "mirostat_tau",
    "mirostat_eta",
)
_FRACTIONS = ("top_p", "min_p", "tfs", "typical_p", "xtc_threshold", "xtc_probability")


def _ids(name: str, params: SamplingParams) -> tuple[int, ...]:
    values = getattr(params, name)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise _out_of_range(name, "a list of token ids", values)
    for value in values:
        _check_integer(name, value)
    return tuple(int(value) for value in values)


def _bias(values: object) -> dict[int, float]:
    if not isinstance(values, Mapping) or len(values) > MAX_BIASES:
        expected = f"a mapping from token ids to numbers, at most {MAX_BIASES} of them"
        raise _out_of_range("logit_bias", expected, values)
    for token, value in values.items():
        _check_integer("logit_bias", token)
        _check_real("logit_bias", value, "a finite number", lambda _: True)
    return {int(token): float(value) for token, value in values.items()}


def _order(order: object) -> tuple[int, ...]:
    expected = f"a permutation of 0 to {SAMPLERS - 1}, or of 0 to {SAMPLERS - 2}"
    if isinstance(order, str) or not isinstance(order, Sequence):
        raise _out_of_range("sampler_order", expected, order)
    integers = [x for x in order if isinstance(x, Integral) and not isinstance(x, bool)]
    full = tuple(int(x) for x in integers)
    if _REPETITION_PENALTY not in full:
        full = (_REPETITION_PENALTY, *full)
    if len(integers) != len(order) or sorted(full) != list(range(SAMPLERS)):
        raise _out_of_range("sampler_order", expected, order)
    return full


def _check_choice(name: str, params: SamplingParams, choices: Sequence[object]) -> None:
    value = getattr(params, name)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise _out_of_range(name, " or ".join(map(repr, choices)), value)


def _check_integer(name: str, value: object, low: int = 0, high: int = _MAX_INT) -> None:
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return
    bounds = f"{low} or more" if high == _MAX_INT else f"{low} to {high}"
    raise _out_of_range(name, f"an integer, {bounds}", value)


def _check_real(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond any float
            if math.isfinite(number := float(value)) and fits(number):
                return
    raise _out_of_range(name, expected, value)


def _out_of_range(name: str, expected: str, value: object) -> UsageError:
    return UsageError(
        f"{name} is out of range", key=name, expected=expected, found=show_value(value)
    )
