"""Whether a model fits: published TPUs in a plan, the memory of this machine before a load."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import DeviceError, MemoryLimitError
from mtj_loader.loading import memory_check, process_memory
from mtj_loader.planning import tpu_fit
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.storage.local import LocalStorage
from tests.support import neox

GIB = 1 << 30


def plan_of(path: Path, mesh: str = "mp=4", **options) -> LoadPlan:
    made = mtj_loader.plan(path, mesh, **options)
    made.checkpoint.storage.close()
    return made


def widened(plan: LoadPlan, **config: int) -> LoadPlan:
    """The plan with another config: what a fit goes by are sizes alone."""
    return replace(plan, config=replace(plan.config, **config))


def neox_20b(plan: LoadPlan, **config: int) -> LoadPlan:
    sizes = {"layers": 44, "d_model": 6144, "d_embed": 6144, "d_ff": 24576, "max_positions": 2048}
    heads = {"n_heads": 64, "n_kv_heads": 64, "head_dim": 96, "vocab_size": 50432}
    return widened(plan, **(sizes | heads | config))


def find(plan: LoadPlan, name: str) -> tpu_fit.Fit:
    return next(found for found in tpu_fit.fits(plan) if found.slice.name == name)


# The published slices.


def test_parameters_on_a_device_are_those_of_the_plan(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=4")
    assert tpu_fit.device_bytes(plan, 4) == plan.device_bytes
    assert tpu_fit.device_bytes(plan, 2) == plan_of(tmp_path, "mp=2").device_bytes


def test_cache_takes_a_key_and_a_value_of_every_head_of_the_shard(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=2")  # 2 layers, 4 heads of 6
    assert tpu_fit.cache_bytes_per_token(plan, 2) == 2 * 2 * 2 * 6 * 2
    assert tpu_fit.cache_bytes_per_token(widened(plan, n_kv_heads=1), 2) == 2 * 2 * 1 * 6 * 2
    wide = plan_of(tmp_path, "mp=2", dtype="float32")
    assert tpu_fit.cache_bytes_per_token(wide, 2) == 2 * 2 * 2 * 6 * 4


def test_cache_is_what_the_model_allocates(tmp_path: Path):
    model = mtj_loader.load(neox.write(tmp_path), "mp=2", progress=False)
    lengths = np.array([3], np.int32)
    ids = np.ones((1, 3), np.int32)
    _, cache = model.forward.prefill(model.params, ids, lengths, lengths + 2, 8)
    on_a_device = sum(leaf.nbytes // 2 for leaf in (*cache.keys, *cache.values))
    assert on_a_device == 8 * tpu_fit.cache_bytes_per_token(model.plan, 2)


@pytest.mark.parametrize(
    ("name", "devices", "gib"),
    [
        ("v2-8", 8, 8),
        ("v3-8", 8, 16),
        ("v4-8", 4, 32),
        ("v5e-1", 1, 16),
        ("v5e-4", 4, 16),
        ("v5e-8", 8, 16),
        ("v5p-8", 4, 95),
        ("v6e-1", 1, 32),
        ("v6e-4", 4, 32),
        ("v6e-8", 8, 32),
    ],
)
def test_slices_are_the_published_ones(name: str, devices: int, gib: int):
    assert tpu_fit.Slice(name, devices, gib * GIB) in tpu_fit.SLICES


def test_neox_20b_fits_where_it_should(tmp_path: Path):
    plan = neox_20b(plan_of(neox.write(tmp_path)))
    found = {each.slice.name: each.fits for each in tpu_fit.fits(plan)}
    assert [name for name, fits in found.items() if not fits] == ["v5e-1", "v6e-1"]
    v2 = find(plan, "v2-8")
    whole = 44 * 6 * 6144 + 2 * 6144  # norms and biases that every shard has
    published = 20_554_567_680  # parameters of GPT-NeoX-20B
    assert (v2.dp, v2.mp) == (1, 8)
    assert v2.device_bytes == 2 * ((published - whole) // 8 + whole)
    assert v2.free_bytes == int(0.92 * 8 * GIB) - v2.device_bytes
    assert v2.cache_tokens == v2.free_bytes // (2 * 44 * 8 * 96 * 2)


def test_a_slice_takes_the_most_shards_that_the_model_allows(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path))  # 4 heads
    assert (find(plan, "v3-8").dp, find(plan, "v3-8").mp) == (2, 4)
    assert (find(plan, "v5e-1").dp, find(plan, "v5e-1").mp) == (1, 1)


def test_parameters_alone_are_not_enough(tmp_path: Path):
    plan = neox_20b(plan_of(neox.write(tmp_path)), layers=66)
    v2 = find(plan, "v2-8")
    assert v2.free_bytes > 0
    assert not v2.fits
    assert find(widened(plan, max_positions=v2.cache_tokens), "v2-8").fits


def test_summary_says_where_it_fits(tmp_path: Path):
    lines = neox_20b(plan_of(neox.write(tmp_path)), layers=66).summary().splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip().startswith(("v2", "v3", "v5"))}
    held = tpu_fit.device_bytes(neox_20b(plan_of(tmp_path), layers=66), 8)
    assert f"dp=1, mp=8   {held / 1e9:.2f} GB of 8.59 GB" in rows["v2-8"]
    assert "no, less than 2,048 tokens" in rows["v2-8"]
    assert "  yes  " in rows["v3-8"]
    assert "GB too large" in rows["v5e-1"]


def test_dict_has_the_fits(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=4")
    made = plan.to_dict()
    assert made["cache_bytes_per_token"] == tpu_fit.cache_bytes_per_token(plan, 4)
    assert isinstance(made["fits"], list)
    held = tpu_fit.device_bytes(plan, 4)
    free = int(0.92 * 8 * GIB) - held
    assert made["fits"][0] == {
        "name": "v2-8",
        "devices": 8,
        "hbm_bytes": 8 * GIB,
        "dp": 2,
        "mp": 4,
        "device_bytes": held,
        "free_bytes": free,
        "cache_tokens": free // tpu_fit.cache_bytes_per_token(plan, 4),
        "min_tokens": 32,
        "fits": True,
    }


# The memory of devices.


@dataclass
class Accelerator:
    """A device that says how much of its memory is free, or nothing."""

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


def test_a_device_with_too_little_memory_is_refused(tmp_path: Path):
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


def test_bfloat16_is_a_hint_for_float32(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=4", dtype="float32")
    with pytest.raises(DeviceError, match="hint: dtype bfloat16 takes half"):
        memory_check.check_memory(plan, mesh_of(Accelerator(10)))


def test_devices_of_other_processes_and_silent_ones_are_not_asked(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), "mp=2")
    silent = Accelerator(None)
    memory_check.check_memory(plan, mesh_of(silent, Accelerator(0, process_index=1)))

    def refuse() -> None:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: memory_stats")

    silent.memory_stats = refuse
    memory_check.check_memory(plan, mesh_of(silent))


# The memory of the machine, which CPU devices share.


@pytest.mark.parametrize("mesh", ["mp=4", "dp=2,mp=4", "dp=8,mp=1"])
def test_what_cpu_devices_take_is_what_they_adopt(tmp_path: Path, mesh: str):
    model = mtj_loader.load(neox.write(tmp_path), mesh, progress=False)
    buffers = {
        shard.data.unsafe_buffer_pointer(): -(-shard.data.nbytes // 64) * 64
        for shard in (s for leaf in jax.tree.leaves(model.params) for s in leaf.addressable_shards)
    }
    assert memory_check.adopted_bytes(model.plan, 0) == sum(buffers.values())


def limit(monkeypatch: pytest.MonkeyPatch, **free_bytes: int) -> None:
    monkeypatch.setattr(memory_check, "available", lambda: iter(free_bytes.items()))


def test_too_little_memory_is_refused_before_a_byte_is_read(
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


def test_a_machine_that_says_nothing_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limit(monkeypatch)
    mtj_loader.load(neox.write(tmp_path), "mp=2", progress=False)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose files are written by a test."""
    monkeypatch.setattr(process_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(process_memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_free_memory_of_the_machine_counts_with_swap(system: Path):
    lines = "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 3 kB\nSwapFree: 2 kB\nHugePages_Total: 0"
    write(system / "proc/meminfo", lines)
    assert list(memory_check.available()) == [("the machine's free memory", 5 << 10)]


def test_limits_of_a_container_and_of_those_around_it_count(system: Path):
    write(system / "proc/self/cgroup", "0::/pod/box")
    write(system / "cgroup/pod/box/memory.max", 1000)
    write(system / "cgroup/pod/box/memory.current", 400)
    write(system / "cgroup/pod/box/memory.stat", "anon 100\nactive_file 20\ninactive_file 30")
    write(system / "cgroup/pod/memory.max", "max")
    write(system / "cgroup/pod/memory.current", 500)
    write(system / "cgroup/memory.max", 450)
    write(system / "cgroup/memory.current", 500)
    assert [free for _, free in memory_check.available()] == [650, 0]


def test_limits_of_version_1_count(system: Path):
    write(system / "proc/self/cgroup", "9:cpu,cpuacct:/box\n4:memory:/box\n0::/")
    write(system / "cgroup/memory/memory.limit_in_bytes", 1000)
    write(system / "cgroup/memory/memory.usage_in_bytes", 900)
    write(system / "cgroup/memory/memory.stat", "cache 500\ntotal_inactive_file 100")
    assert list(memory_check.available()) == [("the container's limit (cgroup)", 200)]


def test_the_limit_of_address_space_counts(system: Path, monkeypatch: pytest.MonkeyPatch):
    write(system / "proc/self/statm", "3 2 1 1 0 1 0")
    pages = 3 * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (pages + 7, resource.RLIM_INFINITY))
    assert list(memory_check.available()) == [("the limit of the address space (ulimit -v)", 7)]


def test_a_system_without_these_files_bounds_nothing(system: Path):
    assert list(memory_check.available()) == []


def test_this_machine_has_memory():
    assert all(free > 0 for _, free in memory_check.available())
