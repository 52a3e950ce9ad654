"""The samplers of docs/sampling.md, written from their definitions: plain numpy, one row, float64.

A row is an array of logits, minus infinity for tokens that are out. Nothing here is fast.
"""

from __future__ import annotations

import numpy as np

from mtj_loader.sampling.params import SamplingParams

INF = np.inf


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def ranked(logits: np.ndarray) -> list[int]:
    """Present tokens, the likeliest first; of equal ones the smallest id first."""
    present = [i for i in range(len(logits)) if logits[i] > -INF]
    return sorted(present, key=lambda i: (-logits[i], i))


def keep(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    result = np.full_like(logits, -INF)
    result[tokens] = logits[tokens]
    return result


def fewest(order: list[int], p: np.ndarray, enough: float) -> list[int]:
    kept, mass = [], 0.0
    for token in order:
        if kept and mass >= enough:
            break
        kept.append(token)
        mass += p[token]
    return kept


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    order = ranked(logits)
    if k == 0 or k >= len(order):
        return logits
    return keep(logits, [i for i in order if logits[i] >= logits[order[k - 1]]])


def top_p(logits: np.ndarray, p: float) -> np.ndarray:
    return logits if p >= 1 else keep(logits, fewest(ranked(logits), softmax(logits), p))


def typical(logits: np.ndarray, mass: float) -> np.ndarray:
    if mass >= 1:
        return logits
    p = softmax(logits)
    surprise = np.array([-np.log(x) if x > 0 else 0 for x in p])
    entropy = (p * surprise).sum()
    order = sorted(ranked(logits), key=lambda i: (abs(surprise[i] - entropy), i))
    return keep(logits, fewest(order, p, mass))


def min_p(logits: np.ndarray, m: float) -> np.ndarray:
    p = softmax(logits)
    return logits if m == 0 else keep(logits, [i for i in ranked(logits) if p[i] >= m * p.max()])


def top_a(logits: np.ndarray, a: float) -> np.ndarray:
    p = softmax(logits)
    least = min(a * p.max() ** 2, p.max())
    return logits if a == 0 else keep(logits, [i for i in ranked(logits) if p[i] >= least])


def tail_free(logits: np.ndarray, z: float) -> np.ndarray:
    if z >= 1 or len(logits) < 3:
        return logits
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    p = softmax(logits)[order]
    bends = np.abs((p[2:] - p[1:-1]) - (p[1:-1] - p[:-2]))
    kept = [order[0]]
    for place in range(len(bends)):  # the middle of three tokens is place + 1
        if bends[: place + 1].sum() > z * bends.sum():
            return keep(logits, kept)
        kept.append(order[place + 1])
    return logits


def top_n_sigma(logits: np.ndarray, n: float) -> np.ndarray:
    if n == 0:
        return logits
    present = logits[logits > -INF]
    return np.where(logits >= present.max() - n * present.std(), logits, -INF)


def temperature(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    t = params.temperature
    count = len(ranked(logits))
    if params.dynatemp_range > 0:
        p = softmax(logits)
        entropy = -sum(x * np.log(x) for x in p if x > 0)
        share = entropy / np.log(count) if count > 1 else 0
        low, high = max(0, t - params.dynatemp_range), t + params.dynatemp_range
        t = max(low + (high - low) * share**params.dynatemp_exponent, 1e-6)
    logits = logits / t
    if params.smoothing_factor > 0:
        f, largest = params.smoothing_factor, logits.max()
        k, s = (3 - params.smoothing_curve) / 2, (params.smoothing_curve - 1) / 2
        present = logits > -INF
        d = np.where(present, logits - largest, 0)
        logits = np.where(present, largest - k * f * d**2 + s * f * d**3, -INF)
    return top_n_sigma(logits, params.top_n_sigma)


def penalties(logits: np.ndarray, params: SamplingParams, history: list[int]) -> np.ndarray:
    span = params.repetition_penalty_range
    window = history[-span:] if span else history
    result = logits.copy()
    for token in set(window):
        place = max(i for i, other in enumerate(window) if other == token)
        r = repetition(params, place, len(window))
        x = logits[token] / r if logits[token] > 0 else logits[token] * r
        x -= params.presence_penalty + params.frequency_penalty * window.count(token)
        result[token] = x
    return result


def repetition(params: SamplingParams, place: int, size: int) -> float:
    r, slope, span = (
        params.repetition_penalty,
        params.repetition_penalty_slope,
        params.repetition_penalty_range,
    )
    if params.repetition_penalty_curve == "koboldcpp":
        return r if place >= size // 2 else 1 + (r - 1) * slope
    if slope == 0 or span == 0:
        return r
    x = 1.0 if span == 1 else (place + span - size) / (span - 1) * 2 - 1
    x = slope * x / (1 + abs(x) * (slope - 1))
    return 1 + (x + 1) / 2 * (r - 1)


def dry(logits: np.ndarray, params: SamplingParams, history: list[int]) -> np.ndarray:
    if params.dry_multiplier == 0:
        return logits
    window = history[-params.dry_range :] if params.dry_range else history
    longest: dict[int, int] = {}
    for end in range(1, len(window)):  # the token at `end` follows what repeats
        n = 0
        while n < end and window[end - 1 - n] == window[-1 - n]:
            if window[-1 - n] in params.dry_sequence_breakers:
                break
            n += 1
        longest[window[end]] = max(n, longest.get(window[end], 0))
    result = logits.copy()
    for token, n in longest.items():
        if n >= params.dry_allowed_length:
            exponent = n - params.dry_allowed_length
            result[token] -= params.dry_multiplier * params.dry_base**exponent
    return result


def xtc(logits: np.ndarray, threshold: float) -> np.ndarray:
    p = softmax(logits)
    over = [i for i in ranked(logits) if p[i] >= threshold]
    return keep(logits, [i for i in ranked(logits) if i not in over[:-1]])


def mirostat(logits: np.ndarray, mu: float) -> np.ndarray:
    p = softmax(logits)
    kept = [i for i in ranked(logits) if -np.log2(p[i]) <= mu]
    return keep(logits, kept or [i for i in ranked(logits) if p[i] == p.max()])


def before_samplers(
    logits: np.ndarray, params: SamplingParams, history: list[int], eos: int, step: int
) -> np.ndarray:
    """Bias, bans and DRY."""
    logits = logits.astype(np.float64)
    for token, value in params.logit_bias.items():
        logits[token] += value
    logits[list(params.banned_tokens)] = -INF
    if params.ban_eos or step < params.min_new_tokens:
        logits[eos] = -INF
    return dry(logits, params, history)


def chain(logits: np.ndarray, params: SamplingParams, history: list[int]) -> np.ndarray:
    """The seven samplers in the order of the settings."""
    steps = {
        0: lambda x: top_k(x, params.top_k),
        1: lambda x: top_a(x, params.top_a),
        2: lambda x: min_p(top_p(x, params.top_p), params.min_p),
        3: lambda x: tail_free(x, params.tfs),
        4: lambda x: typical(x, params.typical_p),
        5: lambda x: temperature(x, params),
        6: lambda x: penalties(x, params, history),
    }
    logits = logits.astype(np.float64)
    for sampler in params.sampler_order:
        logits = steps[sampler](logits)
    return logits
