"""The safetensors header: a violation of each rule."""

from __future__ import annotations

import json
import os
import struct
import time

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mtj_loader.dtypes import BITS
from mtj_loader.errors import CheckpointError, FormatError
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.safetensors import check_bool_bytes, parse_header, read_records
from mtj_loader.storage.base import FileVersion, check_unchanged
from mtj_loader.storage.local import LocalStorage
from tests.support.checkpoints import safetensors_bytes, write_safetensors

FILE = "model.safetensors"
U64_MAX = 2**64 - 1


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **extra):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


def tensor_file(data_bytes=8, name="w", **fields):
    """A file of one tensor with these fields."""
    return safetensors_bytes({name: entry(**fields)}, bytes(data_bytes))


def text_file(text, data_bytes=8):
    return safetensors_bytes(text, bytes(data_bytes))


def records_of(folder, raw):
    (folder / FILE).write_bytes(raw)
    with LocalStorage(folder) as storage:
        return read_records(storage, storage.version(FILE))


W = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
TWO = {"v": entry(offsets=(0, 8)), "w": entry(offsets=(8, 16))}

# number and name → the file, and parts of the message
REFUSED = {
    "A01-empty-file": (b"", "not a safetensors file", "found: an empty file"),
    "A01-under-8-bytes": (b"1234567", "not a safetensors file", "found: 7 bytes"),
    "A02-length-over-the-limit": (
        struct.pack("<Q", 100_000_001) + b"{}", "length is impossible", "found: 100,000,001 bytes"),
    "A03-length-over-the-file": (
        struct.pack("<Q", 3) + b"{}", "length is impossible", "2 to 2 bytes", "found: 3 bytes"),
    "A03-length-u64-max": (
        struct.pack("<Q", U64_MAX) + b"{}", "length is impossible", f"found: {U64_MAX:,} bytes"),
    "A04-length-0": (struct.pack("<Q", 0) + b"{}", "length is impossible", "found: 0 bytes"),
    "A04-list": (text_file("[]"), "not a JSON object", "expected: {", "found: b'[]'"),
    "A04-string": (text_file('"abc"'), "not a JSON object"),
    "A05-bad-json": (text_file("{" + W + ",}"), "not valid JSON", "character"),
    "A05-byte-order-mark": (
        text_file("\ufeff{" + W + "}"), "not a JSON object", r"found: b'\xef\xbb\xbf{"),
    "A05-nul-padding": (text_file("{" + W + "}\0\0\0"), "not valid JSON", "Extra data"),
    "A05-second-document": (text_file("{" + W + "}{}"), "not valid JSON", "Extra data"),
    "A05-not-utf8": (text_file(b'{"\xff":1}'), "not UTF-8", "at byte 2"),
    "A06-first-byte-is-a-space": (text_file(" {" + W + "}"), "not a JSON object", "found: b' {"),
    "A07-duplicate-tensor-key": (
        text_file("{" + W + "," + W + "}"), "duplicate key", "key: w\n", "found: 2 times"),
    "A07-duplicate-escaped": (
        text_file("{" + W + r',"\u0077":' + W[4:] + "}"), "duplicate key", "key: w\n"),
    "A08-duplicate-metadata-key": (
        text_file('{"__metadata__":{"format":"pt","format":"np"},' + W + "}"),
        "duplicate key", "key: __metadata__.format\n"),
    "A09-duplicate-metadata": (
        text_file('{"__metadata__":{},"__metadata__":{},' + W + "}"),
        "duplicate key", "key: __metadata__\n"),
    "A09-duplicate-dtype": (
        text_file('{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
        "duplicate key", "key: w.dtype\n"),
    "A10-metadata-value-a-number": (
        text_file('{"__metadata__":{"format":1},' + W + "}"),
        "bad field", "key: __metadata__.format\n", "expected: a string", "found: 1"),
    "A10-metadata-key-with-an-escape-sequence": (
        text_file('{"__metadata__":{"\\u001b[2J":1},' + W + "}"), r"key: __metadata__.\x1b[2J"),
    "A10-metadata-value-null": (
        text_file('{"__metadata__":{"format":null},' + W + "}"),
        "key: __metadata__.format\n", "found: None"),
    "A10-metadata-null": (
        text_file('{"__metadata__":null,' + W + "}"),
        "key: __metadata__\n", "expected: an object", "found: None"),
    "A10-metadata-list": (text_file('{"__metadata__":[],' + W + "}"), "expected: an object"),
    "A11-unknown-dtype": (
        tensor_file(dtype="F31"), "tensor: w", "key: dtype", "F32, ", "found: 'F31'"),
    "A11-lower-case-dtype": (tensor_file(dtype="f32"), "key: dtype", "found: 'f32'"),
    "A11-numpy-dtype": (tensor_file(dtype="float32"), "key: dtype", "found: 'float32'"),
    "A11-dtype-not-a-string": (tensor_file(dtype=["F32"]), "key: dtype", "found: ['F32']"),
    "A13-missing-dtype": (
        text_file('{"w":{"shape":[2],"data_offsets":[0,8]}}'),
        "bad tensor entry", "tensor: w",
        "expected: exactly dtype, shape and data_offsets", "'shape'"),
    "A13-missing-shape": (text_file('{"w":{"dtype":"F32","data_offsets":[0,8]}}'), "tensor: w"),
    "A13-missing-offsets": (text_file('{"w":{"dtype":"F32","shape":[2]}}'), "tensor: w"),
    "A13-extra-field": (tensor_file(strides=[1]), "bad tensor entry", "tensor: w", "'strides'"),
    "A13-entry-is-a-list": (text_file('{"w":["F32",[2],[0,8]]}'), "bad tensor entry", "tensor: w"),
    "A13-entry-is-null": (text_file('{"w":null}'), "bad tensor entry", "found: None"),
    "A14-negative": (tensor_file(shape=[-2]), "tensor: w", "key: shape", "found: [-2]"),
    "A14-two-negatives": (tensor_file(shape=[-1, -2]), "key: shape", "found: [-1, -2]"),
    "A14-float": (tensor_file(shape=[2.0]), "key: shape", "found: [2.0]"),
    "A14-4e0": (
        text_file('{"w":{"dtype":"F32","shape":[4e0],"data_offsets":[0,16]}}', 16),
        "key: shape", "found: [4.0]"),
    "A14-minus-0": (
        text_file('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0),
        "key: shape", "found: [-0.0]"),
    "A14-over-u64": (tensor_file(shape=[2**64, 0]), "key: shape", "from 0 to 2^64 − 1"),
    "A14-true": (tensor_file(shape=[True, 2]), "key: shape", "found: [True, 2]"),
    "A14-string": (tensor_file(shape=["2"]), "key: shape", "found: ['2']"),
    "A14-shape-a-number": (
        text_file('{"w":{"dtype":"F32","shape":2,"data_offsets":[0,8]}}'),
        "key: shape", "a list", "found: 2"),
    "A14-offset-a-float": (tensor_file(offsets=[0, 8.0]), "key: data_offsets", "[0, 8.0]"),
    "A15-one-offset": (tensor_file(offsets=[8]), "tensor: w", "key: data_offsets", "found: [8]"),
    "A15-three-offsets": (tensor_file(offsets=[0, 4, 8]), "key: data_offsets", "[0, 4, 8]"),
    "A15-reversed": (
        tensor_file(offsets=[8, 0]), "key: data_offsets", "begin ≤ end", "found: [8, 0]"),
    "A16-hole-at-the-start": (
        tensor_file(12, offsets=[4, 12]), "belong to no tensor", "tensor: w", "at 0", "found: 4"),
    "A16-hole-between": (
        safetensors_bytes(TWO | {"w": entry(offsets=(12, 20))}, bytes(20)),
        "belong to no tensor", "tensor: w", "at 8", "found: 12"),
    "A17-overlap": (
        safetensors_bytes(TWO | {"w": entry(offsets=(4, 12))}, bytes(12)),
        "two tensors overlap", "tensor: w", "at 8", "found: 4"),
    "A17-same-place": (
        safetensors_bytes(TWO | {"w": entry(offsets=(0, 8))}, bytes(8)), "two tensors overlap"),
    "A17-empty-tensor-inside-another": (
        safetensors_bytes({"v": entry(), "w": entry(shape=[0], offsets=[4, 4])}, bytes(8)),
        "two tensors overlap", "tensor: w"),
    "A18-trailing-byte": (
        tensor_file(9), "bytes after the last tensor", "tensor: w", "expected: 77 ", "found: 78 "),
    "A18-data-without-tensors": (text_file("{}", 1), "bytes after the last tensor"),
    "A19-truncated": (
        tensor_file(7), "the file is truncated", "tensor: w", "expected: 77 ", "found: 76 "),
    "A19-no-data": (tensor_file(0), "the file is truncated", "tensor: w"),
    "A20-shape-too-large": (
        tensor_file(shape=[3]),
        "disagree", "tensor: w", "12 bytes for shape [3]", "found: 8 bytes"),
    "A20-shape-too-small": (tensor_file(shape=[]), "disagree", "4 bytes for shape []"),
    "A20-zero-in-shape": (tensor_file(shape=[0]), "disagree", "expected: 0 bytes", "found: 8 "),
    "A21-product-overflow": (
        tensor_file(shape=[2**32, 2**32]), "tensor: w", "key: shape", "fewer than 2^63 bits"),
    "A21-product-wraps-to-2": (tensor_file(shape=[2**63 + 1, 2]), "fewer than 2^63 bits"),
    "A21-bytes-overflow": (tensor_file(shape=[2**61]), "fewer than 2^63 bits"),
    "A21-a-million-dimensions": (
        tensor_file(shape=[U64_MAX] * 1_000_000), "tensor: w", "at most 64 dimensions"),
    "A22-u64-max-beside-0": (
        tensor_file(0, shape=[0, U64_MAX], offsets=[0, 0]),
        "tensor: w", "key: shape", "fewer than 2^63 bits", str(U64_MAX)),
    "A22-product-beside-0": (
        tensor_file(0, shape=[2**40, 0, 2**40], offsets=[0, 0]), "fewer than 2^63 bits"),
    "A23-half-a-byte": (
        tensor_file(2, dtype="F4", shape=[3], offsets=[0, 2]),
        "bad tensor size", "tensor: w", "whole bytes", "12 bits for shape [3] in F4"),
    "A23-three-quarters-of-a-byte": (
        tensor_file(1, dtype="F6_E2M3", shape=[1], offsets=[0, 1]), "6 bits for shape [1]"),
    "A26-empty-name": (tensor_file(name=""), "bad tensor name", "tensor: ''"),
    "A26-nul-in-name": (tensor_file(name="a\0b"), "bad tensor name", r"tensor: 'a\x00b'"),
    "A26-escape-sequence-in-name": (tensor_file(name="\x1b[2J"), "bad tensor name", r"'\x1b[2J'"),
    "A26-parent-folder": (tensor_file(name="../w"), "bad tensor name", "tensor: '../w'"),
    "A26-parent-inside": (tensor_file(name="a/../w"), "bad tensor name"),
    "A26-parent-backslash": (tensor_file(name="..\\w"), "bad tensor name"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "words"), [(c[0], c[1:]) for c in REFUSED.values()], ids=REFUSED)
def test_rejected(tmp_path, raw, words):
    with pytest.raises(FormatError) as caught:
        records_of(tmp_path, raw)
    for word in (f"file: {FILE}", *words):
        assert word in f"{caught.value}\n"


@pytest.mark.parametrize(
    ("start", "meaning"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x03\x04\x00\x00\x08\x08rest of it", "a zip archive, as written by torch.save"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00w", "a Python pickle"),
    ],
)
def test_other_formats_are_named(tmp_path, start, meaning):
    with pytest.raises(FormatError, match="not a safetensors file") as caught:
        records_of(tmp_path, start)
    assert meaning in str(caught.value)


@pytest.mark.parametrize("length", [0x0280, 0x04034B50], ids=["as-a-pickle", "as-a-zip"])
def test_length_that_looks_like_another_format(tmp_path, length):
    """A valid length may look like another format, which is checked only on failure."""
    (tmp_path / FILE).write_bytes(safetensors_bytes(b"{}".ljust(0x0280)))
    assert records_of(tmp_path, safetensors_bytes(b"{}".ljust(0x0280))) == []
    if length > 0x0280:
        (tmp_path / FILE).write_bytes(struct.pack("<Q", length) + b"[")
        with (tmp_path / FILE).open("r+b") as file:
            file.truncate(8 + length)
        with LocalStorage(tmp_path) as storage, pytest.raises(FormatError, match="JSON object"):
            read_records(storage, storage.version(FILE))


class WatchedStorage(LocalStorage):
    """Records how much was read."""

    lengths: tuple[int, ...] = ()

    def read_into(self, path, offset_bytes, buffer):
        self.lengths = (*self.lengths, len(buffer))
        super().read_into(path, offset_bytes, buffer)


def test_a02_a_claimed_length_allocates_nothing(tmp_path):
    with (tmp_path / FILE).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)  # sparse: long enough for the header it claims
    with WatchedStorage(tmp_path) as storage, pytest.raises(FormatError) as caught:
        read_records(storage, storage.version(FILE))
    assert "expected: 2 to 100,000,000 bytes" in str(caught.value)
    assert max(storage.lengths) < 100


