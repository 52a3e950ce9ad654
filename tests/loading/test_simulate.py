"""Simulated hosts: each loads its own shards, and together they load the whole model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import MeshError, UsageError, VerifyError
from mtj_loader.loading.shard_digests import (
    Digests,
    compute_digests,
    read_digests,
)
from mtj_loader.loading.simulated_host import load_as_host, plan_for_host
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.topology import Topology
from mtj_loader.storage.local import LocalStorage
from tests.support import neox
from tests.support.adapters import linear, write_adapter
from tests.support.command_line import FIXTURE, ROOT, run


def plan_of(path: Path, mesh: str, hosts: int, **options) -> LoadPlan:
    return mtj_loader.plan(path, mtj_loader.make_abstract_mesh(mesh, hosts), **options)


def digests_of_host(plan: LoadPlan, host: int) -> Digests:
    params, _ = load_as_host(plan, host)
    return compute_digests(params, plan.shards, plan.topology.shards_of(host))


@pytest.mark.parametrize("transposed_linear", [False, True])
@pytest.mark.parametrize(("mesh", "hosts"), [("mp=4", 2), ("mp=4", 4), ("dp=2,mp=4", 4)])
def test_shards_of_a_host_equal_those_of_a_whole_load(
    tmp_path: Path, mesh: str, hosts: int, transposed_linear: bool
):
    options = {"transposed_linear": transposed_linear, "progress": False}
    whole = mtj_loader.load(neox.write(tmp_path), "mp=4", **options).params
    plan = plan_of(tmp_path, mesh, hosts, transposed_linear=transposed_linear)
    for host in range(hosts):
        numbers = list(plan.topology.shards_of(host))
        params, _ = load_as_host(plan, host)
        for module, arrays in whole.items():
            for name, array in arrays.items():
                expected = np.asarray(array)[numbers]
                np.testing.assert_array_equal(np.asarray(params[module][name]), expected)


def test_a_host_reads_only_what_its_devices_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(neox.write(tmp_path), "mp=4", 2)
    read: list[int] = []
    original = LocalStorage.read_into

    def count(self: LocalStorage, path: str, offset: int, buffer: np.ndarray) -> None:
        read.append(buffer.nbytes)
        original(self, path, offset, buffer)

    monkeypatch.setattr(LocalStorage, "read_into", count)
    _, report = load_as_host(plan, 1)
    alone = plan.without_exchange  # both hosts read the norms, because they exchange nothing
    assert sum(read) == report.bytes_read == report.bytes_needed == alone.host_bytes(1)
    assert (
        plan.host_bytes(1)
        < alone.host_bytes(1)
        < 0.6 * plan_for_host(plan_of(tmp_path, "mp=4", 1), 0).host_bytes(0)
    )


def test_only_the_first_host_compares_tied_copies(tmp_path: Path):
    arrays = neox.tensors()
    arrays["embed_out.weight"] = arrays["gpt_neox.embed_in.weight"] + 1
    plan = plan_of(neox.write(tmp_path, arrays, tie_word_embeddings=True), "mp=4", 2)
    load_as_host(plan, 1)
    with pytest.raises(VerifyError, match=r"config\.json ties this tensor"):
        load_as_host(plan, 0)


def test_a_host_gets_its_rows_and_columns_of_the_mesh():
    plan = plan_of(FIXTURE, "dp=4,mp=8", 8)
    mine = plan_for_host(plan, 5)
    assert plan.topology.shards_of(5) == (4, 5, 6, 7)
    assert mine.topology == Topology(((0, 0, 0, 0),))
    assert mine.device_bytes == plan.device_bytes
    assert mine.host_bytes(0) == plan.without_exchange.host_bytes(5) > plan.host_bytes(5)
    two_rows = plan_for_host(plan_of(FIXTURE, "dp=4,mp=2", 2), 1)
    assert two_rows.topology == Topology(((0, 0), (0, 0)))


def test_a_host_outside_the_mesh_is_rejected():
    with pytest.raises(UsageError, match="the mesh has no such host") as error:
        plan_for_host(plan_of(FIXTURE, "mp=8", 4), 4)
    assert error.value.expected == "one of {0...3}"


def test_devices_that_are_not_a_rectangle_are_rejected():
    plan = plan_of(FIXTURE, "dp=3,mp=4", 2)  # host 0 has a row and a half
    with pytest.raises(MeshError, match="host 0 cannot be simulated: its devices are not a rect"):
        plan_for_host(plan, 0)


def test_adapters_are_rejected(tmp_path: Path):
    folder = neox.write(tmp_path / "model")
    factors = linear("gpt_neox.layers.0.attention.dense", 24, 24)
    adapter = write_adapter(tmp_path / "adapter", factors)
    with pytest.raises(UsageError, match="a simulated host cannot merge adapters"):
        plan_for_host(plan_of(folder, "mp=4", 2, adapter=adapter), 0)


# The command line.


def run_alone(*arguments: object) -> str:
    """Runs `mtj-loader load` in a new process, where virtual devices can be created first."""
    command = [sys.executable, "-W", "error", "-m", "mtj_loader.cli", "load", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=120, env=environment
    )
    return done.stdout


def test_the_command_loads_hosts_and_merges_digests(tmp_path: Path):
    plan = plan_of(FIXTURE, "mp=4", 2)
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    options = ("--mesh", "mp=4", "--simulate-host", "1/2", "--digests", files[1], "--json")
    document = json.loads(run_alone(FIXTURE, *options))
    assert document["simulated_host"] == {"number": 1, "hosts": 2, "shards": [2, 3]}
    assert document["mesh"] == {"dp": 1, "mp": 4}
    assert document["report"]["bytes_read"] == plan.without_exchange.host_bytes(1)
    assert (
        document["digests"]
        == digests_of_host(plan, 1).to_dict()
        == json.loads(files[1].read_text())
    )
    files[0].write_text(json.dumps(digests_of_host(plan, 0).to_dict()))
    whole = run("load", FIXTURE, "--mesh", "mp=4", "--digests", tmp_path / "whole.json")
    assert whole.exit_code == 0
    result = run("digests", *files, tmp_path / "whole.json")
    sha256 = read_digests(tmp_path / "whole.json").sha256
    assert (
        result.stdout == f"3 files: complete, 76 parameters with 4 shards each\nSHA-256 {sha256}\n"
    )
    found = json.loads(run("digests", *files, "--json").stdout)
    assert found == {"parameters": 76, "shards": 4, "sha256": sha256}
    result = run("digests", files[1])
    assert result.exit_code == 3
    assert result.stderr.startswith(
        f"error: the digests are incomplete: 76 parameters lack shards\n  file: {files[1]}\n"
    )


def test_the_command_prints_what_it_loaded():
    words = run_alone(FIXTURE, "--mesh", "dp=2,mp=2", "--simulate-host", "0/2").splitlines()
    host = "host 0 of 2 (2 virtual devices), shards {0...1} of dp=2, mp=2"
    assert words[0] == f"gpt_neox from {FIXTURE}: {host}"
    assert words[1].startswith("76 parameters, 7.65 MB read in ")
    assert re.fullmatch("SHA-256 of its shards: [0-9a-f]{64}", words[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "mp=4", "--simulate-host", "4/4"], "cannot read --simulate-host"),
        (["--mesh", "mp=4", "--simulate-host", "one"], "cannot read --simulate-host"),
        (["--mesh", "mp=4", "--simulate-host", "0/3"], "the hosts do not divide the devices"),
        (["--simulate-host", "0/2"], "--simulate-host needs --mesh"),
        (["--mesh", "mp=4", "--simulate-host", "0/2", "--verify"], "--verify cannot be used"),
        (["--simulate-host", "0/2", "--warm-up", "1x8"], "--warm-up cannot be used"),
        (["--simulate-host", "0/2", "--processes", "2"], "--processes cannot be used"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str):
    result = run("load", FIXTURE, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")


def test_all_keys_are_documented():
    sections = (ROOT / "docs/json.md").read_text().split("\n## ")
    section = next(text for text in sections if text.startswith("digests"))
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    keys = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    of_digests = {f"digests.{key}" for key in Digests(1, {}).to_dict()} - {"digests.of"}
    simulated_host = {f"simulated_host.{key}" for key in ("number", "hosts", "shards[]")}
    joined_files = {"parameters", "shards", "sha256"}
    assert keys == of_digests | {"digests.of.*.*"} | simulated_host | joined_files
