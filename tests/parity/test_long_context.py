"""Logits beyond the trained length, for every rope type that stretches the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mtj_loader
from tests.parity import harness
from tests.support.families import assert_logits

pytestmark = pytest.mark.parity

TRAINED, TOKENS = 12, 37
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 53,
    "max_position_embeddings": TRAINED,
}
PAIRS = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
LONGROPE = {"type": "longrope", "short_factor": [1.0] * PAIRS, "long_factor": [1.0, 2.0, 3.0, 4.0]}
CASES: dict[str, tuple[dict[str, Any], int]] = {  # a rope section, and the longest context
    "linear": ({"type": "linear", "factor": 4.0}, 48),
    "dynamic": ({"type": "dynamic", "factor": 2.0}, 2**31 - 1),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}, 40),
    "yarn_mscale": (
        {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
        48,
    ),
    "llama3": (
        {
            "type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 10,
        },
        40,
    ),
    "longrope": ({**LONGROPE, "factor": 4.0, "original_max_position_embeddings": 10}, 40),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_beyond_the_trained_length(name: str, tmp_path: Path) -> None:
    rope, longest = CASES[name]
    oracle = harness.oracle()
    theirs = oracle.random_model({"model_type": "llama", **SIZES, "rope_scaling": rope}, seed=3)
    theirs.save_pretrained(tmp_path)
    ids = oracle.random_ids(SIZES["vocab_size"], (2, TOKENS), seed=4)
    model = mtj_loader.load(tmp_path, "mp=2", dtype="float32", progress=False)
    assert model.config.max_positions == longest
    assert_logits(model, ids, oracle.logits_of(theirs, ids))
    assert len(model.generate(ids[0].tolist(), max_new_tokens=3, temperature=0)) == 3
    short = ids[:, : TRAINED - 1]  # after a long row, transformers goes back below TRAINED only
    assert_logits(model, short, oracle.logits_of(theirs, short))
