"""`mtj-loader compile`, and starting with what it has stored."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mtj_loader
from mtj_loader.engine.find_programs import collect_facts
from mtj_loader.engine.keys import INIT
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import ProgramError, UsageError
from mtj_loader.programs import default_programs_folder
from tests.support import neox
from tests.support.command_line import ROOT, run

PROGRAMS = ["init-1x1", "prefill-1x16", "choose-1x1", "step-1x1", "decode-1x8", "score-1x16"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return neox.write(tmp_path_factory.mktemp("checkpoint"))


Compile = Callable[[str], tuple[Path, dict]]


@pytest.fixture(scope="module")
def compile_for(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles for a mesh, once: a folder of programs, and what the command has printed."""
    alone = tmp_path_factory.mktemp("config")  # no weights
    shutil.copy(checkpoint / "config.json", alone)

    @functools.cache
    def compile_once(mesh: str) -> tuple[Path, dict]:
        folder = tmp_path_factory.mktemp("compiled") / "programs"
        options = ["--slots", 2 if "dp=2" in mesh else 1, "--dtype", "float32", "--no-progress"]
        done = run("compile", alone, "--mesh", mesh, "--out", folder, *options, "--json")
        assert done.exit_code == 0, done.output
        return folder, json.loads(done.stdout)

    return compile_once


