"""Which folders and files programs are read from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtj_loader.errors import ProgramError
from mtj_loader.programs import trusted_folder
from mtj_loader.programs.trusted_folder import open_trusted_folder, read_trusted_file

NAME = "a.xla"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "outer" / "programs"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    (folder / NAME).write_bytes(b"program")
    (folder / NAME).chmod(0o600)
    return folder


def read(folder: Path, max_bytes: int = 100, size_bytes: int | None = None) -> bytes:
    with open_trusted_folder(folder) as descriptor:
        return read_trusted_file(descriptor, NAME, folder / NAME, max_bytes, size_bytes)


def refusal(folder: Path, *sizes: int) -> str:
    with pytest.raises(ProgramError) as caught:
        read(folder, *sizes)
    return str(caught.value)


def test_the_users_own_file_is_read(folder: Path):
    assert read(folder) == b"program"


@pytest.mark.parametrize("place", ["outer", "outer/programs", "outer/programs/a.xla"])
@pytest.mark.parametrize("writable", [0o020, 0o002])
def test_what_others_may_write_is_refused(folder: Path, tmp_path: Path, place: str, writable: int):
    path = tmp_path / place
    path.chmod(0o700 | writable)
    message = refusal(folder)
    assert "others may write to it" in message
    assert f"file: {path}\n" in message
    assert f"found: mode {0o700 | writable:04o}" in message


def test_only_folders_above_may_be_sticky(folder: Path):
    folder.parent.chmod(0o1777)  # as /tmp
    assert read(folder) == b"program"
    folder.chmod(0o1777)
    assert f"file: {folder}\n" in refusal(folder)


@pytest.mark.parametrize("place", ["outer", "outer/programs", "outer/programs/a.xla"])
def test_what_belongs_to_others_is_refused(folder: Path, tmp_path: Path, monkeypatch, place: str):
    inode, fstat = (tmp_path / place).stat().st_ino, os.fstat

    def fstat_of_another(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        return os.stat_result((*found[:4], 4321, *found[5:])) if found.st_ino == inode else found

    monkeypatch.setattr(os, "fstat", fstat_of_another)
    message = refusal(folder)
    assert "it belongs to another user" in message
    assert f"file: {tmp_path / place}\n" in message
    assert "found: user 4321" in message


def test_a_link_in_the_path_leads_to_what_is_checked(folder: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert read(link) == b"program"
    folder.parent.chmod(0o777)
    assert f"file: {folder.parent}\n" in refusal(link)


def test_a_file_must_not_be_a_link(folder: Path, tmp_path: Path):
    (tmp_path / "elsewhere").write_bytes(b"program")
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        read(folder)


def test_a_folder_that_becomes_a_link_is_not_followed(folder: Path, tmp_path: Path, monkeypatch):
    """The path is resolved, then replaced by a link, then opened."""
    resolved = os.path.realpath(folder)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    monkeypatch.setattr(os.path, "realpath", lambda *_, **__: resolved)
    with pytest.raises(NotADirectoryError):
        read(folder)


def test_a_named_pipe_is_refused_at_once(folder: Path):
    (folder / NAME).unlink()
    os.mkfifo(folder / NAME, 0o600)
    assert "not a plain file" in refusal(folder)


def test_sizes_are_checked_before_reading(folder: Path):
    assert "the file is too large" in refusal(folder, 6)
    assert "does not have the size that the manifest gives" in refusal(folder, 100, 8)


def test_a_missing_folder_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")


def test_no_descriptor_is_left_open(folder: Path):
    before = os.open(os.devnull, os.O_RDONLY)  # the lowest free number
    os.close(before)
    read(folder)
    (folder / NAME).chmod(0o666)
    refusal(folder)
    after = os.open(os.devnull, os.O_RDONLY)
    os.close(after)
    assert after == before


def test_root_may_own_anything(folder: Path, monkeypatch):
    monkeypatch.setattr(trusted_folder, "_ROOT", os.geteuid())
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    if Path("/").stat().st_uid == trusted_folder._ROOT:
        assert read(folder) == b"program"
