"""`mtj-loader convert`: output, warnings, errors and JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.command_line import run
from tests.support.conversions import (
    BF16,
    ONE,
    TWO,
    bfloat16,
    write,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "tiny")


def test_command(tmp_path):
    tensors = {f"h.{i}.w": np.array([1, 1e-30, 7e4], BF16) for i in range(2)}
    source = write(tmp_path / "s", tensors | {"h.0.b": bfloat16(2)})
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("x")
    result = run("convert", source, "--dtype", "float16", "--on-overflow", "clamp")
    assert result.exit_code == 0
    assert result.stderr == ""
    first, second, *rest = result.stdout.splitlines()
    assert first.startswith("3 tensors to float16: 16 B read, 16 B written in ")
    assert first.endswith(f"1 file in {tmp_path}/s-float16")
    assert second == "2 overflowed, 2 became zero, 0 are NaN or infinite"
    assert rest[:2] == ["copied: tokenizer.json", "left out: pytorch_model.bin"]
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in rest[2:]]
    assert rows[0] == ["tensor", "dtype", "overflowed", "became zero", "NaN or infinite"]
    assert rows[2] == ["h.{0...1}.w", "BF16 → F16", "2", "2", "0"]
    assert len(rows) == 3  # no row for tensors without losses


def test_command_warns(tmp_path):
    source = write_checkpoint(
        tmp_path / "s", {ONE: {"a": bfloat16(2)}, TWO: {"b": bfloat16(2)}}, {"model_type": "mpt"}
    )
    shutil.copy(source / ONE, source / "other.safetensors")
    result = run("convert", source, "--dtype", "float16", "--out", tmp_path / "out")
    assert result.stderr.startswith("warning: not in model.safetensors.index.json")
    assert "left out: other.safetensors\n" in result.stdout


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "the output exists already", ["--dtype", "float16", "--out", "{source}"]),
        (2, "Missing option '--dtype'", []),
        (2, "Invalid value for '--dtype'", ["--dtype", "float64"]),
        (3, "finite weights are too large for float16", ["--dtype", "float16"]),
    ],
)
def test_command_fails(tmp_path, code, message, arguments):
    source = write(tmp_path / "s", {"w": np.array([1e5], np.float32)})
    result = run("convert", source, *[argument.format(source=source) for argument in arguments])
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_help_has_an_example():
    result = run("convert", "--help")
    assert result.exit_code == 0
    assert "Example: mtj-loader convert mosaicml/mpt-7b-instruct --dtype float16" in result.stdout


def test_command_does_not_import_jax(source):
    script = (
        "import sys; from mtj_loader.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False); sys.exit('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "convert", str(source), "--dtype", "float16"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def leaves(value, path=""):
    """The keys of a JSON document, in the notation of docs/json.md."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for item in value or [None]:
            yield from leaves(item, f"{path}[]")
    else:
        yield path


def test_json_has_the_documented_keys(source):
    (source / "tokenizer.json").write_text("{}")
    result = run("convert", source, "--dtype", "float16", "--json")
    assert result.exit_code == 0
    pages = (ROOT / "docs/json.md").read_text().split("\n## ")
    [page] = [page for page in pages if page.startswith("convert\n")]
    cells = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    documented = {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}
    document = json.loads(result.stdout)
    assert set(leaves(document)) == documented
    assert document["underflow"] == sum(tensor["underflow"] for tensor in document["tensors"])
