"""Every family's programs compile for real TPUs, copy no weight and have no needless collective.

`make tpu` compiles for the slices below, `make tpu-all` (`MTJ_TPU_ALL=1`) for every slice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

import mtj_loader
from mtj_loader.planning.compiled_fit import CompiledProgram
from mtj_loader.planning.tpu_fit import SLICES
from tests.tpu.models import CONFIGS, KINDS

pytestmark = pytest.mark.tpu

ALL = os.environ.get("MTJ_TPU_ALL") == "1"
OTHERS = [slice_.name for slice_ in SLICES] if ALL else ["v3-8", "v4-8", "v6e-8"]
CASES = [(family, "v5e-8") for family in CONFIGS] + [
    (family, name) for name in OTHERS for family in (CONFIGS if ALL else KINDS) if name != "v5e-8"
]

# In each layer the shards' terms are summed once for the attention and once for the feed-forward,
# or once for both where these run in parallel.
PARALLEL = ("gpt_neox", "gptj")
# Besides, the rows of the vocabulary's parts are summed; GPT-J also sums its embedding's bias.
EMBEDDING = {"gptj": 2}
# Logits are gathered; learned positions have split columns, which are gathered too.
GATHERS = {"opt": 2, "gpt_neo": 2}


def expected_collectives(family: str, mp: int) -> Counter[str]:
    """The collectives of a program of two layers."""
    if mp == 1:
        return Counter()
    sums = EMBEDDING.get(family, 1) + 2 * (1 if family in PARALLEL else 2)
    return Counter({"all-reduce": sums, "all-gather": GATHERS.get(family, 1)})


def found_collectives(program: CompiledProgram) -> Counter[str]:
    return Counter({one.kind: one.count for one in program.collectives})


def write_config(folder: Path, family: str) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIGS[family] | {"model_type": family}))
    return folder


@pytest.mark.parametrize(("family", "name"), CASES)
def test_programs(family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_FLAGS")  # those of tests on CPUs
    plan = mtj_loader.plan(write_config(tmp_path, family), "mp=1")
    (fit,) = plan.compile_for(name, context=256, search=False)
    assert fit.failure is None
    assert fit.mp == next(slice_.devices for slice_ in SLICES if slice_.name == name)
    assert fit.programs.keys() == {"prefill", "decode"}
    for program in fit.programs.values():
        assert program.weight_copies == ()
        assert found_collectives(program) == expected_collectives(family, fit.mp)


def test_parameters_take_the_planned_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On devices they also take the padding of tiles: two rows for a bias of [1, d]."""
    monkeypatch.delenv("XLA_FLAGS")
    plan = mtj_loader.plan(write_config(tmp_path, "llama"), "mp=8")
    (fit,) = plan.compile_for("v5e-8", context=256, search=False)
    assert fit.memory is not None
    assert 1 <= fit.memory.parameters / plan.device_bytes < 1.01
    cache = 256 * plan.config.cache_bytes_per_token(8, plan.params[0].dtype)
    assert 0 <= fit.memory.cache - cache < 1 << 20  # and the other inputs of a step