@pytest.fixture(params=["mp=2", "dp=2,mp=1"])
def mesh(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stored(compile_for: Compile) -> Path:
    """Programs for mp=2, float32, one slot of 32 tokens."""
    return compile_for("mp=2")[0]


def test_it_reports_what_it_stored(compile_for: Compile, mesh: str):
    folder, found = compile_for(mesh)
    assert [program["name"] for program in found["programs"]] == PROGRAMS
    for program in found["programs"]:
        assert program["bytes"] == (folder / f"{program['name']}.xla").stat().st_size
        assert program["compile_seconds"] > 0
    assert found["context_length"] == neox.CONFIG["max_position_embeddings"]
    assert found["slots"] == found["mesh"]["dp"]
    assert (found["platform"], found["dtype"]) == ("cpu", "float32")


FRESH = """
import json, sys
import jax

events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))

import mtj_loader

folder, mesh, programs = sys.argv[1:]
model = mtj_loader.load(folder, mesh, dtype="float32", programs=programs, warm_up=[(1, 3, 9)])
texts = [
    model.generate([3, 1, 4], max_new_tokens=9, temperature=0.0),
    list(model.stream([3, 1, 4], max_new_tokens=3, seed=5)),
    model.generate([3, 1, 4], max_new_tokens=1, temperature=0.0, prompt_logprobs=True),
]
compilations = [event for event in events if "/compile/" in event or "cache" in event]
print(json.dumps([texts, compilations, model.report.to_dict()]))
"""


def test_a_fresh_process_neither_traces_nor_compiles(
    compile_for: Compile, checkpoint: Path, mesh: str
):
    folder, _ = compile_for(mesh)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(checkpoint), mesh, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts, compilations, report = json.loads(done.stdout)
    assert compilations == []
    assert report["programs_read"] == 4
    assert (report["programs_folder"], report["programs_unused"]) == (str(folder), None)
    model = mtj_loader.load(checkpoint, mesh, dtype="float32")
    assert texts[0] == model.generate([3, 1, 4], max_new_tokens=9, temperature=0.0)
    assert texts[1] == list(model.stream([3, 1, 4], max_new_tokens=3, seed=5))


def load(checkpoint: Path, mesh: str = "mp=2", **options: Any) -> mtj_loader.Model:
    """Loads, and waits until everything is read or compiled."""
    given: dict[str, Any] = {"dtype": "float32"} | options
    model = mtj_loader.load(checkpoint, mesh, **given)
    model.compiled.wait()
    return model


def cached(model: mtj_loader.Model, stored: Path, sizes: str) -> Path:
    """Copies programs to where they are found without an option."""
    facts = collect_facts(model.forward, Sizes(1, 1, 32))
    folder = default_programs_folder(facts).with_name(sizes)
    shutil.copytree(stored, folder)
    for above in (folder.parent, folder.parents[1], folder.parents[2]):
        above.chmod(0o700)
    return folder


def set_facts(folder: Path, **facts: str) -> None:
    """Changes what the programs of a folder say that they were compiled for."""
    manifest = json.loads((folder / "programs.json").read_bytes())
    manifest["facts"]["model"].update(facts)
    (folder / "programs.json").write_text(json.dumps(manifest))


# Where programs are found.


def test_without_requests_all_programs_are_read_and_the_engine_gets_their_sizes(
    checkpoint: Path, stored: Path
):
    done = run("load", checkpoint, "--mesh", "mp=2", "--dtype", "float32", "--programs", stored)
    assert f"6 programs read from {stored}" in done.stdout
    model = load(checkpoint, programs=stored)
    assert sorted(map(str, model.warm)) == sorted(PROGRAMS)
    assert model.engine_settings.sizes == Sizes(1, 1, 32)


def test_the_smallest_programs_of_the_cache_with_room_are_used(
    checkpoint: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load(checkpoint)
    assert model.report.programs_folder is None
    folder = cached(model, stored, "1x32")
    set_facts(cached(model, stored, "1x16"), context="16")
    set_facts(cached(model, stored, "4x32"), slots="4")
    report = load(checkpoint, warm_up=[(1, 10, 10)]).report
    assert (report.programs_read, report.programs_folder) == (4, str(folder))
    given = load(checkpoint, slots=4, context_length=16)
    why = "compiled for 1x16, 1x32, 4x32 (slots x tokens), not for the given sizes and requests"
    assert (given.report.programs_read, given.report.programs_unused) == (0, why)
    assert given.engine_settings.sizes == Sizes(1, 4, 16)
    assert load(checkpoint, dtype="float16").report.programs_unused is None  # another model


def test_folders_of_the_checkpoint_are_not_read(
    checkpoint: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    for name in ("programs", "1x32", ".cache/mtj_loader/programs"):
        shutil.copytree(stored, model / name)
        for program in (model / name).iterdir():
            program.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    monkeypatch.chdir(model)
    report = load(model).report
    assert (report.programs_read, report.programs_folder, report.programs_unused) == (0, None, None)
    assert not (tmp_path / "ran").exists()


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


# Why programs are not used.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float16"}, "compiled for dtype float32, this is float16"),
        ({"mesh": "mp=4"}, "compiled for mesh dp=1,mp=2, this is dp=1,mp=4"),
        ({"transposed_linear": True}, "compiled for transposed_linear False, this is True"),
        ({"slots": 2}, "compiled for 1x32 (slots x tokens), not for the given sizes"),
        ({"context_length": 16}, "compiled for 1x32 (slots x tokens), not for the given sizes"),
    ],
)
def test_programs_for_something_else_are_not_used(
    checkpoint: Path, stored: Path, options: dict, reason: str
):
    report = load(checkpoint, programs=stored, **options).report
    assert (report.programs_read, report.programs_folder) == (0, None)
    assert report.programs_unused is not None
    assert str(stored) in report.programs_unused
    assert reason in report.programs_unused
    assert report.programs_unused in report.warnings


def test_a_changed_program_is_compiled(checkpoint: Path, stored: Path, tmp_path: Path):
    folder = tmp_path / "programs"
    shutil.copytree(stored, folder)
    data = bytearray((folder / "init-1x1.xla").read_bytes())
    data[0] ^= 1
    (folder / "init-1x1.xla").write_bytes(data)
    model = load(checkpoint, programs=folder)
    assert model.report.programs_read == 5
    (warning,) = [text for text in model.report.warnings if "init-1x1" in text]
    assert "program init-1x1 is compiled: the file was changed" in warning
    assert model.programs.is_ready(Sizes(1, 1, 32), INIT)


def test_programs_of_the_cache_that_cannot_be_read_are_not_used(
    checkpoint: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cached(load(checkpoint), stored, "1x32")
    folder.chmod(0o777)
    report = load(checkpoint).report
    assert report.programs_unused is not None
    assert "others" in report.programs_unused
    assert report.programs_unused in report.warnings


def test_a_named_folder_must_hold_programs(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ProgramError, match=r"programs\.json"):
        load(checkpoint, programs=tmp_path)
    with pytest.raises(UsageError, match="only from folders of this machine"):
        load(checkpoint, programs="gs://bucket/programs")


# What the command refuses.


def test_a_folder_with_anything_else_is_refused_before_compiling(checkpoint: Path):
    done = run("compile", checkpoint, "--mesh", "mp=2", "--out", checkpoint)
    assert done.exit_code != 0
    assert "holds no compiled programs" in done.stderr


def test_tpus_need_a_mesh_and_libtpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    assert "--for needs --mesh" in run("compile", checkpoint, "--for", "v5e-8").stderr
    monkeypatch.setattr("mtj_loader.planning.compile_for.find_spec", lambda _: None)
    done = run("compile", checkpoint, "--for", "v5e-8", "--mesh", "mp=2")
    assert "libtpu, the TPU compiler, is not installed" in done.stderr
    done = run("compile", checkpoint, "--for", "v9-8", "--mesh", "mp=2")
    assert "not a TPU slice to compile for" in done.stderr
