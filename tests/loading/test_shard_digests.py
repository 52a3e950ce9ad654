"""Digests of shards: computed, merged and compared, in files and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

import mtj_loader
from mtj_loader.errors import FormatError, UsageError, VerifyError
from mtj_loader.loading.shard_digests import (
    Digests,
    check_complete,
    compute_digests,
    merge_digests,
    read_digests,
)
from mtj_loader.loading.simulated_host import load_as_host
from tests.support import neox
from tests.support.command_line import FIXTURE, run


def digests_of_hosts(hosts: int) -> dict[str, Digests]:
    """The digests of each host of a pod."""
    plan = mtj_loader.plan(FIXTURE, mtj_loader.make_abstract_mesh("mp=8", hosts))
    return {
        f"host {host}": compute_digests(
            load_as_host(plan, host)[0], plan.shards, plan.topology.shards_of(host)
        )
        for host in range(hosts)
    }


def test_the_digests_of_all_hosts_are_those_of_the_whole_model():
    model = mtj_loader.load(FIXTURE, "mp=8", progress=False)
    whole = compute_digests(model.params, 8)
    check_complete(whole)
    parts = digests_of_hosts(4)
    found = merge_digests(parts)
    assert found == whole
    assert found.sha256 == whole.sha256
    assert merge_digests(parts | {"whole": whole}) == whole


def test_digests_depend_on_the_bytes_of_shards(tmp_path: Path):
    model = mtj_loader.load(neox.write(tmp_path), "dp=2,mp=2", progress=False)
    found = compute_digests(model.params, 2)
    assert sum(map(len, found.of.values())) == 2 * len(jax.tree.leaves(model.params))
    changed = jax.tree.map(lambda array: array, model.params)
    module, name = "causal_transformer_shard/~/layer_1/~/linear_3", "w"
    changed[module][name] = changed[module][name].at[1, 0, 0].add(1)
    other = compute_digests(changed, 2)
    differing = [(n, j) for n in found.of for j in (0, 1) if found.of[n][j] != other.of[n][j]]
    assert differing == [(f"{module} {name}", 1)]
    assert found.sha256 != other.sha256


def test_the_order_of_digests_does_not_matter():
    one = Digests(2, {"a w": {0: "0a", 1: "1a"}, "b w": {0: "0b"}})
    other = Digests(2, {"b w": {0: "0b"}, "a w": {1: "1a", 0: "0a"}})
    assert one.sha256 == other.sha256
    assert one.sha256 != Digests(2, {"a w": {0: "0a", 1: "1a"}, "b w": {1: "0b"}}).sha256


def test_missing_shards_are_named():
    parts = digests_of_hosts(4)
    del parts["host 2"]
    found = merge_digests(parts)
    with pytest.raises(
        VerifyError, match="the digests are incomplete: 76 parameters lack"
    ) as error:
        check_complete(found)
    assert error.value.found == "all but {4...5}"


def test_differing_shards_are_named():
    one, other = Digests(2, {"a w": {0: "0a", 1: "1a"}}), Digests(2, {"a w": {1: "xx"}})
    with pytest.raises(VerifyError, match="shard 1 of a parameter differs between hosts") as error:
        merge_digests({"one": one, "other": other})
    facts = (error.value.file, error.value.key, error.value.expected, error.value.found)
    assert facts == ("other", "a w", "1a", "xx")


def test_digests_of_other_meshes_and_models_are_rejected():
    one = Digests(2, {"a w": {0: "0a"}})
    with pytest.raises(UsageError, match="digests of different meshes"):
        merge_digests({"one": one, "other": Digests(4, {"a w": {0: "0a"}})})
    with pytest.raises(VerifyError, match="other and one do not have the same parameters") as error:
        merge_digests({"one": one, "other": Digests(2, {"b w": {0: "0a"}, "a w": {0: "0a"}})})
    assert error.value.key == "b w"


def test_digests_are_read_as_they_were_written(tmp_path: Path):
    found = Digests(2, {"a w": {0: "0a", 1: "1a"}, "b w": {1: "1b"}})
    path = tmp_path / "digests.json"
    path.write_text(json.dumps(found.to_dict()))
    assert read_digests(path) == found


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "0"},
        {"of": {"a w": {"x": "0a"}}},
        {"of": {"a w": {"9" * 5000: "0a"}}},
        {"of": {"a w": 0}},
        {"shards": "2"},
        {"shards": 10**18},
    ],
)
def test_other_files_are_rejected(tmp_path: Path, change: dict):
    path = tmp_path / "digests.json"
    path.write_text(json.dumps(Digests(2, {"a w": {0: "0a"}}).to_dict() | change))
    with pytest.raises(FormatError, match="not written by --digests, or changed since"):
        read_digests(path)


def test_the_command_has_an_example_and_reports_missing_files(tmp_path: Path):
    assert "Example: mtj-loader digests" in run("digests", "--help").stdout
    result = run("digests", tmp_path / "nothing.json")
    assert result.exit_code == 3
    assert result.stderr.startswith("error: the file is missing")
