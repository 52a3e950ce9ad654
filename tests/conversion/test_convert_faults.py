"""Conversion with faults: whatever fails and when, the target is complete or unchanged."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mtj_loader
from mtj_loader.conversion import convert_checkpoint, convert_tensors
from mtj_loader.errors import MachineError, StorageError, UsageError
from mtj_loader.storage import replace_folder
from tests.conversion.test_convert import leftovers, refusal, snapshot, write
from tests.support.checkpoints import safetensors_bytes

ROOT = Path(__file__).parents[2]
MAYBE_KILLED = "left by a conversion that was killed, or written by one that still runs"
CALLS = ["open", "pwrite", "preadv", "fsync", "mkdir", "rename"]  # functions of the module os


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "tiny")


class Fault:
    """Makes the n-th call of any function in CALLS fail, in any thread."""

    def __init__(self, monkeypatch, n: int, error: BaseException) -> None:
        self.left, self.error, self.lock = n, error, threading.Lock()
        for name in CALLS:
            monkeypatch.setattr(os, name, self.guarded(getattr(os, name)))

    def guarded(self, call):
        def run(*arguments, **options):
            with self.lock:
                self.left -= 1
                fails = self.left == 0
            if fails:
                raise self.error
            return call(*arguments, **options)

        return run


def refuse_exchange(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr
)
def test_any_call_may_fail(source, monkeypatch, error, overwrite):
    """Each system call in turn fails with Ctrl-C or a full disk; overwriting renames twice."""
    monkeypatch.setattr(replace_folder, "exchange", refuse_exchange)
    out, kind, options = source.with_name("out"), type(error), {"overwrite": overwrite}
    expected = snapshot(Path(mtj_loader.convert(source, out, dtype="float16").out))
    old = write(source.with_name("old"))
    for n in itertools.count(1):
        mtj_loader.convert(old, out, dtype="float32", overwrite=True)
        before = snapshot(out)
        if not overwrite:
            out.rename(source.with_name("elsewhere"))
        with monkeypatch.context() as patch:
            fault = Fault(patch, n, error)
            failed = catch_error(
                lambda: mtj_loader.convert(source, out, dtype="float16", **options)
            )
        done = out.exists() and snapshot(out) == expected  # also if it failed after the rename
        untouched = snapshot(out) == before if overwrite else not out.exists()
        assert done or (failed and untouched)
        assert failed in (None, KeyboardInterrupt if kind is KeyboardInterrupt else StorageError)
        left = {name for name in leftovers(source.parent) if name.startswith(".")}
        assert all(name.endswith(".old") and snapshot(out) == expected for name in left)
        if fault.left > 0:
            break
        clean(source.parent)
    assert n > 20


def catch_error(function) -> type | None:
    """The type of the error that a function raises, None if it succeeds."""
    try:
        function()
    except (KeyboardInterrupt, MachineError) as error:
        return type(error)
    return None


def clean(folder: Path) -> None:
    for name in leftovers(folder):
        if name not in ("tiny", "old", "out"):
            subprocess.run(["rm", "-r", str(folder / name)], check=True)


def test_message_for_a_full_disk(source, monkeypatch):
    def pwrite(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    message = refusal(StorageError, source, dtype="float16")
    assert message.startswith("cannot write\n")
    assert "found: No space left on device\n" in message
    assert "free disk space, or choose another disk" in message
    assert leftovers(source.parent) == ["tiny"]


def test_no_thread_outlives_a_failure(source, monkeypatch):
    def slow(*arguments):
        time.sleep(0.2)
        raise StorageError("cannot write")

    monkeypatch.setattr(convert_tensors, "write_at", slow)
    before = {*threading.enumerate()}
    refusal(StorageError, source, dtype="float16")
    assert {*threading.enumerate()} <= before


def test_short_writes_are_continued(source, monkeypatch):
    whole = mtj_loader.convert(source, source.with_name("whole"), dtype="float16")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:5], at))
    parts = mtj_loader.convert(source, source.with_name("parts"), dtype="float16")
    assert snapshot(Path(whole.out)) == snapshot(Path(parts.out))


def test_everything_is_synced_before_the_rename(source, monkeypatch):
    """fsync of every file and of their folder, then the rename, then fsync of the parent folder."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor):
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def logged_rename(old, new):
        events.append(("rename", str(old)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    report = mtj_loader.convert(source, dtype="float16")
    *files, folder, rename_, parent = events
    assert {Path(path).name for _, path in files} == set(snapshot(Path(report.out)))
    assert folder == ("fsync", rename_[1])
    assert rename_[0] == "rename"
    assert parent == ("fsync", str(source.parent))


def test_a_folder_that_may_be_in_use_is_not_called_abandoned(source, monkeypatch):
    def flock(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")  # NFS

    hidden = source.with_name(".tiny-float16.0123abcd.partial")
    hidden.mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    report = mtj_loader.convert(source, dtype="float16")
    assert report.warnings == (f"{MAYBE_KILLED}: {hidden}",)
    assert hidden.exists()


def test_a_folder_of_another_user_is_not_called_abandoned(source, monkeypatch):
    def refuse_hidden(path, *arguments, **options):
        if path == hidden:
            raise OSError(errno.EACCES, "Permission denied")
        return os_open(path, *arguments, **options)

    hidden, os_open = source.with_name(".tiny-float16.0123abcd.partial"), os.open
    hidden.mkdir()
    monkeypatch.setattr(os, "open", refuse_hidden)
    report = mtj_loader.convert(source, dtype="float16")
    assert report.warnings == (f"{MAYBE_KILLED}: {hidden}",)


def test_processes_that_check_a_folder_at_once_see_no_conversion(tmp_path):
    checking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(checking, fcntl.LOCK_SH)  # as another process does while it checks
    assert replace_folder.is_locked(tmp_path) is False
    release = threading.Timer(0.1, os.close, [checking])
    release.start()
    with replace_folder.locked(tmp_path):  # waits for the check
        assert replace_folder.is_locked(tmp_path)
    release.join()


def test_a_lock_that_fails_for_another_reason_is_an_error(source, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = refusal(StorageError, source, dtype="float16")
    assert message.endswith("tiny-float16\n  found: Input/output error\n")


# Overwriting.


KILLED = """
import errno, os, signal, sys
from pathlib import Path
import mtj_loader
from mtj_loader.storage import replace_folder

def refuse(*_):
    raise OSError(int(sys.argv[3]), "refused")

def rename(self, target, renames=[]):
    renames.append(self)
    if len(renames) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename(self, target)

replace_folder.exchange = refuse
Path.rename = rename
mtj_loader.convert(sys.argv[1], sys.argv[2], dtype="float16", overwrite=True)
"""


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL], ids=["ENOSYS", "EINVAL"])
def test_the_next_conversion_restores_what_was_killed_between_two_renames(source, code):
    out = Path(mtj_loader.convert(source, dtype="float32").out)
    before = snapshot(out)
    arguments = [str(source), str(out), str(code)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    message = refusal(UsageError, source, out, dtype="float16")
    assert "exists already" in message
    assert "found: restored after an overwrite that was killed\n" in message
    assert snapshot(out) == before
    report = mtj_loader.convert(source, out, dtype="float16", overwrite=True)
    (warning,) = report.warnings
    assert warning.endswith(".partial")
    assert snapshot(out) != before


def test_the_target_always_exists_while_it_is_overwritten(source, monkeypatch):
    out = Path(mtj_loader.convert(source, dtype="float32").out)
    monkeypatch.setattr(os, "rename", None)  # a rename would leave no target for a moment
    mtj_loader.convert(source, out, dtype="float16", overwrite=True)
    assert leftovers(source.parent) == ["tiny", "tiny-float32"]
    assert '"float16"' in (out / "config.json").read_text()


def test_a_target_created_between_two_renames_keeps_both(source, monkeypatch):
    def rename(self, target):
        rename_path(self, target)
        if self == out and not out.exists():
            out.mkdir()
            (out / "theirs").touch()

    rename_path = Path.rename
    out = Path(mtj_loader.convert(source, dtype="float32").out)
    before = snapshot(out)
    monkeypatch.setattr(replace_folder, "exchange", refuse_exchange)
    monkeypatch.setattr(Path, "rename", rename)
    message = refusal(StorageError, source, out, dtype="float16", overwrite=True)
    (old,) = replace_folder.find_hidden(out)
    assert snapshot(old) == before
    assert message == (
        f"another process created the output meanwhile\n  file: {out}\n"
        f"  found: Directory not empty\n  hint: the old output is now {old}\n"
    )
    assert leftovers(out) == ["theirs"]


def test_an_exchange_that_fails_changes_nothing(source, monkeypatch):
    def fail(*_):
        raise OSError(errno.EACCES, "Permission denied")

    out = Path(mtj_loader.convert(source, dtype="float32").out)
    before = snapshot(out)
    monkeypatch.setattr(replace_folder, "exchange", fail)
    message = refusal(StorageError, source, out, dtype="float16", overwrite=True)
    assert message == f"cannot write\n  file: {out}\n  found: Permission denied\n"
    assert snapshot(out) == before
    assert leftovers(source.parent) == ["tiny", "tiny-float32"]


def test_errors_name_the_file_as_it_would_be(source, monkeypatch):
    def fail(path, *_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    message = refusal(StorageError, source, dtype="float16")
    assert f"file: {source.parent}/tiny-float16/" in message


def test_conversions_to_one_target_at_the_same_time(source, monkeypatch):
    """Another one starts and ends meanwhile, as if both had checked the target before."""
    out = source.with_name("out")

    def racing(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(convert_checkpoint, "check_target", lambda *_, **__: [])
            patch.setattr(convert_checkpoint, "convert_tensors", original)
            mtj_loader.convert(source, out, dtype="bfloat16")
        return original(*arguments, **options)

    original = convert_checkpoint.convert_tensors
    monkeypatch.setattr(convert_checkpoint, "convert_tensors", racing)
    message = refusal(StorageError, source, out, dtype="float16")
    assert message.startswith(f"another process created the output meanwhile\n  file: {out}\n")
    assert '"bfloat16"' in (out / "config.json").read_text()
    assert leftovers(source.parent) == ["out", "tiny"]


# Memory.


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Converts 300 MB of tensors in much less than the minimum of `host_memory`, 64 MiB."""
    source = write(tmp_path / "s")
    elements = 150_000_000
    entry = {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]}
    with (source / "model.safetensors").open("wb") as file:
        file.write(safetensors_bytes({"w": entry}))
        file.truncate(file.tell() + 2 * elements)  # a sparse file of zeros
    script = (
        "import resource, sys, mtj_loader\n"
        "mtj_loader.convert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "report = mtj_loader.convert(sys.argv[1], dtype='float16', progress=False)\n"
        "print(peak() - before)\n"
    )
    grown = subprocess.run(
        [sys.executable, "-c", script, str(source)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int(grown) * 1024 < 64 << 20


def test_open_files_do_not_accumulate(tmp_path, monkeypatch):
    source = write(tmp_path / "s", {f"h.{i}.w": np.ones(3, np.float32) for i in range(300)})
    monkeypatch.setattr(convert_tensors, "CHUNK_BYTES", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        mtj_loader.convert(source, dtype="float16", max_shard_size=8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
