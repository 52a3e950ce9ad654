"""LoRA against PEFT itself, live: adapters that PEFT writes, on models that transformers makes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtj_loader
from tests.parity import harness
from tests.parity.cases import CASES, NAMES

pytestmark = [
    pytest.mark.parity,
    # PEFT uses what transformers deprecates, and says what it makes of settings.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]

TOLERANCE = 1e-4  # of logits in float32

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def oracle() -> Any:
    """The module that knows torch and PEFT; imported late, as in the harness."""
    return importlib.import_module("tests.oracle.lora")


def write_adapter(pair: harness.Pair, folder: Path, **config: Any) -> np.ndarray:
    """Gives the model a random adapter and writes it; returns the adapted model's logits."""
    adapted = oracle().write_adapter(pair.theirs, folder, **config)
    return harness.oracle().logits_of(adapted, pair.ids)


def check(
    pair: harness.Pair, adapter: Path, expected: np.ndarray, mesh: str, **options: Any
) -> None:
    model = mtj_loader.load(pair.folder, mesh, dtype="float32", adapter=adapter, **options)
    assert np.abs(expected - pair.logits).max() > 100 * TOLERANCE  # the adapter does something
    np.testing.assert_allclose(model.logits(pair.ids), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", sorted(CASES))
def test_an_adapter_of_all_linear_layers(family: str, tmp_path: Path) -> None:
    name = next(name for other, name in NAMES if other == family)
    pair = harness.make_pair(family, name, tmp_path / "model")
    expected = write_adapter(
        pair, tmp_path / "adapter", r=3, lora_alpha=4, target_modules="all-linear"
    )
    check(pair, tmp_path / "adapter", expected, f"mp={pair.shard_counts[-1]}")
    check(pair, tmp_path / "adapter", expected, "mp=1", transposed_linear=True)


def llama(folder: Path) -> harness.Pair:
    return harness.make_pair("llama", next(n for f, n in NAMES if f == "llama"), folder)


def test_an_adapter_of_all_linear_layers_of_gpt_neox(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt_neox",
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 40,
        "vocab_size": 53,
        "max_position_embeddings": 64,
        "rotary_pct": 0.5,
    }
    theirs = harness.oracle().random_model(config, 1000)
    theirs.save_pretrained(tmp_path / "model")
    ids = harness.oracle().random_ids(53, (2, 11), 1000)
    logits = harness.oracle().logits_of(theirs, ids)
    pair = harness.Pair(theirs, tmp_path / "model", ids, logits)
    settings = {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"}
    expected = write_adapter(pair, tmp_path / "adapter", **settings)
    check(pair, tmp_path / "adapter", expected, "dp=2,mp=4")
    check(pair, tmp_path / "adapter", expected, "mp=1", transposed_linear=True)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*_proj": 9}},
        {"fan_in_fan_out": True},  # PEFT drops it for linear layers, with a warning
        {"target_modules": ["embed_tokens", "down_proj"]},
    ],
    ids=["rslora", "patterns", "fan_in_fan_out", "embedding"],
)
def test_settings_of_an_adapter(config: dict, tmp_path: Path) -> None:
    pair = llama(tmp_path / "model")
    targets = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    expected = write_adapter(pair, tmp_path / "adapter", **targets | config)
    if config.get("fan_in_fan_out"):  # written as it was asked for
        path = tmp_path / "adapter/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    check(pair, tmp_path / "adapter", expected, f"mp={pair.shard_counts[-1]}")


def mixtral(folder: Path) -> harness.Pair:
    return harness.make_pair("mixtral", next(n for f, n in NAMES if f == "mixtral"), folder)


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("original_format", [True, False])
def test_an_adapter_on_fused_experts(
    expert_parallel: bool, original_format: bool, tmp_path: Path
) -> None:
    pair = mixtral(tmp_path / "model")
    pair.theirs.save_pretrained(pair.folder, save_original_format=original_format)
    config = {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS}
    expected = write_adapter(pair, tmp_path / "adapter", r=3, lora_alpha=7, **config)
    check(pair, tmp_path / "adapter", expected, "mp=2", expert_parallel=expert_parallel)


def test_an_adapter_on_the_old_layout_and_what_transformers_makes_of_it(tmp_path: Path) -> None:
    pair = mixtral(tmp_path / "model")
    config = pair.theirs.config
    old = oracle().write_old_adapter(tmp_path / "old", config)
    pair.theirs.load_adapter(str(old))
    expected = harness.oracle().logits_of(pair.theirs, pair.ids)
    pair.theirs.save_pretrained(tmp_path / "converted")
    check(pair, old, expected, "mp=2")
    check(pair, tmp_path / "converted", expected, "mp=2", expert_parallel=True)
