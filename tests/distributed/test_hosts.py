"""Several hosts, each a real process: results, reads, and failures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mtj_loader
from mtj_loader.planning.topology import make_abstract_mesh
from tests.support import hosts, neox
from tests.support.adapters import linear, write_adapter
from tests.support.checkpoints import write_safetensors
from tests.support.host_program import ADAPTER, IDS
from tests.support.hosts import Json, Outcome, step

SHARDS = {"dtype": "float32", "mesh": "mp=4"}
REPLICAS = {"dtype": "float32", "mesh": "dp=2,mp=2"}  # on two hosts: a replica on each
PHASES = ("join", "plan", "read", "exchange", "finish")
MISSING_IN = ("plan", "read", "exchange", "finish")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of one checkpoint, one for each host, and an adapter."""
    folder = tmp_path_factory.mktemp("hosts")
    for name in (*map(str, range(4)), "longer", "retrained", *MISSING_IN):
        neox.write(folder / name)
    longer = neox.tensors() | {"unused": np.zeros(3, np.float32)}
    write_safetensors(folder / "longer/model.safetensors", longer)
    write_adapter(folder / ADAPTER, linear("gpt_neox.layers.0.attention.query_key_value", 72, 24))
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """The results of all cases of this file, which run a few at a time."""
    copies = [folder / str(host) for host in range(4)]
    queries = ["logits", "greedy", "sampled", "stream", "state", "adapted"]
    other_map = folder / "map.json"
    other_map.write_text((hosts.ROOT / "configs/gpt_neox.json").read_text() + "\n")
    differing = [
        step([copies[0], folder / "longer"], SHARDS),
        step(copies, SHARDS, of_host_1={"dtype": "float16"}),
        step(copies, SHARDS, of_host_1={"map": str(other_map)}),
        *(
            step([copies[0], folder / phase], REPLICAS, fault=_fault(1, phase, "missing"))
            for phase in MISSING_IN
        ),
        step(copies, SHARDS, ["verified"]),
        step(copies, SHARDS, fault=_fault(1, "join", "version")),
    ]
    cases: dict[str, tuple[int, list[Json]]] = {
        f"{kind}-{phase}": (2, [step(copies, REPLICAS, fault=_fault(1, phase, kind))])
        for kind in ("kill", "stop")
        for phase in PHASES
    }
    cases |= {
        "two": (
            2,
            [
                step(copies, SHARDS, [*queries, "verified"]),
                step(copies, REPLICAS, ["logits", "verified"]),
            ],
        ),
        "four": (
            4,
            [step(copies, {"dtype": "float32", "mesh": "dp=2,mp=4"}, ["logits", "verified"])],
        ),
        "differing": (2, differing),
        "kill-0": (2, [step(copies, REPLICAS, fault=_fault(0, "read", "kill"))]),
        "stop-0": (2, [step(copies, REPLICAS, fault=_fault(0, "read", "stop"))]),
        "stop-0-generate": (
            2,
            [step(copies, SHARDS, ["connected"], fault=_fault(0, "generate", "stop"))],
        ),
    }
    return hosts.run(folder, cases)


def _fault(host: int, phase: str, kind: str) -> Json:
    return {"host": host, "phase": phase, "kind": kind}


@pytest.fixture(scope="module")
def single(folder: Path) -> mtj_loader.Model:
    """The same model in this process, on one shard."""
    return mtj_loader.load(folder / "0", "mp=1", dtype="float32", progress=False)


@pytest.mark.parametrize("case", ["two", "four"])
def test_logits_equal_those_of_one_process(
    outcomes: dict[str, Outcome], single: mtj_loader.Model, case: str
) -> None:
    assert all(code == 0 for code in outcomes[case].codes)
    expected = np.asarray(single.logits(IDS))
    for steps in outcomes[case].results:
        for result in steps:
            np.testing.assert_allclose(result["logits"], expected, rtol=1e-5, atol=1e-5)


def test_every_host_generates_the_text_of_one_process(
    outcomes: dict[str, Outcome], single: mtj_loader.Model
) -> None:
    for result in outcomes["two"].step(0):
        assert result["greedy"] == single.generate(IDS, max_new_tokens=6, temperature=0)
        assert result["sampled"] == single.generate(IDS[:3], max_new_tokens=6, seed=5)
        assert result["stream"] == single.generate(IDS[0], max_new_tokens=6)
        assert result["state"] == [0]


