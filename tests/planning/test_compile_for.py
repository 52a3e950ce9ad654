"""Asking the TPU compiler: what the child processes are asked, how they end, and the tables."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import mtj_loader
from mtj_loader.errors import CheckpointError, MachineError, UsageError
from mtj_loader.planning import compile_for
from mtj_loader.planning.compiled_fit import (
    Collectives,
    CompiledFit,
    CompiledProgram,
    Memory,
    OperationCost,
)
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.tpu_fit import SLICES
from mtj_loader.planning.tpu_targets import TARGETS
from mtj_loader.tpu_compiler.measure import Line, search_largest, shortfall_bytes
from tests.support import neox
from tests.support.command_line import run

PROGRAM = CompiledProgram(
    compile_seconds=2.5,
    parameter_bytes=1_000,
    argument_bytes=1_500,
    temporary_bytes=20,
    program_bytes=3,
    collectives=(Collectives("all-reduce", 4, 96),),
    weight_copies=(),
    xla_seconds=None,
    schedule_seconds=0.0015,
    hbm_bytes=1_400,
    operations=(OperationCost("jit(run)/layer/dot_general", 2, 0.001, 1_200),),
)
FIT = CompiledFit(
    "v5e-8",
    dp=2,
    mp=4,
    slots=2,
    context=32,
    available_bytes=16_911_433_728,
    memory=Memory(1_000, 500, 20, 6),
    programs={"prefill": PROGRAM, "decode": PROGRAM},
    largest_context=32,
    largest_slots=512,
    limit_seconds=0.001,
)


def make_plan(folder: Path) -> LoadPlan:
    plan = mtj_loader.plan(neox.write(folder), "mp=2")
    plan.checkpoint.storage.close()
    return plan


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadPlan:
    monkeypatch.setattr(compile_for, "find_spec", lambda _: object())  # libtpu
    return make_plan(tmp_path)


def answer_with(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Replaces the child process by a script."""
    monkeypatch.setattr(compile_for, "_CHILD", (sys.executable, "-c", script))


def test_the_answer_of_a_child(plan: LoadPlan, monkeypatch: pytest.MonkeyPatch):
    document = json.dumps(FIT.to_dict())
    answer_with(monkeypatch, f"import sys; sys.stdin.read(); print({document!r})")
    assert plan.compile_for("v5e-8") == (FIT,)
    assert FIT.fits


def test_what_a_child_is_asked(plan: LoadPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = tmp_path / "asked.json"
    script = (
        f"import os, sys, json; open({str(asked)!r}, 'w').write(sys.stdin.read()); "
        f"assert os.environ['JAX_PLATFORMS'] == 'cpu'; print({json.dumps(FIT.to_dict())!r})"
    )
    answer_with(monkeypatch, script)
    plan.compile_for(["v5e-8"], slots=3)
    request = compile_for.Request(**json.loads(asked.read_text()))
    assert request.config == plan.hf_config
    assert (request.name, request.slots, request.context) == ("v5e-8", 3, 32)


def test_a_child_that_crashes_fails_its_slice_only(plan: LoadPlan, monkeypatch: pytest.MonkeyPatch):
    script = "import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.SIGABRT)"
    answer_with(monkeypatch, script)
    found = plan.compile_for(["v3-8", "v4-8"])
    assert [fit.name for fit in found] == ["v3-8", "v4-8"]
    assert [(fit.dp, fit.mp) for fit in found] == [(2, 4), (1, 4)]
    assert found[0].failure == "the compiler ended with SIGABRT: no message"
    assert not found[0].fits
    summary = plan.summary(found)
    assert "v3-8: the compiler ended with SIGABRT" in summary
    assert "compiled" not in summary.replace("the compiler", "")


def test_the_last_line_of_an_error_is_reported(plan: LoadPlan, monkeypatch: pytest.MonkeyPatch):
    answer_with(monkeypatch, "import sys; sys.stdin.read(); raise ValueError('too odd')")
    (fit,) = plan.compile_for("v3-8")
    assert fit.failure == "the compiler ended with exit code 1: ValueError: too odd"


def test_a_child_that_hangs_is_ended(plan: LoadPlan, monkeypatch: pytest.MonkeyPatch):
    answer_with(monkeypatch, "import time; time.sleep(600)")
    (fit,) = plan.compile_for("v3-8", limit_seconds=0.2)
    assert fit.failure == "the compiler took more than 0.2 seconds"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"names": "v9-8"}, "compile_for"),
        ({"names": "v3-8", "slots": 0}, "slots"),
        ({"names": "v3-8", "context": 33}, "context"),
    ],
)
def test_wrong_options(plan: LoadPlan, options: dict, key: str):
    with pytest.raises(UsageError) as caught:
        plan.compile_for(**options)
    assert caught.value.key == key


