"""Sampling settings as arrays, so that requests with different settings share one program.

Axes: b rows, V vocabulary, W = ceil(V / 32) words of a bitmask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mtj_loader.errors import UsageError
from mtj_loader.sampling.params import MAX_BIASES, SAMPLERS, SamplingParams

TOP_K, TOP_A, TOP_P, TFS, TYPICAL, TEMPERATURE, PENALTIES = range(SAMPLERS)
NO_STAGE = -1

_LIMIT = 1e9  # of every number: products of a few stay finite in float32
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "top_a",
    "tfs",
    "typical_p",
    "top_n_sigma",
    "dynatemp_range",
    "dynatemp_exponent",
    "smoothing_factor",
    "smoothing_curve",
    "repetition_penalty",
    "repetition_penalty_slope",
    "presence_penalty",
    "frequency_penalty",
    "xtc_threshold",
    "xtc_probability",
    "dry_multiplier",
    "dry_base",
    "mirostat_tau",
    "mirostat_eta",
)
_INTEGERS = (
    "top_k",
    "repetition_penalty_range",
    "dry_allowed_length",
    "dry_range",
    "min_new_tokens",
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSettings:
    """The settings of b rows; those of a single row lack the axis b.

    Fields without a comment are those of `SamplingParams`: float32 [b] or int32 [b].

    Attributes:
      greedy: bool [b].
      stages: int32 [b, 7], the ids of the samplers that are not neutral, in the row's order, then
        `NO_STAGE`.
      kobold_curve: bool [b], whether `repetition_penalty_curve` is "kobold".
      dry_breakers: uint32 [b, W], a bit per token.
      mirostat: bool [b].
      bias_ids, bias_values: int32 and float32 [b, 512]; V where there is none.
      banned: uint32 [b, W], a bit per token, end of text included if it is banned.
      eos: uint32 [b, W], a bit per end-of-text token.
      key: uint32 [b, 2], a threefry key.
      logprobs: bool [b], whether log-probabilities are asked for.
    """

    greedy: Any
    stages: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    top_a: Any
    tfs: Any
    typical_p: Any
    top_n_sigma: Any
    dynatemp_range: Any
    dynatemp_exponent: Any
    smoothing_factor: Any
    smoothing_curve: Any
    repetition_penalty: Any
    repetition_penalty_range: Any
    repetition_penalty_slope: Any
    kobold_curve: Any
    presence_penalty: Any
    frequency_penalty: Any
    xtc_threshold: Any
    xtc_probability: Any
    dry_multiplier: Any
    dry_base: Any
    dry_allowed_length: Any
    dry_range: Any
    dry_breakers: Any
    mirostat: Any
    mirostat_tau: Any
    mirostat_eta: Any
    bias_ids: Any
    bias_values: Any
    banned: Any
    eos: Any
    min_new_tokens: Any
    key: Any
    logprobs: Any

    @property
    def initial_mu(self) -> np.ndarray:
        """Mirostat's state before the first token, float32 [b]: twice the target surprise."""
        return 2 * self.mirostat_tau


def row_settings(params: SamplingParams, *, vocab_size: int, eos_ids: Sequence[int]) -> RowSettings:
    """The settings of one row as numpy arrays without the axis b.

    Samplers that do not run for the request (those that greedy choice or mirostat replaces) are
    set to their neutral values here, so that programs need no exceptions for them.

    Raises:
      UsageError: a token id is outside the vocabulary.
    """
    for name in ("logit_bias", "banned_tokens", "dry_sequence_breakers"):
        _check_ids(name, getattr(params, name), vocab_size)
    eos_ids = [token for token in eos_ids if token < vocab_size]
    plain = params.greedy or params.mirostat == 2
    values: dict[str, Any] = {name: np.float32(_clip(getattr(params, name))) for name in _FLOATS}
    values |= {name: np.int32(getattr(params, name)) for name in _INTEGERS}
    if plain:
        neutral = ("dynatemp_range", "top_n_sigma", "xtc_probability")
        values |= dict.fromkeys(neutral, np.float32(0))
    bias_ids, bias_values = _bias_arrays(params, vocab_size)
    return RowSettings(
        **values,
        greedy=np.bool_(params.greedy),
        stages=_stages(params, vocab_size),
        kobold_curve=np.bool_(params.repetition_penalty_curve == "kobold"),
        dry_breakers=bitmask(params.dry_sequence_breakers, vocab_size),
        mirostat=np.bool_(params.mirostat == 2 and not params.greedy),
        bias_ids=bias_ids,
        bias_values=bias_values,
        banned=bitmask((*params.banned_tokens, *(eos_ids if params.ban_eos else ())), vocab_size),
        eos=bitmask(eos_ids, vocab_size),
        key=np.array([params.seed >> 32, params.seed & 0xFFFFFFFF], np.uint32),  # as under x64
        logprobs=np.bool_(params.logprobs is not None),
    )


def neutral_rows(b: int, *, vocab_size: int) -> RowSettings:
    """Greedy rows without any other setting: writable numpy arrays with the axis b."""
    row = row_settings(SamplingParams(temperature=0), vocab_size=vocab_size, eos_ids=())
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], b, axis=0), row)


def bitmask(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """One bit per token, uint32 [ceil(vocab_size / 32)]: bit t % 32 of word t // 32."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _stages(params: SamplingParams, vocab_size: int) -> np.ndarray:
    """The ids of the samplers that are not neutral, in order; int32 [7]."""
    active = {
        TOP_K: 0 < params.top_k < vocab_size,
        TOP_A: params.top_a > 0,
        TOP_P: params.top_p < 1 or params.min_p > 0,
        TFS: params.tfs < 1,
        TYPICAL: params.typical_p < 1,
        TEMPERATURE: _changes_temperature(params),
        PENALTIES: _penalizes(params),
    }
    order = params.sampler_order
    if params.greedy:
        order = (PENALTIES,)
    elif params.mirostat == 2:
        order = (PENALTIES, TEMPERATURE)  # as koboldcpp
    stages = [stage for stage in order if active[stage]]
    return np.array(stages + [NO_STAGE] * (SAMPLERS - len(stages)), np.int32)


def _changes_temperature(params: SamplingParams) -> bool:
    varied = params.dynatemp_range > 0 or params.top_n_sigma > 0
    return params.temperature != 1 or params.smoothing_factor > 0 or varied


def _penalizes(params: SamplingParams) -> bool:
    counted = params.presence_penalty != 0 or params.frequency_penalty != 0
    return params.repetition_penalty != 1 or counted


def _bias_arrays(params: SamplingParams, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full(MAX_BIASES, vocab_size, np.int32)
    values = np.zeros(MAX_BIASES, np.float32)
    count = len(params.logit_bias)
    ids[:count] = list(params.logit_bias.keys())
    values[:count] = [_clip(value) for value in params.logit_bias.values()]
    return ids, values


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if token >= vocab_size:
            raise UsageError(
                f"{name} contains an id outside the vocabulary",
                key=name,
                expected=f"0 to {vocab_size - 1}",
                found=token,
            )


def _clip(value: float) -> float:
    return float(min(max(value, -_LIMIT), _LIMIT))