def test_only_the_header_of_a_40_gb_file_is_read(tmp_path):
    shape = [20_000, 1_000_000]
    raw = safetensors_bytes({"w": entry("BF16", shape, (0, 40_000_000_000))})
    (tmp_path / FILE).write_bytes(raw)
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(len(raw) + 40_000_000_000)
    with WatchedStorage(tmp_path) as storage:
        (record,) = read_records(storage, storage.version(FILE))
    assert record == TensorRecord("w", FILE, len(raw), "BF16", (20_000, 1_000_000))
    assert record.size_bytes == 40_000_000_000
    assert sum(storage.lengths) < len(raw) + 100


def test_a_hundred_thousand_tensors():
    names = (f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.w1.weight" for i in range(100_000))
    header = {n: entry("BF16", (1, 2), (4 * i, 4 * i + 4)) for i, n in enumerate(names)}
    raw = json.dumps(header).encode()
    start = time.process_time()
    records = parse_header(raw, file=FILE, size_bytes=8 + len(raw) + 400_000)
    assert time.process_time() - start < 10  # about one on an idle machine; this is not a benchmark
    assert len(records) == 100_000
    assert records[-1].offset_bytes == 8 + len(raw) + 399_996


def test_records_come_in_the_order_of_their_offsets(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "c": entry("F16", (3,), (8, 14)),
        "b": entry("F32", (0, 7), (8, 8)),
        "a": entry("F32", (1, 2), (0, 8)),
        "scalar": entry("U8", (), (14, 15)),
    }
    raw = safetensors_bytes(json.dumps(header) + "   ", bytes(15))
    start = len(raw) - 15
    assert records_of(tmp_path, raw) == [
        TensorRecord("a", FILE, start, "F32", (1, 2)),
        TensorRecord("b", FILE, start + 8, "F32", (0, 7)),
        TensorRecord("c", FILE, start + 8, "F16", (3,)),
        TensorRecord("scalar", FILE, start + 14, "U8", ()),
    ]


@pytest.mark.parametrize("dtype", BITS, ids=lambda dtype: f"A12-{dtype}")
def test_every_dtype_of_the_format_can_be_listed(tmp_path, dtype):
    size_bytes = 8 * BITS[dtype] // 8
    raw = tensor_file(size_bytes, dtype=dtype, shape=[8], offsets=[0, size_bytes])
    (record,) = records_of(tmp_path, raw)
    assert (record.dtype, record.shape, record.size_bytes) == (dtype, (8,), size_bytes)
    (reference,) = safetensors.deserialize(raw)
    assert reference[1]["dtype"] == dtype


@pytest.mark.parametrize("padding", range(1, 9), ids=lambda padding: f"A24-{padding}-spaces")
def test_unaligned_tensors_are_valid(tmp_path, padding):
    header = {"byte": entry("U8", (1,), (0, 1)), "w": entry("F32", (2,), (1, 9))}
    text = json.dumps(header) + " " * padding
    data = b"\x07" + np.array([1.5, -2.0], np.float32).tobytes()
    (tmp_path / FILE).write_bytes(safetensors_bytes(text, data))
    with LocalStorage(tmp_path) as storage:
        _, record = read_records(storage, storage.version(FILE))
        values = storage.read(record.file, record.offset_bytes, record.size_bytes)
        assert np.frombuffer(values, np.float32).tolist() == [1.5, -2.0]


def test_a25_bool_bytes():
    record = TensorRecord("mask", FILE, 8, "BOOL", (6,))
    with pytest.raises(FormatError, match="neither 0 nor 1") as caught:
        check_bool_bytes(record, np.array([0, 1, 2, 255], np.uint8), first=2)
    for word in (f"file: {FILE}", "tensor: mask", "expected: 0 or 1", "found: 2 at element 4"):
        assert word in str(caught.value)
    check_bool_bytes(record, np.array([0, 1, 0], np.uint8))


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace(path):
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(0, path.stat().st_mtime_ns - 1))
    other.rename(path)


