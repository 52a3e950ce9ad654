"""Converting checkpoints: the contents of the output, invalid arguments, and failed runs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import mtj_loader
from mtj_loader.conversion import convert_tensors
from mtj_loader.conversion.convert_plan import plan_files
from mtj_loader.errors import CheckpointError, FormatError, NonFiniteError, UsageError
from mtj_loader.formats.checkpoint import open_checkpoint
from mtj_loader.formats.records import TensorRecord
from mtj_loader.options import Source
from tests.support import neox
from tests.support.checkpoints import safetensors_bytes, write_checkpoint
from tests.support.conversions import (
    BF16,
    INDEX,
    ONE,
    TENSORS,
    TWO,
    bfloat16,
    leftovers,
    refusal,
    snapshot,
    write,
)
from tests.support.hub import serve

ROOT = Path(__file__).parents[2]


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
