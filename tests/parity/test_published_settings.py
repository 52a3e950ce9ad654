"""Settings of published files, scaled down: logits equal to those of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mtj_loader
from tests.parity import harness
from tests.parity.published_cases import PUBLISHED
from tests.support.families import assert_logits

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits(name: str, tmp_path: Path) -> None:
    oracle = harness.oracle()
    config = {"model_type": name.split("-", maxsplit=1)[0], **PUBLISHED[name]}
    # Sinusoids that are made in half precision would stay rounded.
    theirs = oracle.random_model({**config, "torch_dtype": None, "dtype": "float32"}, seed=5)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = oracle.random_ids(config["vocab_size"], (2, 13), seed=6)
    model = mtj_loader.load(tmp_path, "mp=1", dtype="float32", progress=False)
    assert_logits(model, ids, oracle.logits_of(theirs, ids))
