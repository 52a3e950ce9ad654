"""A plan keeps what it has read, so that nothing is read or parsed twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mtj_loader
from mtj_loader.formats import hf_config
from mtj_loader.planning import planner
from mtj_loader.weights import map_reader
from tests.support import neox
from tests.support.adapters import linear, write_adapter

MODULE = "gpt_neox.layers.0.attention.dense"


@pytest.mark.parametrize("mesh", [None, "mp=2"])
def test_map_and_config_are_read_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mesh: str | None
) -> None:
    calls: list[str] = []
    read_map, normalize = map_reader.read_map, hf_config.normalize
    monkeypatch.setattr(map_reader, "read_map", lambda path: calls.append("map") or read_map(path))
    monkeypatch.setattr(
        hf_config, "normalize", lambda *a, **k: calls.append("config") or normalize(*a, **k)
    )
    adapter = write_adapter(tmp_path / "adapter", linear(MODULE, 24, 24))
    plan = mtj_loader.plan(neox.write(tmp_path), mesh, adapter=adapter)
    plan = planner.add_adapters(plan, [(adapter, 0.5)])
    plan.checkpoint.storage.close()
    assert sorted(calls) == ["config", "map"]
    assert len(plan.adapters) == 2
    assert plan.hf_config["model_type"] == plan.model_type == "gpt_neox"
    assert plan.without_adapters.adapted == ()
    assert plan.map_file == plan.weight_map.file


def test_the_plan_of_the_base_keeps_the_dtype_of_the_file(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", linear(MODULE, 24, 24))
    plan = mtj_loader.plan(neox.write(tmp_path), "mp=2", adapter=adapter)
    plan.checkpoint.storage.close()
    (adapted,) = plan.adapted
    assert adapted.dtype == "bfloat16"
    assert adapted.as_read.dtype == np.float32
    assert plan.as_read.adapters == ()
