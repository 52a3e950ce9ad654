"""Converting checkpoints: the contents of the output, invalid arguments, and failed runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import mtj_loader
from mtj_loader.conversion import convert_tensors
from mtj_loader.conversion import output_folder as folder_module
from mtj_loader.conversion.convert_plan import plan_files
from mtj_loader.errors import CheckpointError, FormatError, NonFiniteError, StorageError, UsageError
from mtj_loader.formats.checkpoint import open_checkpoint
from mtj_loader.formats.records import TensorRecord
from mtj_loader.options import Source
from tests.support import neox
from tests.support.checkpoints import safetensors_bytes, write_checkpoint
from tests.support.command_line import run
from tests.support.hub import serve

ROOT = Path(__file__).parents[2]
BF16 = np.dtype(ml_dtypes.bfloat16)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
RANDOM = np.random.default_rng(0)


def bfloat16(*shape):
    return RANDOM.normal(size=shape).astype(BF16)


TENSORS = {
    "h.0.w": bfloat16(5, 7),
    "h.1.w": bfloat16(5, 7),
    "bias": np.array([1, 2, -3], np.float32),
    "wide": np.array([0.1, 1e-3]),
    "mask": np.array([[True, False, True]]),
    "ids": np.array([2**40, -1]),
    "scalar": np.array(0.5, BF16),
    "empty": np.empty((0, 3), np.float32),
}


def write(folder: Path, tensors=TENSORS, **config) -> Path:
    config = {"model_type": "mpt", "torch_dtype": "bfloat16", "d_model": 4} | config
    return write_checkpoint(folder, {"model.safetensors": tensors}, config)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "tiny")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refusal(kind, *arguments, **options) -> str:
    with pytest.raises(kind) as caught:
        mtj_loader.convert(*arguments, **options)
    assert type(caught.value) is kind
    return f"{caught.value}\n"


# Contents of the output files.


@pytest.mark.parametrize(
    ("dtype", "target"), [("float16", np.float16), ("bfloat16", BF16), ("float32", np.float32)]
)
def test_floats_are_rounded_and_other_dtypes_are_kept(source, dtype, target):
    report = mtj_loader.convert(source, dtype=dtype)
    out = source.with_name(f"tiny-{dtype}")
    assert report.out == str(out)
    found = load_file(out / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        floating = name not in ("mask", "ids")
        expected = array.astype(target) if floating else array
        assert found[name].dtype == expected.dtype, name
        assert found[name].shape == expected.shape
        assert found[name].tobytes() == expected.tobytes(), name


def test_report(source):
    report = mtj_loader.convert(source, dtype="float16")
    assert report.location == str(source)
    assert (report.dtype, report.files) == ("float16", ("model.safetensors",))
    assert report.bytes_read == sum(array.nbytes for array in TENSORS.values())
    assert report.bytes_written == 2 * (35 + 35 + 3 + 2 + 1) + 3 + 16
    by_name = {tensor.name: tensor for tensor in report.tensors}
    assert asdict(by_name["h.0.w"]) == {
        "name": "h.0.w", "source_dtype": "BF16", "dtype": "F16", "elements": 35,
        "overflow": 0, "underflow": 0, "nonfinite": 0,
    }  # fmt: skip
    assert (by_name["mask"].source_dtype, by_name["mask"].dtype) == ("BOOL", "BOOL")
    assert report.warnings == ()
    assert str(report).startswith("8 tensors to float16: 189 B read, 171 B written in ")
    assert "0 overflowed, 0 became zero, 0 are NaN or infinite" in str(report)


def test_header_is_like_that_of_the_reference_writer(source):
    mtj_loader.convert(source, dtype="float16")
    file = source.with_name("tiny-float16") / "model.safetensors"
    raw = file.read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    with safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    for record in open_checkpoint(Source(file)).index.records.values():  # strict
        assert record.offset_bytes % np.dtype(TENSORS[record.name].dtype).itemsize % 2 == 0
    offsets = {r.name: r.offset_bytes for r in open_checkpoint(Source(file)).index.records.values()}
    assert offsets["ids"] % 8 == 0
    assert offsets["mask"] == max(offsets.values())


@pytest.mark.parametrize("chunk_bytes", [8, 24, 1 << 20])
def test_chunk_size_does_not_change_the_result(tmp_path, monkeypatch, chunk_bytes):
    """The last chunk and part of a tensor may be shorter than the others; losses are summed."""
    source = write(tmp_path / "tiny", TENSORS | {"small": np.full(11, 1e-30, np.float32)})
    whole = mtj_loader.convert(source, source.with_name("whole"), dtype="float16")
    assert whole.losses.underflow == 11
    monkeypatch.setattr(convert_tensors, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(convert_tensors, "_CHUNKS_PER_PART", 2)
    parts = mtj_loader.convert(source, source.with_name("parts"), dtype="float16")
    assert snapshot(Path(whole.out)) == snapshot(Path(parts.out))
    assert whole.tensors == parts.tensors


def test_every_bfloat16(tmp_path):
    """The known counts for bfloat16 → float16, through files."""
    every = np.arange(65536, dtype=np.uint16).view(BF16)
    source = write(tmp_path / "every", {"w": every})
    options = {"dtype": "float16", "on_overflow": "clamp", "allow_nonfinite": True}
    report = mtj_loader.convert(source, **options)
    assert report.to_dict()["overflow"] == 28_672
    assert report.to_dict()["underflow"] == 26_112
    assert report.to_dict()["nonfinite"] == 256
    found = load_file(Path(report.out) / "model.safetensors")["w"]
    assert np.isinf(found).sum() == 2
    assert (np.abs(found.astype(np.float64)) == 65504).sum() == 28_672


def test_shards(source):
    sizes = {"h.0.w": 70, "h.1.w": 70, "bias": 6, "wide": 4, "mask": 3, "ids": 16, "scalar": 2}
    report = mtj_loader.convert(source, dtype="float16", max_shard_size=80)
    out = Path(report.out)
    assert report.files == tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert index["weight_map"].keys() == TENSORS.keys()
    for file in report.files:
        names = load_file(out / file).keys()
        assert set(names) == {n for n, at in index["weight_map"].items() if at == file}
        assert sum(sizes.get(name, 0) for name in names) <= 80
    opened = open_checkpoint(Source(out))
    assert opened.index.warnings == ()
    assert opened.index.records.keys() == TENSORS.keys()


def test_a_tensor_larger_than_a_shard_gets_its_own_file(source):
    report = mtj_loader.convert(source, dtype="float16", max_shard_size="60")
    names_by_file = [load_file(Path(report.out) / file).keys() for file in report.files]
    assert [set(names) for names in names_by_file][:2] == [{"h.0.w"}, {"h.1.w"}]


def test_shards_of_the_source_are_merged(tmp_path):
    shards = {ONE: {"a": bfloat16(3)}, TWO: {"b": bfloat16(4)}}
    source = write_checkpoint(tmp_path / "two", shards, {"model_type": "mpt"})
    report = mtj_loader.convert(source, dtype="float32")
    assert report.files == ("model.safetensors",)
    assert report.left_out == ()
    found = load_file(Path(report.out) / "model.safetensors")
    assert found["b"].tobytes() == shards[TWO]["b"].astype(np.float32).tobytes()
    assert not (Path(report.out) / INDEX).exists()


def test_names_that_json_escapes(tmp_path):
    name = 'h."ä".w'
    source = write(tmp_path / "s", {name: bfloat16(2)})
    report = mtj_loader.convert(source, dtype="float16")
    assert list(load_file(Path(report.out) / "model.safetensors")) == [name]


def test_a_converted_model_loads(tmp_path):
    source = neox.write(tmp_path / "neox", neox.tensors(BF16))
    report = mtj_loader.convert(source, dtype="float16")
    before = mtj_loader.load(source, "mp=2", dtype="float32", progress=False)
    after = mtj_loader.load(report.out, "mp=2", dtype="float32", progress=False)
    for module, params in before.params.items():
        for param, array in params.items():
            np.testing.assert_array_equal(array, after.params[module][param])


# Files other than weights.


@pytest.mark.parametrize(
    "dtype_keys", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": None},
                {"dtype": "bfloat16", "torch_dtype": "bfloat16"}],
)  # fmt: skip
def test_config_keeps_its_dtype_keys(tmp_path, dtype_keys):
    config = {"eps": 1e-05, **dtype_keys, "name": "ä", "last": {"b": 1, "a": None}}
    source = write_checkpoint(tmp_path / "s", {"model.safetensors": {"a": bfloat16(2)}}, config)
    report = mtj_loader.convert(source, dtype="float16")
    text = (Path(report.out) / "config.json").read_text()
    found = json.loads(text)
    assert found == config | dict.fromkeys(dtype_keys, "float16")
    assert list(found) == list(config)
    assert '"eps": 1e-05' in text


def test_config_without_a_dtype_gets_one(tmp_path):
    config = {"model_type": "mpt"}
    source = write_checkpoint(tmp_path / "s", {"model.safetensors": {"a": bfloat16(2)}}, config)
    out = Path(mtj_loader.convert(source, dtype="float32").out)
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "float32"}


def test_small_files_are_copied_and_other_weights_are_not(source, monkeypatch):
    monkeypatch.setattr("mtj_loader.conversion.convert_plan._MAX_COPIED_BYTES", 1000)
    copied = ["README.md", "empty.txt", "modeling_mpt.py", "tokenizer.json", "tokenizer.model"]
    left = ["consolidated.safetensors", "huge.txt", "model.gguf", "pytorch_model.bin",
            "pytorch_model.bin.index.json", "training_args.bin"]  # fmt: skip
    for name in copied + left:
        (source / name).write_bytes(b"" if name == "empty.txt" else os.urandom(900))
    (source / "huge.txt").write_bytes(bytes(1001))
    (source / "onnx").mkdir()
    report = mtj_loader.convert(source, dtype="float16")
    assert report.copied == tuple(copied)
    assert report.left_out == tuple(sorted([*left, "onnx/"]))
    found = snapshot(Path(report.out))
    assert found.keys() == {*copied, "config.json", "model.safetensors"}
    for name in copied:
        assert found[name] == (source / name).read_bytes()


def test_files_are_copied_in_chunks(source, monkeypatch):
    monkeypatch.setattr("mtj_loader.conversion.convert_checkpoint._COPY_CHUNK_BYTES", 7)
    (source / "vocab.txt").write_bytes(bytes(range(100)))
    out = Path(mtj_loader.convert(source, dtype="float16").out)
    assert (out / "vocab.txt").read_bytes() == bytes(range(100))


def test_single_file_as_source(source):
    report = mtj_loader.convert(source / "model.safetensors", dtype="float16")
    assert report.out == str(source / "model-float16")
    assert load_file(Path(report.out) / "model.safetensors").keys() == TENSORS.keys()


@pytest.mark.parametrize("dtype_keys", [".", "../tiny", "../tiny/", "sub/.."])
def test_default_target_for_different_spellings_of_a_path(source, monkeypatch, dtype_keys):
    (source / "sub").mkdir()
    monkeypatch.chdir(source)
    assert mtj_loader.convert(dtype_keys, dtype="float16").out == str(source) + "-float16"


def test_modes_follow_the_umask(source):
    out = Path(mtj_loader.convert(source, dtype="float16").out)
    fresh = source.with_name("fresh")
    fresh.mkdir()
    (fresh / "file").touch()
    assert out.stat().st_mode == fresh.stat().st_mode
    assert {path.stat().st_mode for path in out.iterdir()} == {(fresh / "file").stat().st_mode}


# A Hugging Face id.


@pytest.fixture
def hub(source, tmp_path, monkeypatch):
    (source / "tokenizer.model").write_bytes(b"model")
    (source / "chat_template.jinja").write_bytes(b"{{ x }}")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    files = snapshot(source) | {"onnx/model.onnx": b"x"}
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with serve({"owner/tiny": files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield server


def test_hugging_face_id(hub, tmp_path):
    report = mtj_loader.convert("owner/tiny", dtype="float16", cache_dir=tmp_path / "cache")
    assert report.out == str(tmp_path / "work/tiny-float16")
    assert report.location == f"owner/tiny@{hub.commit('owner/tiny')}"
    assert report.copied == ("chat_template.jinja", "tokenizer.model")
    assert report.left_out == ("onnx/", "pytorch_model.bin")
    assert (Path(report.out) / "tokenizer.model").read_bytes() == b"model"
    assert "pytorch_model.bin" not in hub.fetched


def test_hugging_face_id_from_the_cache(hub, tmp_path):
    cache = tmp_path / "cache"
    first = mtj_loader.convert("owner/tiny", dtype="float16", cache_dir=cache)
    hub.fetched.clear()
    options = {"dtype": "float16", "cache_dir": cache, "overwrite": True}
    second = mtj_loader.convert("owner/tiny", local_files_only=True, **options)
    assert hub.fetched == []
    assert second.copied == first.copied
    hub.failures["owner/tiny"] = (503, "")
    third = mtj_loader.convert("owner/tiny", **options)
    assert third.copied == first.copied
    assert "the hub cannot be reached" in third.warnings[0]


def test_unknown_id(hub):
    assert "no such Hugging Face repository" in refusal(UsageError, "no/thing", dtype="float16")


# Errors.


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_overflow_is_rejected(tmp_path):
    tensors = {f"h.{i}.w": np.array([1.0, 7e4, *[-1e30] * i], BF16) for i in range(3)}
    source = write(tmp_path / "s", tensors)
    message = refusal(NonFiniteError, source, dtype="float16")
    assert message.startswith("finite weights are too large for float16\n")
    assert "file: model.safetensors\n  tensor: h.2.w\n" in message
    assert "found: 3 in this tensor, 6 in 3 tensors\n" in message
    assert "clamp" in message
    assert leftovers(tmp_path) == ["s"]
    report = mtj_loader.convert(source, dtype="float16", on_overflow="clamp")
    assert [tensor.overflow for tensor in report.tensors] == [1, 2, 3]
    found = load_file(Path(report.out) / "model.safetensors")["h.2.w"]
    assert found.tolist() == [1, 65504, -65504, -65504]


def test_overflow_of_bfloat16(tmp_path):
    source = write(tmp_path / "s", {"w": np.array([3.4e38], np.float32)})
    assert "too large for bfloat16" in refusal(NonFiniteError, source, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_is_rejected(tmp_path, dtype, value):
    """Even if the dtype does not change."""
    source = write(tmp_path / "s", {"w": np.array([1, value], BF16)})
    message = refusal(NonFiniteError, source, dtype=dtype, on_overflow="clamp")
    assert message.startswith("weights are NaN or infinite\n")
    assert "file: model.safetensors\n  tensor: w\n" in message
    assert "found: 1 in this tensor, 1 in 1 tensor\n" in message
    assert leftovers(tmp_path) == ["s"]
    report = mtj_loader.convert(source, dtype=dtype, allow_nonfinite=True)
    found = load_file(Path(report.out) / "model.safetensors")["w"].astype(np.float32)
    np.testing.assert_array_equal(found, np.array([1, value], np.float32))
    assert report.tensors[0].nonfinite == 1


def test_dtype_that_cannot_be_converted(tmp_path):
    source = write(tmp_path / "s")
    entry = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}
    (source / "model.safetensors").write_bytes(safetensors_bytes({"w": entry}, bytes(2)))
    message = refusal(CheckpointError, source, dtype="float16")
    assert "this dtype cannot be converted" in message
    assert "tensor: w\n" in message
    assert "found: F8_E4M3\n" in message
    assert leftovers(tmp_path) == ["s"]


def test_bad_bool(tmp_path, monkeypatch):
    source = write(tmp_path / "s")
    entry = {"dtype": "BOOL", "shape": [9], "data_offsets": [0, 9]}
    data = bytes([0, 1, 0, 1, 0, 1, 0, 2, 0])
    (source / "model.safetensors").write_bytes(safetensors_bytes({"m": entry}, data))
    monkeypatch.setattr(convert_tensors, "CHUNK_BYTES", 4)
    assert "found: 2 at element 7\n" in refusal(FormatError, source, dtype="float16")
    assert leftovers(tmp_path) == ["s"]


def test_source_file_that_changes_during_the_conversion(source, monkeypatch):
    def touching(*arguments, **options):
        os.utime(source / "model.safetensors", ns=(1, 1))
        return original(*arguments, **options)

    original = convert_tensors.convert_tensors
    monkeypatch.setattr("mtj_loader.conversion.convert_checkpoint.convert_tensors", touching)
    assert "changed after its header was read" in refusal(CheckpointError, source, dtype="float16")
    assert leftovers(source.parent) == ["tiny"]


def test_unknown_options(source):
    assert "expected: float16, bfloat16, float32" in refusal(UsageError, source, dtype="auto")
    message = refusal(UsageError, source, dtype="float16", on_overflow="wrap")
    assert "key: on_overflow" in message
    message = refusal(UsageError, source, dtype="float16", max_shard_size="many")
    assert "cannot read a size" in message
    assert "no such file or folder" in refusal(UsageError, "/no/such/folder", dtype="float16")


@pytest.mark.parametrize("path", ["~no-such-user-here/model", "a\0b"], ids=["user", "nul"])
def test_invalid_path(source, path):
    for arguments in ((path,), (source, path)):
        message = refusal(UsageError, *arguments, dtype="float16")
        assert message.startswith(("cannot use this path", "no such file"))


# The target.


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


# The plan.


def test_shards_of_many_tensors_are_filled():
    def record(i):
        return TensorRecord(f"h.{i}.w", "a", 0, "F32", (256,))

    files = plan_files([record(i) for i in range(1000)], "F16", 10_000)
    assert len(files) == 1000 // (10_000 // 512) + 1
    assert files[-1].name == "model-00053-of-00053.safetensors"
    for file in files[:-1]:
        assert 10_000 - 512 < file.data_bytes <= 10_000
        assert len(file.header) % 8 == 0
        ends = [t.target.offset_bytes + t.target.size_bytes for t in file.tensors]
        assert [t.target.offset_bytes for t in file.tensors] == [len(file.header), *ends[:-1]]
        assert ends[-1] == file.size_bytes


# The command line.


def test_command(tmp_path):
    tensors = {f"h.{i}.w": np.array([1, 1e-30, 7e4], BF16) for i in range(2)}
    source = write(tmp_path / "s", tensors | {"h.0.b": bfloat16(2)})
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("x")
    result = run("convert", source, "--dtype", "float16", "--on-overflow", "clamp")
    assert result.exit_code == 0
    assert result.stderr == ""
    first, second, *rest = result.stdout.splitlines()
    assert first.startswith("3 tensors to float16: 16 B read, 16 B written in ")
    assert first.endswith(f"1 file in {tmp_path}/s-float16")
    assert second == "2 overflowed, 2 became zero, 0 are NaN or infinite"
    assert rest[:2] == ["copied: tokenizer.json", "left out: pytorch_model.bin"]
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in rest[2:]]
    assert rows[0] == ["tensor", "dtype", "overflowed", "became zero", "NaN or infinite"]
    assert rows[2] == ["h.{0...1}.w", "BF16 → F16", "2", "2", "0"]
    assert len(rows) == 3  # no row for tensors without losses


def test_command_warns(tmp_path):
    source = write_checkpoint(
        tmp_path / "s", {ONE: {"a": bfloat16(2)}, TWO: {"b": bfloat16(2)}}, {"model_type": "mpt"}
    )
    shutil.copy(source / ONE, source / "other.safetensors")
    result = run("convert", source, "--dtype", "float16", "--out", tmp_path / "out")
    assert result.stderr.startswith("warning: not in model.safetensors.index.json")
    assert "left out: other.safetensors\n" in result.stdout


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "the output exists already", ["--dtype", "float16", "--out", "{source}"]),
        (2, "Missing option '--dtype'", []),
        (2, "Invalid value for '--dtype'", ["--dtype", "float64"]),
        (3, "finite weights are too large for float16", ["--dtype", "float16"]),
    ],
)
def test_command_fails(tmp_path, code, message, arguments):
    source = write(tmp_path / "s", {"w": np.array([1e5], np.float32)})
    result = run("convert", source, *[argument.format(source=source) for argument in arguments])
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_help_has_an_example():
    result = run("convert", "--help")
    assert result.exit_code == 0
    assert "Example: mtj-loader convert mosaicml/mpt-7b-instruct --dtype float16" in result.stdout


def test_command_does_not_import_jax(source):
    script = (
        "import sys; from mtj_loader.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False); sys.exit('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "convert", str(source), "--dtype", "float16"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def leaves(value, path=""):
    """The keys of a JSON document, in the notation of docs/json.md."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for item in value or [None]:
            yield from leaves(item, f"{path}[]")
    else:
        yield path


def test_json_has_the_documented_keys(source):
    (source / "tokenizer.json").write_text("{}")
    result = run("convert", source, "--dtype", "float16", "--json")
    assert result.exit_code == 0
    pages = (ROOT / "docs/json.md").read_text().split("\n## ")
    [page] = [page for page in pages if page.startswith("convert\n")]
    cells = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    documented = {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}
    document = json.loads(result.stdout)
    assert set(leaves(document)) == documented
    assert document["underflow"] == sum(tensor["underflow"] for tensor in document["tensors"])
