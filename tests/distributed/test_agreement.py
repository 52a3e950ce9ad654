"""What hosts compare before a load."""

from __future__ import annotations

from pathlib import Path

import mtj_loader
from mtj_loader.distributed.agreement import plan_facts
from tests.support import neox
from tests.support.adapters import linear, write_adapter

MODULE = "gpt_neox.layers.0.attention.query_key_value"


def test_hosts_compare_the_settings_of_adapters(tmp_path: Path) -> None:
    model, mesh = neox.write(tmp_path / "model"), mtj_loader.make_mesh("mp=1")
    tensors = linear(MODULE, 72, 24)
    settings = [{"alpha_pattern": {MODULE: 2}}, {"alpha_pattern": {MODULE: 2}}, {"lora_alpha": 3}]
    facts = []
    for i, changed in enumerate(settings):
        adapter = write_adapter(tmp_path / str(i), tensors, **changed)
        facts.append(plan_facts(mtj_loader.plan(model, mesh, adapter=adapter), mesh))
    equal, same, other = facts
    assert equal == same
    assert [name for name in equal if equal[name] != other[name]] == ["adapters"]
