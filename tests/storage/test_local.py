"""Local storage: exact reads by several threads, safe file names, and error messages."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mtj_loader.errors import CheckpointError, FormatError, StorageError
from mtj_loader.formats.strict_json import read_object
from mtj_loader.storage.base import check_unchanged, is_relative_name, read_file, read_small
from mtj_loader.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(100)))
    with LocalStorage(tmp_path) as opened:
        yield opened


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_names_are_the_top_level_files(storage, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.bin").touch()
    (tmp_path / "0.json").touch()
    assert storage.names() == ["0.json", "a.bin"]
    assert storage.exists("sub/b.bin")
    assert not storage.exists("sub")
    assert not storage.exists("nothing")


def test_names_of_a_missing_folder(tmp_path):
    with pytest.raises(StorageError, match="cannot list the folder") as caught:
        LocalStorage(tmp_path / "gone").names()
    assert "No such file" in str(caught.value)


def test_reads_are_exact(storage):
    assert storage.read("a.bin", 10, 5) == bytes([10, 11, 12, 13, 14])
    assert storage.read("a.bin", 100, 0) == b""
    buffer = np.zeros(8, np.uint8)
    storage.read_into("a.bin", 92, buffer)
    storage.read_into("a.bin", 92, buffer[:0])
    assert buffer.tolist() == list(range(92, 100))
    backing = bytearray(4)
    storage.read_into("a.bin", 1, memoryview(backing)[1:3])
    assert backing == bytes([0, 1, 2, 0])


@pytest.mark.parametrize("offset", [95, 100, 10**15])
def test_read_past_the_end(storage, offset):
    for read in (
        lambda: storage.read("a.bin", offset, 10**12),  # would not fit in memory
        lambda: storage.read_into("a.bin", offset, np.zeros(10, np.uint8)),
    ):
        with pytest.raises(CheckpointError, match="ends in the middle of a read") as caught:
            read()
        assert "file: a.bin" in str(caught.value)
        assert f"bytes at byte {offset:,}" in str(caught.value)
        assert f"found: {max(100 - offset, 0)} bytes" in str(caught.value)


def test_short_reads_are_continued(storage, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:7]], at))
    assert storage.read("a.bin", 3, 50) == bytes(range(3, 53))


def test_failed_read_names_file_and_offset(storage, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match=r"a read at byte 5 failed") as caught:
        storage.read_into("a.bin", 5, np.zeros(3, np.uint8))
    assert "a.bin" in str(caught.value)
    assert "found: Input/output error" in str(caught.value)


def test_file_that_cannot_be_opened(storage, monkeypatch):
    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StorageError, match="cannot open the file") as caught:
        storage.read("a.bin", 0, 1)
    assert "Too many open files" in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a.bin/x", "nothing/x"], ids=["long", "in-file", "x"])
def test_names_of_missing_files(storage, name):
    assert not storage.exists(name)
    with pytest.raises(CheckpointError, match="the file is missing"):
        storage.version(name)


def test_file_whose_status_cannot_be_read(storage, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "stat", fail)
    for method in (storage.exists, storage.version):
        with pytest.raises(StorageError, match="cannot read the status of the file") as caught:
            method("a.bin")
        assert "found: Permission denied" in str(caught.value)


def test_the_working_directory_may_change(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    relative = LocalStorage(Path(tmp_path.name))
    monkeypatch.chdir("/")
    with relative:
        assert relative.read("a.bin", 1, 1) == b"\x01"


def test_missing_file_and_pipe(storage, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="the file is missing\n  file: nothing"):
        storage.read("nothing", 0, 1)
    with pytest.raises(FormatError, match="not a regular file\n  file: pipe"):
        storage.read_into("pipe", 0, np.zeros(1, np.uint8))


def test_the_last_of_several_users_closes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    before = open_descriptors()
    with LocalStorage(tmp_path) as storage:
        with storage:
            assert storage.read("a", 0, 3) == b"abc"
        assert open_descriptors() == before + 1
    assert open_descriptors() == before


def test_a_file_is_opened_once_and_closed(tmp_path):
    (tmp_path / "a").write_bytes(b"12345678")
    before = open_descriptors()
    with LocalStorage(tmp_path) as storage:
        for _ in range(5):
            storage.read("a", 0, 8)
        assert open_descriptors() == before + 1
    assert open_descriptors() == before
    assert storage.read("a", 0, 1) == b"1"  # reopened
    storage.close()
    assert open_descriptors() == before


def test_threads_share_one_descriptor(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    (tmp_path / "a").write_bytes(data.tobytes())
    before = open_descriptors()
    with LocalStorage(tmp_path) as storage, ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: storage.read("a", at, 64), range(0, 1 << 16, 64)))
        assert open_descriptors() == before + 1
    assert b"".join(parts) == data.tobytes()


UNSAFE = [
    "", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./x", "a//b", "a/", "C:x", "c:\\x",
    "a\\b", "..\\x", "\\\\host\\x", "a\0b", "a\nb", "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_names_that_could_leave_the_folder(storage, name):
    assert not is_relative_name(name)
    for method in (storage.version, storage.exists, lambda n: storage.read(n, 0, 1)):
        with pytest.raises(FormatError, match="not a relative file name") as caught:
            method(name)
        assert f"file: {name!a}" in str(caught.value)


@pytest.mark.parametrize("name", ["a", "a.safetensors", "sub/a", "..a", "a..b", "…", "a b"])
def test_names_that_stay(name):
    assert is_relative_name(name)


def test_links(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "real").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (tmp_path / "model-2").mkdir()  # its path starts like the folder's
    (tmp_path / "model-2" / "secret").touch()
    (folder / "good").symlink_to("sub/real")
    (folder / "absolute").symlink_to(folder / "sub" / "real")
    (folder / "loop").symlink_to("loop")
    leaving = {"up": "../secret", "full": str(tmp_path / "secret"), "near": "../model-2/secret"}
    for name, target in leaving.items():
        (folder / name).symlink_to(target)
    (folder / "door").symlink_to("..")
    with LocalStorage(folder) as storage:
        assert storage.read("good", 0, 6) == b"inside"
        assert storage.read("absolute", 0, 6) == b"inside"
        assert not storage.exists("loop")
        for name in (*leaving, "door/secret"):
            with pytest.raises(FormatError, match="symbolic link leaves") as caught:
                storage.read(name, 0, 1)
            assert f"file: {name}" in str(caught.value)
            assert f"found: {tmp_path}" in str(caught.value)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with LocalStorage(link) as storage:  # the user may choose a link
        assert storage.read("good", 0, 6) == b"inside"


def test_snapshot_of_the_hub_cache(tmp_path):
    """Its files are links to its blobs, which may be links to blobs shared by all repositories."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    for folder in (snapshot, repository / "blobs", tmp_path / "blobs" / "ab"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "one").write_bytes(b"1")
    (tmp_path / "blobs" / "ab" / "two").write_bytes(b"2")
    (repository / "blobs" / "two").symlink_to("../../blobs/ab/two")
    (tmp_path / "models--org--other").mkdir()
    (tmp_path / "models--org--other" / "secret").write_bytes(b"3")
    (snapshot / "a").symlink_to("../../blobs/one")
    (snapshot / "b").symlink_to("../../blobs/two")
    (snapshot / "c").symlink_to("../../../models--org--other/secret")
    with LocalStorage(snapshot) as storage:
        assert storage.read("a", 0, 1) == b"1"
        assert storage.read("b", 0, 1) == b"2"
        with pytest.raises(FormatError, match="symbolic link leaves"):
            storage.read("c", 0, 1)


