"""What programs depend on, and the sentences about differences."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mtj_loader.programs import cpu_features as cpu_module
from mtj_loader.programs import facts as facts_module
from mtj_loader.programs.cpu_features import cpu_features
from mtj_loader.programs.facts import ProgramFacts, differences
from tests.support.models import GOLDENS, config_of, make_mesh
from tests.support.programs import collect_facts


def change(section: str, **values: str | None) -> list[str]:
    """The differences if the stored facts have other values; None removes one."""
    wanted = collect_facts()
    merged = {**getattr(wanted, section), **values}
    stored = {key: value for key, value in merged.items() if value is not None}
    return differences(replace(wanted, **{section: stored}), wanted)


def test_equal_facts_have_no_differences():
    assert differences(collect_facts(), collect_facts()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"slots": 8}, "compiled for slots 8, this is 4"),
        ({"context": 128}, "compiled for context 128, this is 64"),
        ({"dtype": np.dtype("float16")}, "compiled for dtype float16, this is float32"),
        ({"transposed_linear": True}, "compiled for transposed_linear True, this is False"),
    ],
)
def test_options(options: dict, sentence: str):
    assert differences(collect_facts(**options), collect_facts()) == [sentence]


def test_mesh_and_order_of_devices():
    found = differences(collect_facts(make_mesh(1, 8)), collect_facts(make_mesh(2, 4)))
    assert found == ["compiled for mesh dp=1,mp=8, this is dp=2,mp=4"]
    mesh = make_mesh(1, 2)
    swapped = jax.sharding.Mesh(mesh.devices[:, ::-1], mesh.axis_names)
    assert differences(collect_facts(swapped), collect_facts(mesh)) == [
        "compiled for devices 1,0, this is 0,1"
    ]


def test_configs():
    @dataclass(frozen=True)
    class Config:
        layers: int = 2
        table: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(3))

    options = {"dtype": np.dtype("float32"), "slots": 1, "context": 1, "transposed_linear": False}
    facts = [
        ProgramFacts.collect(config, make_mesh(1, 1), **options)
        for config in (Config(), Config(), Config(3), Config(table=np.arange(4)))
    ]
    assert differences(facts[0], facts[1]) == []
    for other in facts[2:]:
        assert differences(other, facts[0]) == ["compiled for another config"]


@pytest.mark.parametrize("folder", [GOLDENS / "gpt_neox", GOLDENS / "gpt_neox_serial"])
def test_a_real_config_has_a_digest(folder: Path):
    assert len(facts_module._digest_config(config_of(folder))) == 64


def test_versions():
    assert change("versions", jax="0.9.0") == [
        f"compiled with jax 0.9.0, this is {jax.__version__}"
    ]
    assert change("versions", libtpu="0.1") == ["compiled with libtpu 0.1, which is not installed"]
    assert change("versions", jax=None) == [f"compiled without jax {jax.__version__}"]
    assert change("versions", source="0") == ["compiled by other source code of mtj_loader"]


def test_platforms():
    assert change("platform", device_kind="TPU v4") == [
        "compiled for device_kind TPU v4, this is cpu"
    ]


def test_features_of_the_cpu():
    own = collect_facts().platform["cpu_features"]
    assert change("platform", cpu_features=f"{own} avx9") == [
        "compiled for a CPU with avx9, which this one lacks"
    ]
    first, rest = own.split(" ", 1)
    assert change("platform", cpu_features=rest) == [
        f"compiled for a CPU without {first}, which this one has"
    ]
    many = " ".join(f"z{i}" for i in range(10))
    (sentence,) = change("platform", cpu_features=f"{own} {many}")
    assert sentence.endswith("z6, z7 and 2 more, which this one lacks")


def test_unknown_features_equal_nothing(monkeypatch):
    monkeypatch.setattr(facts_module, "cpu_features", lambda: "")
    assert differences(collect_facts(), collect_facts()) == [
        "the features of this CPU cannot be read"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: b a\nflags\t\t: a b c\n", "a b"),  # all processors have them
        ("Features\t: fp asimd\nCPU part\t: 0xd0c\n", "asimd fp"),
        ("model name\t: unknown\n", ""),
    ],
)
def test_cpu_info(tmp_path: Path, monkeypatch, text: str, expected: str):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu_module, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu_module.platform, "machine", lambda: "machine")
    found = cpu_features.__wrapped__()
    assert found == (f"machine {expected}" if expected else "")
    monkeypatch.setattr(cpu_module, "_CPU_INFO", tmp_path / "missing")
    assert cpu_features.__wrapped__() == ""


def test_flags_of_xla(monkeypatch):
    wanted = collect_facts()
    flags = wanted.settings["XLA_FLAGS"]
    assert "device_count" not in flags  # the mesh says that
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_b=1 --xla_a=2")
    assert differences(collect_facts(), wanted) == [
        f"compiled with XLA_FLAGS = --xla_a=2 --xla_b=1, here it is {flags}"
    ]


def test_options_of_jax():
    wanted = collect_facts()
    with jax.default_matmul_precision("highest"):
        stored = collect_facts()
    assert differences(stored, wanted) == [
        "compiled with jax_default_matmul_precision = highest, here it is None"
    ]


def test_versions_of_platforms_are_comparable():
    """Only a client with devices names the interface."""
    text = "TFRT TPU v5 lite\nBuilt on Nov 5"
    normalize = facts_module._normalize_version
    assert normalize(text) == normalize(f"PJRT C API\n{text}") == "TFRT TPU v5 lite Built on Nov 5"
