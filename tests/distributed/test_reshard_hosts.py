"""Several hosts, each a process: every byte is read by one of them, and the model is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import mtj_loader
from tests.support import hosts, neox
from tests.support.host_program import IDS
from tests.support.hosts import Outcome
from tests.support.object_server import serve

FILE = "model.safetensors"
OPTIONS = {"dtype": "float32", "compilation_cache": False}
LOCAL = {  # hosts, of two devices each, and mesh
    "dp over 2 hosts": (2, "dp=2,mp=2"),
    "mp over 2 hosts": (2, "dp=1,mp=4"),
    "both over 4 hosts": (4, "dp=2,mp=4"),
}
REMOTE = (2, "dp=1,mp=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return neox.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return np.asarray(mtj_loader.load(folder, "mp=1", dtype="float32").logits(IDS))


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    queries = ["logits", "verified"]
    cases = {
        name: (count, [hosts.step([folder] * count, OPTIONS | {"mesh": mesh}, queries)])
        for name, (count, mesh) in LOCAL.items()
    }
    return hosts.run(tmp_path_factory.mktemp("local"), cases)


@pytest.mark.parametrize("case", LOCAL)
def test_the_model_equals_that_of_one_host(
    case: str, local: dict[str, Outcome], expected: np.ndarray
) -> None:
    for result in local[case].step(0):
        np.testing.assert_allclose(result["logits"], expected, rtol=0, atol=1e-5)
        assert result["verified"] == 2 * result["report"]["device_bytes"]  # two devices, all bits


@pytest.mark.parametrize("case", LOCAL)
def test_each_byte_of_a_file_is_read_by_one_host(
    case: str, local: dict[str, Outcome], folder: Path
) -> None:
    each = [loader_reads(result["reads"]) for result in local[case].step(0)]
    assert_read_once([run for runs in each for run in runs], folder)
    for result, runs in zip(local[case].step(0), each, strict=True):
        report = result["report"]
        assert sum(n for _, n in runs) == report["bytes_read"] == report["bytes_needed"]
        assert report["bytes_received"] > 0


def loader_reads(reads: list[list]) -> list[tuple[int, int]]:
    """Offset and length of what was read into buffers.

    Headers, and what is read again for verification, are read by `read`, which calls
    `read_into` for the same range.
    """
    found: list[tuple[int, int]] = []
    skipped = None
    for method, _, *run in reads:
        if method == "read":
            skipped = run
        elif run == skipped:
            skipped = None
        else:
            found.append((run[0], run[1]))
    return found


def assert_read_once(runs: Iterable[tuple[int, int]], folder: Path) -> None:
    """Checks that every byte of every tensor is read once, and no other byte."""
    times = Counter(byte for start, count in runs for byte in range(start, start + count))
    assert set(times.values()) == {1}
    assert sorted(times) == list(weights(folder))


def weights(folder: Path) -> range:
    """The bytes of the file that are weights."""
    size = (folder / FILE).stat().st_size
    return range(size - sum(array.nbytes for array in neox.tensors().values()), size)


def test_from_a_store_each_byte_is_sent_to_one_host(
    folder: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """Also for weights that are split across the rows: hosts read blocks of rows and exchange."""
    count, mesh = REMOTE
    objects = {f"model/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with serve(objects) as server:
        step = hosts.step([f"{server.url}/model/"] * count, OPTIONS | {"mesh": mesh}, ["logits"])
        results = hosts.run(tmp_path, {"remote": (count, [step])})["remote"].step(0)
        requests = server.gets(f"model/{FILE}")
    needed = weights(folder)
    ranges = [range(r.start, r.stop) for r in requests if r.start >= needed.start]
    assert {byte for one in ranges for byte in one} == set(needed)
    assert sum(map(len, ranges)) <= 1.02 * len(needed)  # gaps that cost less than a request
    reports = [one["report"] for one in results]
    assert sum(report["bytes_needed"] for report in reports) == len(needed)
    assert sum(report["bytes_read"] for report in reports) == sum(map(len, ranges))
    for one in results:
        np.testing.assert_allclose(one["logits"], expected, rtol=0, atol=1e-5)
