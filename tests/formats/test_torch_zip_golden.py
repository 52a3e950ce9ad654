"""Files that torch saved (tests/oracle/make_torch_files.py), whole and damaged."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtj_loader.dtypes import WEIGHT_DTYPES
from mtj_loader.errors import FormatError
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.torch_zip import read_records
from mtj_loader.storage.local import LocalStorage
from tests.formats.test_torch_zip import DATA, records_of


def expected_tensors():
    """A file saved by tests/oracle/make_torch_files.py."""
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    return {
        "float32": base,
        "transposed": base.T,
        "part": base[1:, 1:3],
        "every_second": np.arange(10)[1::2],
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 3), np.float32),
        "bfloat16": np.array([1.0, -2.5, 3.140625], WEIGHT_DTYPES["BF16"]),
        "float16": np.array([[1.0], [65504.0]], np.float16),
        "float64": np.array([0.1]),
        "int64": np.array([2**40, -1]),
        "int32": np.array([-7], np.int32),
        "int16": np.array([-300], np.int16),
        "int8": np.array([-8, 9], np.int8),
        "uint8": np.array([200], np.uint8),
        "bool": np.array([True, False]),
        "parameter": np.array([0.5], np.float32),
    }


def read_array(raw: bytes, record: TensorRecord, dtype: np.dtype) -> np.ndarray:
    """The elements of a record, with numpy only."""
    flat = np.frombuffer(raw[record.offset_bytes :][: len(raw) // 2], np.uint8)
    flat = flat[: flat.size // dtype.itemsize * dtype.itemsize].view(dtype)
    strides = record.strides and [stride * dtype.itemsize for stride in record.strides]
    if strides is None:
        return flat[: int(np.prod(record.shape))].reshape(record.shape)
    return np.lib.stride_tricks.as_strided(flat, record.shape, strides)


def golden_records(file):
    with LocalStorage(DATA) as files:
        return read_records(files, files.version(file))


def test_a_file_by_torch():
    raw, expected = (DATA / "tensors.bin").read_bytes(), expected_tensors()
    records = golden_records("tensors.bin")
    assert {record.name for record in records} == expected.keys()
    for record in records:
        array = expected[record.name]
        found = read_array(raw, record, array.dtype)
        assert found.shape == array.shape
        assert found.tobytes() == array.tobytes(), record.name
    offsets = [record.offset_bytes for record in records]
    assert offsets == sorted(offsets)


def test_dtypes_and_shared_storages_by_torch():
    records = {record.name: record for record in golden_records("tensors.bin")}
    spelled = {name: records[name].dtype for name in expected_tensors()}
    assert spelled == {
        "float32": "F32", "transposed": "F32", "part": "F32", "every_second": "I64",
        "scalar": "F32", "empty": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64",
        "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
        "bool": "BOOL", "parameter": "F32",
    }  # fmt: skip
    assert records["transposed"].strides == (1, 4)
    assert records["part"].strides == (4, 1)
    assert records["float32"].strides is None
    assert records["transposed"].offset_bytes == records["float32"].offset_bytes
    assert records["part"].offset_bytes == records["float32"].offset_bytes + 5 * 4


def test_a_state_dict_with_its_metadata():
    raw = (DATA / "state_dict.bin").read_bytes()
    for i, record in enumerate(golden_records("state_dict.bin")):
        found = read_array(raw, record, np.dtype(np.float32))
        assert found.ravel().tolist() == list(range(10 * i, 10 * i + found.size))
    assert i == 3


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_our_error_or_read_inside_the_file(data, tmp_path):
    """Changed, removed or inserted bytes cause no other exception, and no offset outside."""
    file = data.draw(st.sampled_from(["tensors.bin", "state_dict.bin"]))
    raw = bytearray((DATA / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        end = at + data.draw(st.integers(0, 4))
        raw[at:end] = data.draw(st.binary(max_size=4))
    try:
        records = records_of(tmp_path, bytes(raw))
    except FormatError:
        return
    for record in records:
        assert 0 <= record.offset_bytes <= len(raw) - record.size_bytes
