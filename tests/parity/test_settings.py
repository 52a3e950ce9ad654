"""The list of keys that transformers reads: it is up to date, and no running model reads others."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from mtj_loader.formats.known_settings import reads
from mtj_loader.models import FAMILIES
from tests.parity.cases import CASES, config_json

# Functions that read any key: they save, check or wrap a model of any kind.
_ANY_KEY = {
    "to_dict", "from_config", "init_parallel_plans", "validate_architecture",
    "validate_rope", "validate_token_ids", "wrapper", "<dictcomp>",
}  # fmt: skip

pytestmark = pytest.mark.parity


def test_the_list_is_what_the_script_makes() -> None:
    script = importlib.import_module("tests.oracle.list_settings")
    assert set(FAMILIES) <= set(script.MODEL_TYPES)
    assert script.as_text(script.settings()) == script.FILE.read_text()


@pytest.mark.parametrize("family", CASES)
def test_a_running_model_reads_no_other_key(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = importlib.import_module("tests.oracle.random_models")
    read: set[str] = set()
    base = transformers.PreTrainedConfig
    original = base.__getattribute__

    def record(self: Any, key: str) -> Any:
        if type(self).model_type == family and sys._getframe(1).f_code.co_name not in _ANY_KEY:
            read.add(key)
        return original(self, key)

    monkeypatch.setattr(base, "__getattribute__", record)
    config = config_json(family, next(iter(CASES[family])))
    model = oracle.random_model(config, seed=0)
    oracle.logits_of(model, oracle.random_ids(config["vocab_size"], (1, 5), seed=0))
    monkeypatch.undo()
    keys = {
        k
        for k in read
        if not k.startswith("__") and not callable(getattr(type(model.config), k, None))
    }
    assert len(keys) > 20
    if not hasattr(model.config, "rope_parameters"):
        keys -= {"rope_parameters"}  # PreTrainedConfig looks for it
    assert {key for key in keys if not reads(family, key)} == set()
