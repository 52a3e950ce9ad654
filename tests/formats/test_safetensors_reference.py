"""Random safetensors files: what our reader accepts, the reference reader reads the same."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtj_loader.dtypes import BITS
from mtj_loader.errors import FormatError
from mtj_loader.formats.safetensors import read_records
from mtj_loader.storage.local import LocalStorage
from tests.formats.test_safetensors import FILE, SMALL, U64_MAX, entry
from tests.support.checkpoints import safetensors_bytes


def compare_with_reference(folder, raw):
    """The reference accepts what we accept, with the same names, dtypes, shapes and bytes."""
    (folder / FILE).write_bytes(raw)
    with LocalStorage(folder) as storage:
        try:
            records = read_records(storage, storage.version(FILE))
        except FormatError:
            return False
        ours = {
            r.name: (r.dtype, list(r.shape), storage.read(FILE, r.offset_bytes, r.size_bytes))
            for r in records
        }
    reference = {
        name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(raw)
    }
    assert ours == reference
    return True


many = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])

arrays = st.builds(
    lambda dtype, shape: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype),
    st.sampled_from(["bool", "u1", "i2", "f2", "f4", "f8", ml_dtypes.bfloat16]),
    st.lists(st.integers(0, 3), max_size=3),
)
tensor_names = st.text("abw._0é/", min_size=1, max_size=6).filter(lambda name: ".." not in name)


@many
# safetensors 0.8.0 writes broken JSON for no tensors and metadata
@given(
    st.dictionaries(tensor_names, arrays, min_size=1, max_size=5),
    st.dictionaries(st.text(), st.text()),
)
def test_reads_what_the_reference_writes(tmp_path, tensors, metadata):
    assert compare_with_reference(tmp_path, safetensors.numpy.save(tensors, metadata))


numbers = st.sampled_from([0, 1, 2, 4, 8, 12, 16, -1, 2**32, 2**63, U64_MAX, 1.0, True, None, "1"])
header_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "f32", None]),
        "shape": st.lists(numbers, max_size=3) | numbers,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16]), min_size=1, max_size=3),
    },
    optional={"extra": numbers},
) | st.builds(
    lambda dtype, begin, count: entry(dtype, [count], [begin, begin + count * BITS[dtype] // 8]),
    st.sampled_from(list(BITS)),
    st.sampled_from([0, 4, 8]),
    st.sampled_from([0, 1, 2, 4, 8]),
)
headers = st.dictionaries(
    st.sampled_from(["w", "v", "", "\0", "../w", "é", "__metadata__"]),
    header_entries | st.dictionaries(st.text(max_size=2), st.text(max_size=2) | st.none()),
    max_size=3,
)


@many
@given(headers, st.sampled_from([0, 4, 8, 16]), st.sampled_from(["", " ", "\n\t ", "\0", "x"]))
def test_generated_headers_against_the_reference(tmp_path, header, data_bytes, padding):
    compare_with_reference(
        tmp_path, safetensors_bytes(json.dumps(header) + padding, bytes(data_bytes))
    )


@many
@given(st.data())
def test_mutated_bytes_against_the_reference(tmp_path, data):
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'{}[]",:0129 '))
    compare_with_reference(tmp_path, bytes(raw))
