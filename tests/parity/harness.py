"""Compares mtj_loader with transformers on the same random weights, for any family.

transformers creates and saves a tiny random model; we load that folder and must compute the same.
This needs the `parity` extra, so the oracle is imported late: `make test` collects these files
without torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mtj_loader
from mtj_loader.models import usable_shards
from tests.parity.cases import config_json
from tests.support.families import assert_cached_logits, assert_logits

ROWS, TOKENS = 4, 29
GREEDY_TOKENS = 20
_PROMPTS, _PROMPT_TOKENS = 12, 6  # enough that some have no near ties
_LEAD = 1e-3  # ten times what the logits of two implementations may differ by


@dataclass(frozen=True)
class Pair:
    """One model in both implementations.

    Attributes:
      theirs: the model of transformers, float32.
      folder: the same, saved.
      ids: int32 [ROWS, TOKENS].
      logits: of their model for the ids, float32 [ROWS, TOKENS, vocab_size].
    """

    theirs: Any
    folder: Path
    ids: np.ndarray
    logits: np.ndarray

    def ours(self, mesh: str, *, transposed_linear: bool = False) -> mtj_loader.Model:
        """Loaded from the folder onto a mesh."""
        return mtj_loader.load(
            self.folder, mesh, dtype="float32", transposed_linear=transposed_linear
        )

    @property
    def shard_counts(self) -> list[int]:
        """The shard counts up to eight that the model allows."""
        return usable_shards(mtj_loader.plan(self.folder, "mp=1").config, 8)


def oracle() -> Any:
    """The module that uses torch and transformers."""
    return importlib.import_module("tests.oracle.random_models")


def make_pair(family: str, name: str, folder: Path, *, seed: int = 1000) -> Pair:
    """A random model of a case, with different weights and ids from those in tests/data."""
    config = config_json(family, name)
    theirs = oracle().random_model(config, seed)
    ids = oracle().random_ids(config["vocab_size"], (ROWS, TOKENS), seed)
    theirs.save_pretrained(folder)
    return Pair(theirs, folder, ids, oracle().logits_of(theirs, ids))


def check_logits(pair: Pair) -> None:
    """Logits on every shard count, alternating between the two layouts."""
    for number, shards in enumerate(pair.shard_counts):
        model = pair.ours(f"mp={shards}", transposed_linear=number % 2 == 1)
        assert_logits(model, pair.ids, pair.logits)


def check_two_axes(pair: Pair) -> None:
    """Logits, prefill and steps on a mesh with both axes, with eight devices if possible."""
    shards = max(n for n in pair.shard_counts if n <= 4)
    model = pair.ours(f"dp=2,mp={shards}")
    assert_logits(model, pair.ids[:3], pair.logits[:3])  # dp does not divide three rows
    assert_cached_logits(model, pair.ids, pair.logits)


def check_greedy(pair: Pair) -> None:
    """Greedy text, for prompts without near ties at any step."""
    vocab_size = pair.logits.shape[-1]
    prompts = oracle().random_ids(vocab_size, (_PROMPTS, _PROMPT_TOKENS), seed=1)
    tokens, leads = oracle().greedy(pair.theirs, prompts, GREEDY_TOKENS)
    clear = leads > _LEAD
    assert clear.sum() >= 3, f"too many near ties: {np.sort(leads)}"
    model = pair.ours(f"mp={pair.shard_counts[-1]}")
    found = model.generate(prompts[clear].tolist(), max_new_tokens=GREEDY_TOKENS, temperature=0)
    np.testing.assert_array_equal(found, tokens[clear])
