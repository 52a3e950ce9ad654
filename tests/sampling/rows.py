"""Calls the samplers with one SamplingParams per row.

Rows and vocabularies are padded to a few shapes, so that few programs are compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from mtj_loader.sampling.chain import apply_samplers
from mtj_loader.sampling.choose import Choice, choose
from mtj_loader.sampling.params import SamplingParams
from mtj_loader.sampling.row_settings import RowSettings, neutral_rows, row_settings

EOS = 1
TOP = 3
ROWS, VOCAB, TIME = 16, 300, 16  # the shape of `run`
CHAIN_ROWS, CHAIN_VOCAB, CHAIN_TIME = 64, 11, 24  # the shape of `run_chain`

apply_jitted = jax.jit(apply_samplers)
choose_jitted = jax.jit(choose, static_argnames="top")


def stack(
    params: Sequence[SamplingParams], vocab_size: int, rows: int | None = None
) -> RowSettings:
    """The settings of all rows, with neutral ones after them."""
    settings = neutral_rows(rows or len(params), vocab_size=vocab_size)
    for i, row in enumerate(params):
        write_row(settings, i, row_settings(row, vocab_size=vocab_size, eos_ids=[EOS]))
    return settings


def write_row(settings: RowSettings, i: int, row: RowSettings) -> None:
    for array, value in zip(jax.tree.leaves(settings), jax.tree.leaves(row), strict=True):
        array[i] = value


def pad(
    histories: Sequence[Sequence[int]], rows: int, length: int, garbage: int = 2**31 - 1
) -> tuple[np.ndarray, np.ndarray]:
    """The histories as an array [rows, length], and their lengths."""
    array, lengths = np.full((rows, length), garbage, np.int32), np.zeros(rows, np.int32)
    for i, history in enumerate(histories):
        array[i, : len(history)] = history
        lengths[i] = len(history)
    return array, lengths


def run_chain(
    logits: np.ndarray, params: Sequence[SamplingParams], histories: Sequence[Sequence[int]]
) -> np.ndarray:
    """What the samplers make of the logits [n, CHAIN_VOCAB], 64 rows at a time."""
    results = []
    for first in range(0, len(params), CHAIN_ROWS):
        part = slice(first, first + CHAIN_ROWS)
        count = len(params[part])
        padded = np.zeros((CHAIN_ROWS, CHAIN_VOCAB), np.float32)
        padded[:count] = logits[part]
        settings = stack(params[part], CHAIN_VOCAB, CHAIN_ROWS)
        arrays = pad(histories[part], CHAIN_ROWS, CHAIN_TIME)
        results.append(np.asarray(apply_jitted(padded, *arrays, settings))[:count])
    return np.concatenate(results)


def run(
    logits: Sequence[Sequence[float]] | np.ndarray,
    params: Sequence[SamplingParams],
    *,
    histories: Sequence[Sequence[int]] = (),
    step: int = 0,
    mu: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
    garbage: int = 2**31 - 1,
) -> Choice:
    """One choice per row, as numpy arrays; at most 16 rows, and less than 300 tokens."""
    count, tokens = np.shape(logits)
    padded = np.full((ROWS, VOCAB), -np.inf, np.float32)
    padded[:count, :tokens] = logits
    padded[count:] = 0
    settings = stack(params, VOCAB, ROWS)
    arrays = pad(histories, ROWS, TIME, garbage)
    all_mu = settings.initial_mu
    if mu is not None:
        all_mu[:count] = mu
    steps = np.full(ROWS, step, np.int32)
    choice = choose_jitted(padded, settings, *arrays, steps, all_mu, allowed, top=TOP)
    return jax.tree.map(lambda x: np.asarray(x)[:count], choice)


def draw(
    logits: Sequence[float] | np.ndarray, params: SamplingParams, steps: np.ndarray | None = None
) -> np.ndarray:
    """The tokens of 8000 rows that differ in their seeds, or if given in their steps only."""
    count = 8000
    logits = np.asarray(logits, np.float32)

    def repeat(x: np.ndarray) -> np.ndarray:
        return np.repeat(np.asarray(x)[None], count, axis=0)

    settings = jax.tree.map(repeat, row_settings(params, vocab_size=len(logits), eos_ids=[EOS]))
    history, zeros = np.zeros((count, 1), np.int32), np.zeros(count, np.int32)
    if steps is None:
        settings.key[:, 1] = np.arange(count)
        steps = zeros
    arguments = (repeat(logits), settings, history, zeros, steps, settings.initial_mu, None)
    return np.asarray(choose_jitted(*arguments, top=TOP).tokens)