def test_adapters_are_added_on_all_hosts(
    outcomes: dict[str, Outcome], single: mtj_loader.Model, folder: Path
) -> None:
    expected = np.asarray(single.with_adapter(folder / ADAPTER).logits(IDS))
    for result in outcomes["two"].step(0):
        np.testing.assert_allclose(result["adapted"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "number", "mesh"),
    [("two", 0, "mp=4"), ("two", 1, "dp=2,mp=2"), ("four", 0, "dp=2,mp=4")],
)
def test_hosts_read_the_planned_bytes_once(
    outcomes: dict[str, Outcome], folder: Path, case: str, number: int, mesh: str
) -> None:
    results = outcomes[case].step(number)
    pod = make_abstract_mesh(mesh, hosts=len(results))
    planned = mtj_loader.plan(folder / "0", pod, dtype="float32")
    weights = [_weight_bytes(one["reads"]) for one in results]
    assert weights == list(planned.bytes_of_hosts.values())
    assert sum(weights) == sum(array.nbytes for array in neox.tensors().values())
    assert [one["report"]["bytes_read"] for one in results] == weights
    for one in results:
        assert [host["bytes_read"] for host in one["report"]["hosts"]] == weights


def _weight_bytes(reads: list[list]) -> int:
    return sum(size for method, _, _, size in reads if method == "read_into")


def test_only_process_0_reads_headers_and_config(outcomes: dict[str, Outcome]) -> None:
    first, *others = [
        [(file, size) for method, file, _, size in result["reads"] if method == "read"]
        for result in outcomes["four"].step(0)
    ]
    assert {file for file, _ in first} >= {"config.json", "model.safetensors"}
    for samples in others:  # that distinguish fine-tunes
        assert {file for file, _ in samples} == {"model.safetensors"}
        assert max(size for _, size in samples) <= 4096


def test_every_host_verifies_its_shards(
    outcomes: dict[str, Outcome], single: mtj_loader.Model
) -> None:
    whole = sum(array.nbytes for arrays in single.params.values() for array in arrays.values())
    verified = [result["verified"] for result in outcomes["two"].step(1)]
    assert verified[0] == verified[1] > whole // 2


DIFFERENCES = {
    0: "this host's copy of a file differs in size from host 0's",
    1: "dtype: 'float16' on host 1, 'float32' on host 0",
    2: "map: ",
    8: "mtj_loader: 0.0.1 on host 1, ",
}


@pytest.mark.parametrize("number", DIFFERENCES)
def test_a_host_that_differs_is_named_on_every_host(
    outcomes: dict[str, Outcome], number: int
) -> None:
    first, second = _after(outcomes["differing"], number)
    assert DIFFERENCES[number] in first["error"]
    assert DIFFERENCES[number] in second["error"]
    assert "host 1" in first["error"]


def _after(outcome: Outcome, number: int) -> list[Json]:
    """The results of one step on all hosts, without the records of injected faults."""
    return [[line for line in lines if "injected" not in line][number] for lines in outcome.results]


@pytest.mark.parametrize(("number", "phase"), list(enumerate(MISSING_IN, start=3)))
def test_a_missing_file_is_named_on_every_host(
    outcomes: dict[str, Outcome], number: int, phase: str
) -> None:
    first, second = _after(outcomes["differing"], number)
    reported = "finish" if phase == "exchange" else phase  # files are checked before and after
    assert "model.safetensors" in second["error"]
    assert first["error"] == f"host 1 failed in {reported!r}: {second['error']}"
    assert first["exit_code"] == second["exit_code"] == 3
    assert first["type"] == "HostError"


def test_after_failures_the_next_load_works(outcomes: dict[str, Outcome]) -> None:
    assert all("verified" in result for result in _after(outcomes["differing"], 7))


@pytest.mark.parametrize("kind", ["kill", "stop"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_host_that_dies_or_is_stopped_is_named(
    outcomes: dict[str, Outcome], kind: str, phase: str
) -> None:
    outcome = outcomes[f"{kind}-{phase}"]
    (result,) = outcome.results[0]
    late, silent = "host 1 did not finish 'join'", "no heartbeat from host 1"
    assert result["error"].startswith(late if phase == "join" else silent)
    assert result["exit_code"] == 4
    assert outcome.codes == (0, -9)


@pytest.mark.parametrize("case", ["stop-0", "stop-0-generate"])
def test_a_stopped_process_0_is_reported_on_the_others(
    outcomes: dict[str, Outcome], case: str
) -> None:
    (result,) = outcomes[case].results[1]
    assert (result["type"], result["exit_code"]) == ("HostError", 4)
    assert result["error"].startswith("host 0 has not answered for 10 s")


def test_jax_ends_the_other_hosts_when_process_0_dies(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["kill-0"].codes == (-9, -6)
    assert "another task died" in outcomes["kill-0"].logs[1]
