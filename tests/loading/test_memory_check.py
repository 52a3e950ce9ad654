"""Checks that the parameters fit into the free memory of the devices or of this machine."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import DeviceError, MemoryLimitError
from mtj_loader.loading import memory_check, process_memory
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.storage.local import LocalStorage
from tests.support import neox

GIB = 1 << 30


def plan_of(path: Path, mesh: str, **options) -> LoadPlan:
    plan = mtj_loader.plan(path, mesh, **options)
    plan.checkpoint.storage.close()
    return plan


# The memory of devices.


@dataclass
class Accelerator:
    """A device that may report its free memory."""

    free_bytes: int | None
    process_index: int = 0
    platform: str = "tpu"

    def memory_stats(self) -> dict[str, int] | None:
        if self.free_bytes is None:
            return None
        return {"bytes_limit": GIB, "bytes_in_use": GIB - self.free_bytes}

    def __str__(self) -> str:
        return "TPU_0"


def mesh_of(*devices: Accelerator) -> SimpleNamespace:
    return SimpleNamespace(devices=np.array(devices, object))


def test_a_device_with_too_little_memory_is_rejected(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=2")
    enough = Accelerator(plan.device_bytes)
    memory_check.check_memory(plan, mesh_of(enough, enough))
    with pytest.raises(DeviceError):
        memory_check.check_memory(plan, mesh_of(enough, Accelerator(plan.device_bytes - 1)))
    with pytest.raises(DeviceError) as error:
        memory_check.check_memory(plan, mesh_of(enough, Accelerator(6000)))
    assert str(error.value).splitlines() == [
        "the parameters do not fit on a device",
        "  expected: 10.78 kB free on each",
        "  found: 6.00 kB on TPU_0",
        "  hint: mp=4 takes 5.78 kB on each device",
    ]


def test_the_hint_for_float32_is_bfloat16(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=4", dtype="float32")
    with pytest.raises(DeviceError, match="hint: dtype bfloat16 takes half"):
        memory_check.check_memory(plan, mesh_of(Accelerator(10)))


def test_devices_of_other_processes_and_without_statistics_are_skipped(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=2")
    unknown = Accelerator(None)
    memory_check.check_memory(plan, mesh_of(unknown, Accelerator(0, process_index=1)))

    def fail() -> None:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: memory_stats")

    unknown.memory_stats = fail
    memory_check.check_memory(plan, mesh_of(unknown))


# The memory of the machine, which CPU devices share.


@pytest.mark.parametrize("mesh", ["mp=4", "dp=2,mp=4", "dp=8,mp=1"])
def test_cpu_devices_need_the_memory_that_they_adopt(tmp_path: Path, mesh: str):
    model = mtj_loader.load(neox.write(tmp_path), mesh, progress=False)
    buffers = {
        shard.data.unsafe_buffer_pointer(): -(-shard.data.nbytes // 64) * 64
        for shard in (s for leaf in jax.tree.leaves(model.params) for s in leaf.addressable_shards)
    }
    assert memory_check.adopted_bytes(model.plan, 0) == sum(buffers.values())


def limit(monkeypatch: pytest.MonkeyPatch, **free_bytes: int) -> None:
    monkeypatch.setattr(memory_check, "available", lambda: iter(free_bytes.items()))


def test_too_little_memory_is_rejected_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(neox.write(tmp_path), "dp=2,mp=4")
    reads: list[str] = []
    monkeypatch.setattr(LocalStorage, "read_into", lambda self, path, *_: reads.append(path))
    needed = memory_check.adopted_bytes(plan, 0)
    limit(monkeypatch, machine=1 << 40, container=needed - 1)
    with pytest.raises(MemoryLimitError) as error:
        mtj_loader.load(plan=plan, progress=False)
    assert str(error.value).splitlines() == [
        "the parameters do not fit into the memory available to this process",
        f"  expected: {needed / 1000:.2f} kB for 8 CPU devices, which share it",
        f"  found: {(needed - 1) / 1000:.2f} kB within container",
        "  hint: use more hosts or a smaller model",
    ]
    assert reads == []


def test_just_enough_memory_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(neox.write(tmp_path), "dp=2,mp=4", dtype="float32")
    limit(monkeypatch, machine=memory_check.adopted_bytes(plan, 0))
    mtj_loader.load(plan=plan, progress=False)
    limit(monkeypatch, machine=0)
    with pytest.raises(MemoryLimitError, match="hint: dtype bfloat16 takes half"):
        mtj_loader.load(plan=plan, progress=False)


def test_a_machine_without_known_limits_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limit(monkeypatch)
    mtj_loader.load(neox.write(tmp_path), "mp=2", progress=False)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose files are written by the test."""
    monkeypatch.setattr(process_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(process_memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_the_free_memory_of_the_machine_includes_swap(system: Path):
    lines = "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 3 kB\nSwapFree: 2 kB\nHugePages_Total: 0"
    write(system / "proc/meminfo", lines)
    assert list(memory_check.available()) == [("the machine's free memory", 5 << 10)]


def test_limits_of_a_container_and_its_parents(system: Path):
    write(system / "proc/self/cgroup", "0::/pod/box")
    write(system / "cgroup/pod/box/memory.max", 1000)
    write(system / "cgroup/pod/box/memory.current", 400)
    write(system / "cgroup/pod/box/memory.stat", "anon 100\nactive_file 20\ninactive_file 30")
    write(system / "cgroup/pod/memory.max", "max")
    write(system / "cgroup/pod/memory.current", 500)
    write(system / "cgroup/memory.max", 450)
    write(system / "cgroup/memory.current", 500)
    assert [free for _, free in memory_check.available()] == [650, 0]


def test_limits_of_cgroup_version_1(system: Path):
    write(system / "proc/self/cgroup", "9:cpu,cpuacct:/box\n4:memory:/box\n0::/")
    write(system / "cgroup/memory/memory.limit_in_bytes", 1000)
    write(system / "cgroup/memory/memory.usage_in_bytes", 900)
    write(system / "cgroup/memory/memory.stat", "cache 500\ntotal_inactive_file 100")
    assert list(memory_check.available()) == [("the container's limit (cgroup)", 200)]


def test_the_limit_of_the_address_space(system: Path, monkeypatch: pytest.MonkeyPatch):
    write(system / "proc/self/statm", "3 2 1 1 0 1 0")
    pages = 3 * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (pages + 7, resource.RLIM_INFINITY))
    assert list(memory_check.available()) == [("the limit of the address space (ulimit -v)", 7)]


def test_a_system_without_these_files_has_no_known_limits(system: Path):
    assert list(memory_check.available()) == []


def test_this_machine_has_memory():
    assert all(free > 0 for _, free in memory_check.available())
