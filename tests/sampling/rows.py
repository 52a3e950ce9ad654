"""Calls the samplers with one SamplingParams per row."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from mtj_loader.sampling.chain import apply_samplers
from mtj_loader.sampling.choose import Choice, choose
from mtj_loader.sampling.params import SamplingParams
from mtj_loader.sampling.row_settings import RowSettings, row_settings

EOS = 1
GARBAGE = 2**31 - 1
TOP = 3

_apply = jax.jit(apply_samplers)
_choose = jax.jit(choose, static_argnames="top")


def stack(params: Sequence[SamplingParams], vocab_size: int) -> RowSettings:
    rows = [row_settings(p, vocab_size=vocab_size, eos_ids=[EOS]) for p in params]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def pad(histories: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The histories as an array [b, length], and their lengths."""
    array = np.full((len(histories), length), GARBAGE, np.int32)
    for row, history in zip(array, histories, strict=True):
        row[: len(history)] = history
    return array, np.array([len(history) for history in histories], np.int32)


def run_chain(
    logits: np.ndarray, params: Sequence[SamplingParams], histories: Sequence[Sequence[int]], t: int
) -> np.ndarray:
    history, lengths = pad(histories, t)
    return np.asarray(_apply(logits, history, lengths, stack(params, logits.shape[1])))


def run(
    logits: np.ndarray,
    params: Sequence[SamplingParams],
    *,
    histories: Sequence[Sequence[int]] | None = None,
    steps: Sequence[int] | int = 0,
    mu: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
) -> Choice:
    """One choice per row, as numpy arrays."""
    logits = np.asarray(logits, np.float32)
    settings = stack(params, logits.shape[1])
    history, lengths = pad(histories or [[]] * len(params), 16)
    steps = np.broadcast_to(np.int32(steps), lengths.shape)
    mu = settings.initial_mu if mu is None else mu
    choice = _choose(logits, settings, history, lengths, steps, mu, allowed, top=TOP)
    return jax.tree.map(np.asarray, choice)


def draw(logits: Sequence[float] | np.ndarray, count: int, params: SamplingParams) -> np.ndarray:
    """The tokens of `count` rows that differ only in their seeds: 0, 1, …"""
    logits = np.asarray(logits, np.float32)

    def repeat(x: np.ndarray) -> np.ndarray:
        return np.repeat(np.asarray(x)[None], count, axis=0)

    settings = jax.tree.map(repeat, row_settings(params, vocab_size=len(logits), eos_ids=[EOS]))
    settings.key[:, 1] = np.arange(count)
    history, zeros = np.zeros((count, 1), np.int32), np.zeros(count, np.int32)
    arguments = (repeat(logits), settings, history, zeros, zeros, settings.initial_mu, None)
    return np.asarray(_choose(*arguments, top=TOP).tokens)