def test_without_libtpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_for, "find_spec", lambda _: None)
    with pytest.raises(MachineError) as caught:
        make_plan(tmp_path).compile_for("v3-8")
    assert str(caught.value) == (
        "libtpu, the TPU compiler, is not installed\n  hint: pip install 'mtj-loader[tpu]'"
    )


# Tables and JSON.


def test_the_table_says_what_is_estimated_and_what_is_compiled(plan: LoadPlan):
    lines = plan.summary([FIT]).splitlines()
    rows = [line.split() for line in lines if line.lstrip().startswith("v5e-8")]
    assert rows[0][-3:-1] == ["yes", "compiled"]
    assert rows[1][:4] == ["v5e-8", "2", "x", "32"]
    assert rows[1][4:] == ["1,000", "500", "20", "6", "16,911,433,728", "512", "32"]
    assert " ".join(rows[2]) == "v5e-8 prefill 2.5 s 4 all-reduce, 96 B none 1.50 ms"
    assert " ".join(rows[3]) == "v5e-8 decode 2.5 s 4 all-reduce, 96 B none 1.00 ms 1.50 ms"
    (estimated,) = [line for line in lines if line.lstrip().startswith("v3-8")]
    assert estimated.split()[-2] == "estimate"


def test_a_model_that_does_not_fit_has_a_row_with_its_shortfall(plan: LoadPlan):
    too_large = CompiledFit("v2-8", 2, 4, 1, 32, 8_036_286_464, shortfall_bytes=3_715_146_711)
    (row,) = [line for line in plan.summary([too_large]).splitlines() if "v2-8" in line]
    assert "no, 3.72 GB too large   compiled" in row
    document = plan.to_dict([too_large])
    assert document["compiled"] == [too_large.to_dict()]
    fits = document["fits"]
    assert isinstance(fits, list)
    assert [(fit["fits"], fit["basis"]) for fit in fits[:2]] == [
        (False, "compiled"),
        (True, "estimate"),
    ]


def test_a_fit_is_the_same_after_json():
    assert CompiledFit.from_dict(json.loads(json.dumps(FIT.to_dict()))) == FIT
    assert asdict(FIT).items() <= FIT.to_dict().items()


def test_every_published_slice_can_be_compiled_for():
    assert list(TARGETS) == [slice_.name for slice_ in SLICES]
    for target in TARGETS.values():
        share = target.available_bytes / target.slice.hbm_bytes
        assert 0.93 < share < 1.01  # v5p has 96 GiB, of which 95 are published


# The search, and XLA's message.


def test_shortfall_of_a_message():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (10.94G) exceeds available HBM (7.48G)."
    )
    assert shortfall_bytes(message) == int(3.46 * 2**30)
    assert shortfall_bytes("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("largest", "step", "limit", "expected"),
    [(1000, 1, 4096, 1000), (1000, 128, 4096, 896), (9000, 1, 4096, 4096), (2, 1, 4096, 2)],
)
def test_search_finds_the_largest_number_that_fits(largest, step, limit, expected):
    tried = []

    def measured(number: int) -> int:
        tried.append(number)
        return 10 * (largest - number)

    line = Line(0 if step > 1 else 1, 10 * (largest - (0 if step > 1 else 1)), 10)
    assert search_largest(measured, line, step, limit) == expected
    assert len(tried) <= 2


def test_search_steps_back_if_temporaries_grow():
    def measured(number: int) -> int:
        return 10_000 - 11 * number

    assert search_largest(measured, Line(1, 9_990, 10), 1, 4096) in (908, 909)


# Plans without weights.


def test_a_folder_with_nothing_but_a_config_is_planned(tmp_path: Path):
    whole = mtj_loader.plan(neox.write(tmp_path / "whole"), "mp=2")
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    plan = mtj_loader.plan(folder, "mp=2")
    assert plan.warnings == ("there are no weights here; this is what config.json says",)
    assert plan.device_bytes == whole.device_bytes
    shapes = [
        {(p.spec.path, p.spec.param): p.array_shape for p in each.params} for each in (plan, whole)
    ]
    assert shapes[0] == shapes[1]
    assert plan.bytes_of_hosts == {0: 0}
    assert "←" not in plan.summary().split("all layers")[1]
    with pytest.raises(CheckpointError, match="made without weights"):
        mtj_loader.load(plan=plan)
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        mtj_loader.load(folder, "mp=2")
    result = run("plan", folder, "--mesh", "mp=2", "--json")
    assert json.loads(result.stdout)["warnings"] == list(plan.warnings)


def test_weights_of_another_format_are_still_an_error(tmp_path: Path):
    neox.write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        mtj_loader.plan(tmp_path, "mp=2")
