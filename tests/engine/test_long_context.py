"""How long a context may be with each rope type, and text beyond the trained length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import MemoryLimitError, PromptError
from tests.support import neox

TRAINED = 32  # of neox.CONFIG
DYNAMIC = {"type": "dynamic", "factor": 2.0}
LONGEST: list[tuple[dict[str, Any] | None, int]] = [
    (None, TRAINED),
    ({"type": "linear", "factor": 2.5}, 80),
    ({"type": "linear", "factor": 0.5}, TRAINED),
    ({"type": "linear", "factor": 1e30}, 2**31 - 1),
    ({"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}, 256),
    (DYNAMIC, 2**31 - 1),
]


@pytest.mark.parametrize(("rope", "longest"), LONGEST)
def test_the_longest_context(tmp_path: Path, rope: dict[str, Any] | None, longest: int) -> None:
    plan = mtj_loader.plan(neox.write(tmp_path, rope_scaling=rope), "mp=1")
    assert plan.config.max_positions == longest


def test_a_stretched_context_has_an_end(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    model = mtj_loader.load(folder, "mp=1", dtype="float32", progress=False)
    prompt = [i % 29 for i in range(60)]
    assert len(model.generate(prompt, max_new_tokens=4)) == 4
    with pytest.raises(PromptError, match="at most 64 tokens"):
        model.generate(prompt, max_new_tokens=5)


def test_dynamic_rope_takes_effect_beyond_the_trained_length(tmp_path: Path) -> None:
    """Greedy text is what the full forward of as many tokens prefers, and depends on the factor."""
    prompt = np.random.default_rng(0).integers(0, 29, 50).tolist()
    texts = {}
    for factor in (2.0, 8.0):
        folder = neox.write(tmp_path / str(factor), rope_scaling=DYNAMIC | {"factor": factor})
        model = mtj_loader.load(folder, "mp=2", dtype="float32", progress=False)
        text = model.generate(prompt, max_new_tokens=6, temperature=0)
        logits = np.asarray(model.logits([prompt + text]))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text
        texts[factor] = logits
    assert not np.allclose(texts[2.0], texts[8.0], atol=1e-3)


def test_a_context_that_does_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    folder = neox.write(tmp_path, rope_scaling=DYNAMIC)
    model = mtj_loader.load(folder, "mp=2", progress=False)
    with pytest.raises(MemoryLimitError, match="KV cache does not fit") as caught:
        model.generate([[1, 2], [3]], max_new_tokens=2**31 - 10)
    assert caught.value.hint is not None
