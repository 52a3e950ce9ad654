"""`mtj-loader plan`: its summary, meshes that do not exist, and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import mtj_loader
from tests.support import neox
from tests.support.command_line import FIXTURE, run


def test_plan_prints_the_summary():
    result = run("plan", FIXTURE, "--mesh", "dp=2,mp=4", "--hosts", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    topology = mtj_loader.make_abstract_mesh("dp=2,mp=4", hosts=2)
    assert result.stdout == mtj_loader.plan(FIXTURE, topology).summary() + "\n"


def test_plan_needs_no_devices():
    result = run("plan", FIXTURE, "--mesh", "dp=64,mp=8", "--hosts", "128", "--transposed-linear")
    assert result.exit_code == 0
    assert "dp=64, mp=8: 512 devices on 128 hosts" in result.stdout
    assert "linear weights [out, in]" in result.stdout


def test_plan_without_a_mesh_takes_the_devices():
    assert "dp=1, mp=8: 8 devices on 1 host" in run("plan", FIXTURE).stdout


def test_hosts_without_a_mesh():
    result = run("plan", FIXTURE, "--hosts", "2")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --hosts needs --mesh\n  hint: for example --mesh mp=8\n",
    )


def test_unmapped_tensor(tmp_path: Path):
    folder = neox.write(tmp_path, neox.tensors() | {"extra": np.zeros((3,), np.float32)})
    result = run("plan", folder, "--mesh", "mp=1")
    assert result.exit_code == 3
    assert result.stderr == (
        "error: 1 problem between checkpoint, map and model\n"
        "- the map has no entry for this tensor: "
        "file model.safetensors, tensor extra, found F32 [3]\n"
    )