@pytest.mark.parametrize("change", [grow, touch, replace], ids=lambda f: f"A27-{f.__name__}")
def test_changed_file(tmp_path, change):
    path = write_safetensors(tmp_path / FILE, {"w": np.ones(2, np.float32)})
    with LocalStorage(tmp_path) as storage:
        version = storage.version(FILE)
        read_records(storage, version)
        check_unchanged(storage, version)
        change(path)
        with pytest.raises(CheckpointError, match="changed after its header was read") as caught:
            check_unchanged(storage, version)
    assert f"file: {FILE}" in str(caught.value)
    assert "expected: 77 bytes, version" in str(caught.value)


def test_a27_vanished_file(tmp_path):
    path = write_safetensors(tmp_path / FILE, {"w": np.ones(2, np.float32)})
    with LocalStorage(tmp_path) as storage:
        version = storage.version(FILE)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"the file is missing\n  file: {FILE}"):
            check_unchanged(storage, version)


def test_file_that_shrinks_before_its_header_is_read(tmp_path):
    (tmp_path / FILE).write_bytes(struct.pack("<Q", 50) + b"{")
    with LocalStorage(tmp_path) as storage, pytest.raises(CheckpointError) as caught:
        read_records(storage, FileVersion(FILE, 100, "0"))
    assert "the file ends in the middle of a read" in str(caught.value)


SMALL = safetensors.numpy.save(
    {"w": np.arange(3, dtype=np.float32), "b": np.ones((2, 1), np.int64)}, {"format": "np"}
)


def test_every_truncation_is_rejected(tmp_path):
    for length in range(len(SMALL)):
        with pytest.raises(FormatError, match=f"file: {FILE}"):
            records_of(tmp_path, SMALL[:length])
    assert len(records_of(tmp_path, SMALL)) == 2
