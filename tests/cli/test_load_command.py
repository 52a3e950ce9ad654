"""`mtj-loader load`: what it prints and where, its files, and the exit code of every failure."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from mtj_loader.loading.stream import Streamer
from tests.support import neox
from tests.support.command_line import FIXTURE, ROOT, run, start


def test_load_reports_and_verifies(model: Path):
    result = run("load", model, "--mesh", "dp=2,mp=4", "--verify")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"gpt_neox from {model} on dp=2, mp=4 (8 cpu devices)"
    assert lines[1].startswith("28 parameters, ")
    assert re.fullmatch(r"verified: all [0-9.]+ kB on the devices match the files", lines[2])
    assert result.stderr == "verifying: reading every byte again\n"


def test_verify_finds_a_wrong_byte(model: Path, monkeypatch: pytest.MonkeyPatch):
    original = Streamer.run

    def run_and_change_a_byte(self: Streamer) -> object:
        params = original(self)
        module = params["causal_transformer_shard/~/layer_0/~/linear_4"]
        module["b"] = module["b"].at[1, 3].add(1)
        return params

    monkeypatch.setattr(Streamer, "run", run_and_change_a_byte)
    result = run("load", model, "--mesh", "mp=2", "--verify")
    assert result.exit_code == 3
    assert "causal_transformer_shard/~/layer_0/~/linear_4 b" in result.stderr
    assert "cpu:1" in result.stderr
    assert "file: model.safetensors\n" in result.stderr


def test_report_file_is_what_json_prints(model: Path, tmp_path: Path):
    result = run("load", model, "--report", tmp_path / "report.json", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize("option", ["--report", "--digests"])
def test_files_that_cannot_be_written(model: Path, tmp_path: Path, option: str):
    result = run("load", model, "--mesh", "mp=1", option, "/dev/full")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: cannot write the file\n  file: /dev/full\n")
    result = run(
        "load", tmp_path / "no-model", option, tmp_path / "no/file.json"
    )  # checked before the checkpoint
    assert result.exit_code == 4
    assert result.stderr.startswith(
        f"error: cannot write the file\n  file: {tmp_path}/no/file.json"
    )
    os.mkfifo(tmp_path / "pipe")
    for pipe in (tmp_path / "pipe", f"/dev/..{tmp_path}/pipe"):
        result = run("load", tmp_path / "no-model", option, pipe)
        assert result.exit_code == 4
        assert "found: a named pipe" in result.stderr


def test_warnings_of_a_load_go_to_stderr(tmp_path: Path):
    folder = neox.write(tmp_path, neox.tensors() | {"extra": np.zeros((3,), np.float32)})
    result = run("load", folder, "--mesh", "mp=1", "--allow-unmapped")
    assert result.exit_code == 0
    assert result.stderr == "warning: skipped extra: it is not in the weight map\n"


def failing_options() -> dict[str, tuple[int, str, list[str]]]:
    """Name of the case → exit code, start of the message, arguments after the fixture."""
    return {
        "wrong mesh": (2, "cannot read the mesh", ["--mesh", "8"]),
        "shards": (2, "5 shards do not divide the model: heads (8)", ["--mesh", "mp=5"]),
        "devices": (4, "the mesh dp=2,mp=8 needs more devices", ["--mesh", "dp=2,mp=8"]),
        "host memory": (2, "host_memory is too small", ["--host-memory", "1MiB"]),
        "size": (2, "cannot read a size", ["--host-memory", "much"]),
        "map": (3, "cannot read the weight map", ["--map", "/no/such/map.json"]),
        "revision": (2, "only a Hugging Face id has revisions", ["--revision", "main"]),
    }


@pytest.mark.parametrize(
    ("code", "message", "arguments"), failing_options().values(), ids=failing_options()
)
def test_failures_of_options(code: int, message: str, arguments: list[str]):
    result = run("load", FIXTURE, *arguments)
    assert result.exit_code == code
    assert result.stderr.startswith(f"error: {message}")
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_unknown_family(tmp_path: Path):
    result = run("load", neox.write(tmp_path, model_type="gpt_neo_y"))
    assert result.exit_code == 3
    assert result.stderr.startswith("error: unknown model family")
    assert "found: gpt_neo_y" in result.stderr


def test_map_of_another_family(tmp_path: Path, model: Path):
    text = (ROOT / "configs/gpt_neox.json").read_text()
    (tmp_path / "map.json").write_text(text.replace('"neox"', '"bloom"'))
    result = run("load", model, "--map", tmp_path / "map.json")
    assert result.exit_code == 3
    assert "bloom" in result.stderr
    (tmp_path / "map.json").write_text(text.replace('"neox_rotary"', '"alibi"'))
    result = run("load", model, "--map", tmp_path / "map.json")
    assert result.exit_code == 3
    assert "key: mtj_pe\n  expected: neox_rotary\n  found: alibi\n" in result.stderr


def test_truncated_file(model: Path):
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    result = run("load", model)
    assert result.exit_code == 3
    assert "file: model.safetensors" in result.stderr


def test_unexpected_error_shows_its_type(model: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Streamer) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Streamer, "run", fail)
    result = run("load", model, "--mesh", "mp=1")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected RuntimeError: a bug\n  hint: --debug shows the traceback\n"
    )
    assert "in fail\n" in run("load", model, "--mesh", "mp=1", "--debug").stderr


def test_broken_pipe_of_another_file_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Streamer) -> None:
        raise BrokenPipeError("a server hung up")

    monkeypatch.setattr(Streamer, "run", fail)
    result = run("load", model, "--mesh", "mp=1")
    assert result.exit_code == 1
    assert "BrokenPipeError: a server hung up" in result.stderr


def test_out_of_memory_exits_4(model: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Streamer) -> None:
        raise MemoryError

    monkeypatch.setattr(Streamer, "run", fail)
    result = run("load", model, "--mesh", "mp=1")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: out of memory on the host\n  found: ")


def test_load_in_a_process_keeps_stdout_clean(model: Path):
    process = start(
        "load", model, "--mesh", "dp=2,mp=2", "--cpu-devices", "4", "--json", "--verify"
    )
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(stdout)["mesh"] == {"dp": 2, "mp": 2}
    assert stderr == "verifying: reading every byte again\n"


def test_cpu_devices_are_all_devices(model: Path):
    process = start("load", model, "--mesh", "mp=4", "--cpu-devices", "2")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (4, "")
    assert "expected: 4\n  found: 2 (cpu)\n" in stderr


SLOW_READS = """
import os, sys, threading, time
from mtj_loader.storage.local import LocalStorage
from mtj_loader.cli import main

read = LocalStorage.read_into

def slow_read(self, *arguments):
    if threading.current_thread() is not threading.main_thread():
        os.write(2, b"reading\\n")  # unbuffered, from any thread
        time.sleep(1)
    read(self, *arguments)

LocalStorage.read_into = slow_read
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")],
)
def test_signals_end_a_load(number: signal.Signals, code: int, message: str):
    process = start("load", FIXTURE, "--mesh", "mp=8", script=SLOW_READS)
    assert process.stderr is not None
    assert process.stderr.readline() == "reading\n"
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert stdout == ""
    assert stderr.replace("reading\n", "") == message
    assert stderr.count("reading\n") < 10  # of about 40
