"""Whatever names and values a checkpoint has, they neither control the terminal nor forge lines."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from mtj_loader.cli import output
from tests.support import neox
from tests.support.adapters import write_adapter
from tests.support.command_line import ROOT, run

# An escape sequence, CR and LF, bidirectional controls, C1, a line separator, half a pair.
EVIL = "e\x1b[31m\r\nerror: forged\n  hint: forged\nwarning: forged\u202e\u2066\x9b\u2028"
LOADING = ["--mesh", "mp=1", "--no-progress"]
COMMANDS = {
    "inspect": [],
    "inspect --topology": [],
    "plan": LOADING,
    "load": [*LOADING, "--verify"],
    "generate": [*LOADING, "--ids", "1 2", "--max-new-tokens", "1"],
    "convert": ["--dtype", "bfloat16"],
}


def check(result: Result) -> None:
    for line in (result.stdout + result.stderr).split("\n"):
        assert line.isprintable(), ascii(line)
        assert not line.startswith(("error: forged", "  hint: forged", "warning: forged"))


def run_command(command: str, folder: Path, *more: object) -> Result:
    return run(*command.split(), folder, *COMMANDS[command], *more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with evil names of folder and files, tensors that are skipped, and warnings."""
    arrays = neox.tensors() | {"extra": np.zeros(3, np.float32)}
    folder = neox.write(tmp_path / EVIL, arrays)
    for suffix in (".safetensors", ".bin", ".txt"):
        (folder / f"{EVIL}{suffix}").write_bytes(b"")
    (folder / f"{EVIL}").mkdir()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_names_of_files(folder: Path, command: str):
    more = ["--allow-unmapped"] if command in ("plan", "load", "generate") else []
    result = run_command(command, folder, *more)
    assert result.exit_code == 0, result.output
    assert r"e\x1b[31m\r\nerror: forged" in result.output
    assert "warning: not read: " in result.output
    check(result)


@pytest.mark.parametrize("command", COMMANDS)
def test_values_of_a_config(folder: Path, command: str):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": EVIL}))
    result = run_command(command, folder)
    assert (result.exit_code == 0) == command.startswith(("inspect", "convert"))
    check(result)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_none(tmp_path: Path, command: str):
    result = run_command(command, tmp_path / EVIL)
    assert result.exit_code == 2
    check(result)


@pytest.mark.parametrize("option", ["--map", "--adapter"])
def test_names_of_other_files(tmp_path: Path, option: str):
    model = neox.write(tmp_path / "model")
    result = run_command("plan", model, option, tmp_path / EVIL)
    assert result.exit_code == 3
    check(result)


def test_keys_of_an_adapter(tmp_path: Path):
    model = neox.write(tmp_path / "model")
    adapter = write_adapter(tmp_path / EVIL, {}, **{EVIL: 1})
    result = run_command("plan", model, "--adapter", adapter)
    assert r"key: e\x1b[31m" in result.stderr
    check(result)


def test_digests(tmp_path: Path):
    file = tmp_path / EVIL
    file.write_text("{}")
    result = run("digests", file)
    assert result.exit_code == 3
    check(result)


def test_unexpected_errors_and_tracebacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ValueError(EVIL)

    monkeypatch.setattr("mtj_loader.cli.inspect_command.open_checkpoint", fail)
    for debug in ([], ["--debug"]):
        result = run("inspect", tmp_path, *debug)
        assert r"unexpected ValueError: e\x1b[31m\r\nerror: forged" in result.stderr
        assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "\x1b" not in result.stderr


def test_generated_text_is_exact_unless_it_would_control_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = "\x1b]0;x\x07 a\tb\n\u3000\u200d\r\x9b"
    output.print_generated(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.print_generated(text)
    assert capsys.readouterr().out == "\\x1b]0;x\\x07 a\tb\n\u3000\u200d\\r\\x9b"


def test_nothing_else_prints():
    """Only two modules print, and only one makes text for tables: both escape."""
    printing, texts = set(), set()
    for file in (ROOT / "mtj_loader").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                printing.add(file.name)
            if isinstance(node, ast.ImportFrom) and node.module == "rich.text":
                texts.add(file.name)
    assert printing == {"output.py", "streams.py"}
    assert texts == {"display.py"}
