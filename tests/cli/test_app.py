"""All commands: help, JSON keys, usage errors, and the processes that run them."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mtj_loader
from tests.support import neox
from tests.support.checkpoints import write_checkpoint
from tests.support.command_line import FIXTURE, ROOT, run, start

COMMANDS = ["inspect", "plan", "load", "generate"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: mtj-loader {command}" in result.stdout
    assert "--debug" in result.stdout


def test_help_shows_brackets():
    assert "[out, in]" in re.sub(r"[│\s]+", " ", run("load", "--help").stdout)


def test_help_breaks_no_line_in_the_middle_of_the_exit_codes():
    lines = [line.strip() for line in run("--help").stdout.splitlines()]
    assert "4 machine error (memory, disk, network, devices); 130 interrupted;" in lines


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"mtj-loader {mtj_loader.__version__}\n")


def test_help_and_inspect_import_neither_jax_nor_the_hub():
    script = (
        "import sys; from mtj_loader.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(' '.join({'jax', 'huggingface_hub'} & set(sys.modules)) or 0)"
    )
    for arguments in (["--help"], ["generate", "--help"], ["inspect", str(FIXTURE)]):
        process = start(*arguments, script=script)
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, "")


def documented() -> dict[str, set[str]]:
    """Command → the keys that docs/json.md lists for it."""
    keys: dict[str, set[str]] = {}
    for section in (ROOT / "docs/json.md").read_text().split("\n## ")[1:]:
        cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
        keys[section.split()[0]] = {k for cell in cells for k in re.findall(r"`([^`]+)`", cell)}
    shared = {key for key in keys["inspect"] if key.startswith("tensors[].")}
    keys["plan"] = keys["plan"] - {"parameters[].tensors[]"} | {f"parameters[].{k}" for k in shared}
    keys["plan"] = {k for k in keys["plan"] if not k.startswith("compiled[].")}  # --compile-for
    return {command: {key.rstrip("[]") for key in named} for command, named in keys.items()}


def paths(value: object, path: str = "") -> Iterator[str]:
    """The path of every leaf, in the notation of docs/json.md."""
    if isinstance(value, dict):
        is_data = path.endswith(
            ("host_read_bytes", "host_received_bytes", "dtype_changes", "sampling")
        )
        for key, item in value.items():
            yield from paths(item, f"{path}.{'*' if is_data else key}".removeprefix("."))
    elif isinstance(value, list) and value:
        for item in value:
            yield from paths(item, path + "[]")
    else:
        yield path.rstrip("[]")


@pytest.mark.parametrize("command", COMMANDS)
def test_json_has_the_documented_keys(tmp_path: Path, command: str):
    arrays = neox.tensors()
    arrays["embed_out.weight"] = arrays["gpt_neox.embed_in.weight"]
    arrays |= {"gpt_neox.layers.0.attention.masked_bias": np.zeros((1,), np.float32)}
    arrays |= {"extra": np.zeros((1,), np.float32)}
    folder = neox.write(tmp_path, arrays, tie_word_embeddings=True)
    loading = [] if command == "inspect" else ["--mesh", "mp=1", "--allow-unmapped"]
    prompt = ["--ids", "1 2", "--max-new-tokens", "1", "--logprobs", "1", "--prompt-logprobs"]
    result = run(command, folder, "--json", *loading, *(prompt if command == "generate" else []))
    assert result.exit_code == 0
    found = {path.rstrip("[]") for path in paths(json.loads(result.stdout))}
    assert found == documented()[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_path(command: str):
    prompt = ["--prompt", "x"] if command == "generate" else []
    result = run(command, "/no/such/checkpoint", *prompt)
    assert result.exit_code == 2
    assert result.stderr == "error: no such file or folder\n  file: /no/such/checkpoint\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["load"],
        ["load", "x", "--nonsense"],
        ["load", "x", "--dtype", "int4"],
        ["load", "x", "--cpu-devices", "0"],
        ["generate", "x", "--prompt-file", "/no/such/file"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2(arguments: list[str]):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback():
    result = run("load", "/no/such/checkpoint", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr


def test_closed_pipe_ends_the_process_as_it_ends_other_tools(tmp_path: Path):
    names = [f"h.{i}.{'x' * 100}" for i in range(5000)]  # more than fits into a pipe
    tensors = {name: np.zeros((1,), np.float32) for name in names}
    folder = write_checkpoint(tmp_path, {"m.safetensors": tensors}, {"model_type": "none"})
    process = start("inspect", folder, "--topology")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
