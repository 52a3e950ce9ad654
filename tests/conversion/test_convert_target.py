"""The target of a conversion: what is replaced, and what is never touched."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import mtj_loader
from mtj_loader.conversion import convert_tensors
from mtj_loader.conversion import output_folder as folder_module
from mtj_loader.errors import StorageError, UsageError
from mtj_loader.storage.replace_folder import restore
from tests.support.conversions import (
    TENSORS,
    bfloat16,
    leftovers,
    refusal,
    snapshot,
    write,
)


def test_existing_target_is_not_changed(source):
    out = Path(mtj_loader.convert(source, dtype="float16").out)
    before = snapshot(out)
    message = refusal(UsageError, source, dtype="float16")
    assert "the output exists already" in message
    assert f"file: {out}\n" in message
    assert "overwrite" in message
    assert snapshot(out) == before


def test_overwrite_replaces_the_target(source):
    out = Path(mtj_loader.convert(source, dtype="float16").out)
    (out / "old.txt").write_text("old")
    mtj_loader.convert(source, out, dtype="float32", overwrite=True)
    assert load_file(out / "model.safetensors")["h.0.w"].dtype == np.float32
    assert not (out / "old.txt").exists()
    assert leftovers(source.parent) == ["tiny", "tiny-float16"]


def test_overwrite_replaces_only_checkpoints(source, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("ten years")
    message = refusal(UsageError, source, home, dtype="float16", overwrite=True)
    assert "is not a checkpoint, so it is not replaced" in message
    file = tmp_path / "file"
    file.write_text("text")
    assert "is not a" in refusal(UsageError, source, file, dtype="float16", overwrite=True)
    assert (home / "thesis.tex").exists()
    assert file.read_text() == "text"


def test_an_existing_target_that_cannot_be_read(source, tmp_path, monkeypatch):
    def is_file(path):
        if path.parent == out:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path_is_file(path)

    out, path_is_file = tmp_path / "out", Path.is_file
    out.mkdir()
    monkeypatch.setattr(Path, "is_file", is_file)
    message = refusal(StorageError, source, out, dtype="float16", overwrite=True)
    assert message == f"cannot write\n  file: {out}\n  found: Permission denied\n"


def test_overwrite_of_an_empty_folder(source, tmp_path):
    (tmp_path / "out").mkdir()
    mtj_loader.convert(source, tmp_path / "out", dtype="float16", overwrite=True)
    assert (tmp_path / "out/model.safetensors").exists()


def test_the_source_is_never_replaced(source, tmp_path):
    for out in (source, source / ".", tmp_path):
        shutil.copy(source / "config.json", tmp_path / "config.json")
        message = refusal(UsageError, source, out, dtype="float16", overwrite=True)
        assert "would replace its source" in message
    link = tmp_path / "link"
    link.symlink_to(source)
    assert "would replace" in refusal(UsageError, source, link, dtype="float16", overwrite=True)


def test_target_inside_the_source(source):
    out = source / "half"
    mtj_loader.convert(source, out, dtype="float16")
    assert leftovers(out) == ["config.json", "model.safetensors"]


def test_overwrite_through_a_link_replaces_its_target(source, tmp_path):
    real = write(tmp_path / "real", {"w": bfloat16(2)})
    (tmp_path / "link").symlink_to(real)
    report = mtj_loader.convert(source, tmp_path / "link", dtype="float16", overwrite=True)
    assert report.out == str(real)
    assert (tmp_path / "link").is_symlink()
    assert load_file(real / "model.safetensors").keys() == TENSORS.keys()


def test_missing_parent(source, tmp_path):
    message = refusal(UsageError, source, tmp_path / "a/b", dtype="float16")
    assert "the parent folder of the output does not exist" in message
    assert leftovers(tmp_path) == ["tiny"]


def test_target_created_during_the_conversion_is_kept(source, monkeypatch):
    out = source.with_name("out")

    def racing(*arguments, **options):
        out.mkdir()
        (out / "theirs").touch()
        return original(*arguments, **options)

    original = convert_tensors.convert_tensors
    monkeypatch.setattr("mtj_loader.conversion.convert_checkpoint.convert_tensors", racing)
    message = refusal(StorageError, source, out, dtype="float16")
    assert "found: Directory not empty" in message
    assert leftovers(out) == ["theirs"]
    assert leftovers(source.parent) == ["out", "tiny"]


def test_not_enough_disk_space(source, monkeypatch):
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage._replace(free=100))
    message = refusal(StorageError, source, dtype="float16")
    assert message.startswith("not enough disk space\n")
    assert "found: 100 B\n" in message
    assert leftovers(source.parent) == ["tiny"]


@pytest.mark.parametrize("order", [("00000000", "ffffffff"), ("ffffffff", "00000000")])
def test_the_folder_that_was_renamed_last_is_restored(order, tmp_path):
    target = tmp_path / "out"
    for version, name in enumerate(order):
        target.mkdir()
        (target / "version").write_text(str(version))
        target.rename(tmp_path / f".out.{name}.old")
        time.sleep(0.02)  # longer than a tick of the file system's clock
    assert restore(target)
    assert (target / "version").read_text() == "1"


def test_an_earlier_output_that_was_kept_is_not_called_abandoned(tmp_path):
    (kept := tmp_path / ".out.00000000.old").mkdir()
    (tmp_path / "out").mkdir()
    (warning,) = folder_module.check_target(tmp_path / "out", overwrite=True)
    assert warning == (
        f"an earlier output, left by an overwrite; delete it if you do not need it: {kept}"
    )
