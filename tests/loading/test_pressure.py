"""Errors, Ctrl-C, and a lack of memory or threads in a program that continues."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import MachineError, MemoryLimitError, StorageError
from mtj_loader.loading import buffers, load_params
from mtj_loader.loading.stream import Streamer
from mtj_loader.planning.load_plan import LoadPlan
from tests.support import neox
from tests.support.adapters import linear, write_adapter
from tests.support.command_line import FIXTURE, run


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Weak references to the memory of every allocated buffer."""
    found: list[weakref.ref] = []
    allocate = buffers.allocate

    def noted(size_bytes: int) -> np.ndarray:
        array = allocate(size_bytes)
        assert array.base is not None
        found.append(weakref.ref(array.base))
        return array

    monkeypatch.setattr(buffers, "allocate", noted)
    return found


def assert_released(owners: list[weakref.ref]) -> None:
    """Checks that no buffer is in memory any longer."""
    gc.collect()  # JAX releases adopted memory during garbage collection
    assert owners
    assert all(owner() is None for owner in owners)


def test_ctrl_c_ends_threads_and_frees_memory(monkeypatch: pytest.MonkeyPatch, owners: list):
    plan = mtj_loader.plan(FIXTURE, "mp=8")
    read, calls = plan.checkpoint.storage.read_into, []

    def interrupted(path: str, offset_bytes: int, buffer: np.ndarray) -> None:
        calls.append(offset_bytes)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        read(path, offset_bytes, buffer)

    monkeypatch.setattr(plan.checkpoint.storage, "read_into", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as kept:
        mtj_loader.load(plan=plan)
    assert len(calls) < 60  # of hundreds
    assert set(threading.enumerate()) <= before
    del kept
    assert_released(owners)


def fail_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streamer, "_check_finite", refuse)


def fail_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_params, "_compare", refuse)


def refuse(_: object) -> int:
    raise StorageError("at the very end")


@pytest.mark.parametrize("fail", [fail_reading, fail_comparing])
def test_a_kept_error_has_its_variables_but_not_the_parameters(
    fail: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, owners: list
):
    """A debugger sees the variables of every function; at most a few batches stay in memory."""
    monkeypatch.setattr(buffers.Buffers, "batch_bytes", 100_000)
    fail(monkeypatch)
    before = live_bytes()
    with pytest.raises(StorageError, match="at the very end") as kept:
        mtj_loader.load(FIXTURE, "mp=8")
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(kept.value.__traceback__)]
    assert all(frames)
    assert any("streamer" in variables or "stats" in variables for variables in frames)
    assert live_bytes() - before < 1_000_000  # of 7.6 MB
    assert sum(owner() is not None for owner in owners) < len(owners) / 4
    del kept, frames
    assert_released(owners)


def test_a_kept_error_of_an_adapter_does_not_have_its_parameters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = mtj_loader.load(FIXTURE, "mp=8")
    terms = [linear(f"gpt_neox.layers.{i}.mlp.dense_h_to_4h", 768, 192) for i in range(6)]
    adapter = write_adapter(tmp_path / "adapter", {k: v for one in terms for k, v in one.items()})
    monkeypatch.setattr(load_params, "_check_adapters", refuse)
    before = live_bytes()
    with pytest.raises(StorageError, match="at the very end") as kept:
        model.with_adapter(adapter)
    assert live_bytes() - before < 600_000  # of 1.8 MB
    assert all(frame.f_locals for frame, _ in traceback.walk_tb(kept.value.__traceback__))
    assert model.generate([5], max_new_tokens=1, temperature=0.0)


def live_bytes() -> int:
    """The size of all arrays in this process."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


# A lack of resources.


def test_a_failed_read_names_file_and_byte(monkeypatch: pytest.MonkeyPatch):
    preadv, calls = os.preadv, []

    def failing(descriptor: int, views: list, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 30:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", failing)
    result = run("load", FIXTURE, "--mesh", "mp=1")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: a read at byte ")
    assert f"{calls[29]:,}" in result.stderr
    assert "safetensors\n  found: Input/output error" in result.stderr


def no_mapping(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def no_scratch(*_: object) -> None:
    raise MemoryError("Unable to allocate 1.00 MiB for an array")


@pytest.mark.parametrize(
    ("where", "name", "fails", "needed"),
    [
        (mmap, "mmap", no_mapping, r"[78],\d{3},\d{3} contiguous bytes"),
        (Streamer, "_scratch", no_scratch, "Unable to allocate 1.00 MiB for an array"),
    ],
    ids=["main thread", "worker"],
)
def test_no_memory(
    where: object, name: str, fails: Callable, needed: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(where, name, fails)
    words = rf"out of memory on the host\n  expected: {needed}\n  found: .* within "
    with pytest.raises(MemoryLimitError, match=words):
        mtj_loader.load(FIXTURE, "mp=8")


def convert_it(plan: LoadPlan) -> None:
    mtj_loader.convert(plan.checkpoint.location, dtype="float16")


def load_it(plan: LoadPlan) -> None:
    mtj_loader.load(plan=plan)


@pytest.mark.parametrize("work", [load_it, convert_it])
def test_no_thread(
    work: Callable[[LoadPlan], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = mtj_loader.plan(neox.write(tmp_path / "model"), "mp=2")

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MachineError, match="the system cannot start another thread"):
        work(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