def test_check_unchanged(storage, tmp_path):
    version = storage.version("a.bin")
    assert (version.path, version.size_bytes) == ("a.bin", 100)
    check_unchanged(storage, version)
    (tmp_path / "a.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="changed after its header was read") as caught:
        check_unchanged(storage, version)
    assert "expected: 100 bytes" in str(caught.value)
    assert "found: 5 bytes" in str(caught.value)


def test_read_object_is_bounded(storage, tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": 1}')
    assert read_object(storage, "a.json", max_bytes=8) == {"a": 1}
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="at most 8 bytes") as caught:
        read_object(storage, "big.json", max_bytes=8)
    assert "file: big.json" in str(caught.value)


def test_read_file(storage, tmp_path):
    """Files at paths of the user: a link may lead anywhere; a pipe is refused, not waited for."""
    (tmp_path / "link").symlink_to("a.bin")
    assert read_file(tmp_path / "link", 100) == bytes(range(100))
    os.mkfifo(tmp_path / "pipe")
    before = open_descriptors()
    for path, max_bytes, kind in [
        (tmp_path / "a.bin", 99, FormatError),
        (tmp_path / "pipe", 9, FormatError),
        (Path("/dev/zero"), 9, FormatError),
        (tmp_path, 9, StorageError),
        (tmp_path / "none", 9, StorageError),
        (Path("\0"), 9, StorageError),
    ]:
        with pytest.raises(kind) as caught:
            read_small(path, max_bytes)
        assert caught.value.file in (str(path), ascii(path))
    assert open_descriptors() == before
