"""The restricted reader for torch.save's files: a violation of each rule."""

from __future__ import annotations

import ast
import contextlib
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mtj_loader.formats
from mtj_loader.errors import FormatError
from mtj_loader.formats import restricted_pickle, zip_archive
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.torch_zip import read_records
from mtj_loader.storage.local import LocalStorage
from tests.support.torch_files import (
    FALSE,
    HOOKS,
    REBUILD,
    Part,
    archive,
    member_bytes,
    name,
    number,
    numbers,
    pickle_of,
    storage,
    tensor,
    text,
    torch_zip,
    tuple_of,
)

DATA = Path(__file__).parents[1] / "data" / "torch_zip"
W = pickle_of(text("w"), tensor())
LENGTH = len(member_bytes(Part("m/data.pkl", W)))
GOOD = torch_zip(W)
PARAMETER = name("torch._utils", "_rebuild_parameter")
SYSTEM = name("os", "system") + text("touch owned") + b"\x85R"


def records_of(folder, raw):
    (folder / "a.bin").write_bytes(raw)
    with LocalStorage(folder) as files:
        return read_records(files, files.version("a.bin"))


def w(**fields) -> bytes:
    """A file of one tensor `w` with these fields."""
    return torch_zip(pickle_of(text("w"), tensor(**fields)))


def value(raw: bytes) -> bytes:
    """A file of a dict with this value."""
    return torch_zip(pickle_of(text("w"), raw))


def whole(pickle: bytes) -> bytes:
    return torch_zip(b"\x80\x02" + pickle)


def flagged(flags: int, **damage) -> bytes:
    """A valid archive, except for the flags and this damage to the storage's member."""
    part = Part("m/data/0", bytes(16), flags=flags, **damage)
    return archive(Part("m/data.pkl", W), part)


def pickled(part: Part) -> bytes:
    return archive(part, Part("m/data/0", bytes(16)))


def legacy(file: str) -> bytes:
    return (DATA / file).read_bytes()


# number and name → the file, and parts of the message
REFUSED = {
    "40-os-system": (value(SYSTEM), "not allowed", "GLOBAL", "found: os.system"),
    "40-builtins-eval": (value(name("builtins", "eval")), "found: builtins.eval"),
    "40-dotted-name": (
        value(name("torch._utils", "_rebuild_tensor_v2.__globals__")), "not allowed"),
    "40-unknown-storage": (value(storage(kind="QUInt8Storage")), "found: torch.QUInt8Storage"),
    "40-escape-sequence": (value(name("\x1b[2J", "x")), r"\x1b[2J.x"),
    "40-endless-name": (
        value(b"c" + b"a" * 5000), "name in the pickle is too long", "at most 200 bytes"),
    "41-reduce-a-type": (
        value(name("torch", "FloatStorage") + b")R"), "a function that is not allowed", "REDUCE"),
    "41-reduce-a-string": (
        value(text("f") + b")R"), "a function that is not allowed", "found: 'f'"),
    "41-reduce-a-tensor": (
        value(tensor() + b")R"), "a function that is not allowed", "found: a tensor"),
    "41-reduce-with-a-string": (
        value(name("collections", "OrderedDict") + text("x") + b"R"),
        "wrong arguments", "collections.OrderedDict of 'x'"),
    "41-ordered-dict-with-arguments": (
        value(name("collections", "OrderedDict") + numbers([1]) + b"R"), "wrong arguments"),
    "41-tensor-of-too-little": (value(REBUILD + b")R"), "wrong arguments"),
    "41-newobj": (value(REBUILD + b")\x81"), "an opcode that is not allowed", "found: NEWOBJ"),
    "41-newobj-ex": (value(REBUILD + b")}\x92"), "found: NEWOBJ_EX"),
    "42-build-a-dict": (value(b"}}b"), "sets attributes", "BUILD"),
    "42-build-a-tensor": (value(tensor() + b"}b"), "sets attributes"),
    "42-build-a-function": (value(REBUILD + b"}b"), "sets attributes"),
    "42-build-with-a-tuple": (value(HOOKS + b")b"), "sets attributes"),
    "42-build-another-attribute": (
        value(HOOKS + b"}" + text("__class__") + b"Nsb"), "unknown attributes", "'__class__'"),
    "43-setitem-on-a-tuple": (
        value(b")" + text("k") + b"Ns"), "items of an object that is not a dict", "a tuple"),
    "43-setitem-on-a-tensor": (value(tensor() + text("k") + b"Ns"), "found: a tensor"),
    "43-setitems-odd": (value(b"}(" + text("k") + b"u"), "items of an object that is not a dict"),
    "43-append": (value(b"](" + text("k") + b"e"), "not allowed", "found: EMPTY_LIST"),
    "43-append-on-a-dict": (value(b"}Na"), "not allowed", "found: APPEND"),
    "43-key-a-number": (value(b"}K\x01Ns"), "not a string", "found: 1"),
    "43-key-twice": (
        torch_zip(pickle_of(text("w"), tensor(), text("w"), tensor())), "a duplicate key", "'w'"),
    "44-another-tag": (value(storage(tag="module")), "bad persistent id", "BINPERSID"),
    "44-a-string": (value(text("0") + b"Q"), "bad persistent id", "found: '0'"),
    "44-too-short": (value(tuple_of(text("storage")) + b"Q"), "bad persistent id"),
    "44-type-a-string": (
        value(tuple_of(*map(text, ("storage", "F32", "0", "cpu")), number(4)) + b"Q"),
        "bad persistent id"),
    "44-key-a-path": (value(storage(key="../../etc/passwd")), "bad persistent id"),
    "44-key-another-member": (value(storage(key="0/../data.pkl")), "bad persistent id"),
    "44-negative-count": (value(storage(elements=-4)), "bad persistent id"),
    "45-stack-global": (
        value(text("os") + text("system") + b"\x93"), "not allowed", "found: STACK_GLOBAL"),
    "45-inst": (value(b"(ios\nsystem\n"), "found: INST"),
    "45-extension": (value(b"\x82\x01"), "found: EXT1"),
    "45-second-proto": (value(b"\x80\x02N"), "found: PROTO"),
    "45-unknown": (value(b"\xff"), "found: byte ff"),
    "45-protocol-4": (torch_zip(b"\x80\x04N."), "not a pickle written by", "found: 80 04"),
    "45-protocol-0": (torch_zip(b"(dp0\n."), "expected: protocol 2"),
    "45-empty-pickle": (torch_zip(b""), "found: nothing"),
    "46-bytes-after-stop": (torch_zip(W + b"N."), "bytes after the end", "STOP", "found: 2 bytes"),
    "47-underflow": (whole(b"."), "empty stack", "STOP"),
    "47-underflow-through-a-mark": (whole(b"N(\x85."), "empty stack", "TUPLE1"),
    "47-no-mark": (whole(b"}u."), "pops to a missing mark"),
    "47-left-behind": (whole(b"NN."), "ends with a nonempty stack", "1 more"),
    "47-mark-left-behind": (whole(b"N(."), "empty stack"),
    "47-memo-absent": (value(b"h\x07"), "no such entry", "BINGET", "number 7"),
    "47-memo-of-nothing": (whole(b"q\x00."), "empty stack", "BINPUT"),
    "47-no-stop": (torch_zip(W[:-1]), "truncated"),
    "47-truncated-text": (whole(b"X\xff\xff\xff\xffab"), "truncated", "4,294,967,295 bytes"),
    "47-truncated-number": (whole(b"J\x01"), "truncated", "BININT", "expected: 4 bytes"),
    "47-not-utf8": (value(b"X\x01\0\0\0\xff"), "not UTF-8"),
    "47-long-number": (value(b"\x8a\xff" + b"\x01" * 255), "too long", "found: 255"),
    "47-high-stack": (whole(b"N" * 20_000 + b"."), "too high", "at most 10,000"),
    "47-deep-marks": (whole(b"(" * 70 + b"."), "nested too deep"),
    "47-deep-tuples": (whole(b")" + b"\x85" * 100 + b"."), "too long or too deep"),
    "47-tuple-bomb": (whole(b")" + b"q\0h\0h\0\x87" * 60 + b"."), "too long or too deep"),
    "48-beyond-the-storage": (
        w(shape=(2, 3), strides=(3, 1)), "beyond its storage", "at most 4 elements", "found: 6"),
    "48-offset-beyond": (w(offset=1), "beyond its storage", "found: 5"),
    "48-stride-beyond": (w(strides=(4, 1)), "beyond its storage", "found: 6"),
    "48-stride-overflow": (w(strides=(2**63 - 1, 1)), "beyond its storage", "found: 9,223,372"),
    "48-stride-over-63-bits": (w(strides=(2**64, 1)), "not nonnegative integers"),
    "48-negative-offset": (w(offset=-1), "not nonnegative integers", "found: -1"),
    "48-negative-stride": (w(strides=(-2, 1)), "not nonnegative integers"),
    "48-negative-size": (w(shape=(-2, -2)), "not nonnegative integers"),
    "48-rank": (w(shape=(2,)), "rank is wrong", "1 sizes and 2 strides"),
    "48-empty-beyond": (w(shape=(0, 2), offset=5), "beyond its storage", "found: 5"),
    "48-empty-impossible": (w(shape=(2**62, 0), strides=(1, 1)), "shape is impossible"),
    "49-stride-0": (w(shape=(10**6, 10**6), strides=(0, 0)), "repeats its elements", "contiguous"),
    "49-overlapping": (w(shape=(3, 2), strides=(1, 1)), "repeats its elements", "found: [3, 2]"),
    "50-member-too-small": (
        torch_zip(W, {"0": bytes(15)}), "has the wrong size", "16 bytes", "15 bytes", "tensor: w"),
    "50-member-too-large": (torch_zip(W, {"0": bytes(17)}), "found: 17 bytes"),
    "50-member-absent": (torch_zip(W, {"1": bytes(16)}), "missing", "data/0", "no such member"),
    "50-claims-a-terabyte": (w(where=storage(elements=2**40)), "expected: 4,398,046,511,104 bytes"),
    "51-crc-of-the-pickle": (
        pickled(Part("m/data.pkl", W, crc=1)), "wrong checksum", "expected: 0x00000001"),
    "51-crc-of-the-byte-order": (
        archive(Part("m/data.pkl", W), Part("m/byteorder", b"little", crc=1)), "wrong checksum"),
    "51-encrypted": (flagged(1), "encrypted", "m/data/0"),
    "51-unknown-flags": (flagged(0x2000), "unknown flags", "0x2000"),
    "51-local-name-differs": (flagged(0, local_name="m/data/1"), "differ"),
    "51-local-name-longer": (flagged(0, local_name="m/data/00"), "differ"),
    "51-local-size-differs": (flagged(0, local_size=8), "differ"),
    "51-local-size-despite-descriptor": (flagged(8, local_size=8), "differ"),
    "51-descriptor-differs": (
        flagged(8, descriptor=b"PK\x07\x08" + bytes(12)), "descriptor", "differ"),
    "51-zip64-missing": (
        GOOD[:-6] + b"\xff\xff\xff\xff" + GOOD[-2:], "end of the archive is damaged"),
    "51-two-directories": (torch_zip(W, zip64=True, short_start=7), "two directories"),
    "51-zip64-elsewhere": (torch_zip(W, zip64=True, zip64_at=7), "end of the archive is damaged"),
    "51-zip64-without-its-end": (
        torch_zip(W, zip64=True).replace(b"PK\x06\x06", b"PK\x06\x05"),
        "end of the archive is damaged", "one zip64 directory"),
    "51-zip64-sizes-cut": (
        flagged(0, zip64=True).replace(b"\1\0\x18\0", b"\1\0\x10\0"), "zip64 sizes", "m/data/0"),
    "51-header-in-the-directory": (
        archive(Part("m/data.pkl", W), Part("m/x", b"", at=LENGTH)),
        "overlaps the directory", "m/x"),
    "51-data-in-the-directory": (
        archive(Part("m/data.pkl", W), Part("m/x", b"")).replace(b"\3\0\3\0m/x", b"\3\0\4\0m/x"),
        "overlaps the directory", "m/x"),
    "51-long-byte-order": (
        archive(Part("m/data.pkl", W), Part("m/byteorder", b"l" * 17)), "too large", "found: 17"),
    "51-too-many-entries": (torch_zip(W, entries=5), "directory is damaged"),
    "51-too-few-entries": (torch_zip(W, entries=3), "directory is damaged"),
    "51-directory-elsewhere": (torch_zip(W, start=7), "end of the archive is damaged"),
    "51-gap": (torch_zip(W, between=b"??"), "belong to no member"),
    "51-gap-between-members": (flagged(0, gap=b"??"), "belong to no member", "m/data/0"),
    "51-overlap": (
        archive(
            Part("m/data.pkl", W),
            Part("m/data/0", member_bytes(Part("m/data/1", b"inside"))),
            Part("m/data/1", b"inside", at=LENGTH + 41)),
        "two members overlap", "m/data/1"),
    "51-name-not-utf8": (GOOD.replace(b"m/version", b"m/versio\xff"), "not UTF-8"),
    "52-duplicate-pickle": (
        archive(Part("m/data.pkl", W), Part("m/data.pkl", W), Part("m/data/0", bytes(16))),
        "in the archive twice", "m/data.pkl"),
    "52-duplicate-storage": (
        archive(Part("m/data.pkl", W), *[Part("m/data/0", bytes(16))] * 2), "twice", "m/data/0"),
    "53-deflated": (flagged(0, method=8), "compressed", "m/data/0", "found: method 8"),
    "53-deflated-pickle": (pickled(Part("m/data.pkl", W, method=8)), "compressed"),
    "53-packed-smaller": (flagged(0, packed=8), "compressed"),
    "54-tar": (bytes(257) + b"ustar" + bytes(300), "a tar archive", "save it again"),
    "54-stacked-pickles": (legacy("legacy.bin"), "several pickles, as written", "save it again"),
    "54-one-pickle": (b"\x80\x02N.", "found: a Python pickle"),
    "54-torchscript": (legacy("torchscript.bin"), "a TorchScript program", "which is code"),
    "54-something-before": (b"#!/bin/sh\n" + GOOD, "starts at byte 0", "found: 23 21 2f"),
    "54-something-after": (GOOD + b"\n", "truncated, or bytes follow"),
    "54-zip-comment": (GOOD[:-2] + b"\x02\x00ab", "truncated, or bytes follow"),
    "54-comment-claimed": (GOOD[:-2] + b"\x02\x00", "end of the archive is damaged"),
    "54-two-archives": (GOOD + GOOD, "end of the archive is damaged"),
    "54-two-folders": (archive(Part("m/data.pkl", W), Part("n/data/0", bytes(16))), "2 folders"),
    "54-no-pickle": (archive(Part("m/data/0", bytes(16))), "one folder that contains data.pkl"),
    "54-another-zip": (archive(Part("readme.txt", b"hello")), "one folder that contains data.pkl"),
    "54-no-member": (b"PK\x03\x04" + archive(), "end of the archive is damaged"),
    "54-empty-file": (b"", "an empty file"),
    "54-git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "54-truncated": (GOOD[:-1], "truncated"),
    "54-truncated-to-the-signature": (b"PK\x03\x04", "truncated"),
    "54-big-endian": (
        archive(Part("m/data.pkl", W), Part("m/byteorder", b"big")), "byte order", "found: b'big'"),
    "55-sparse": (legacy("sparse.bin"), "(a sparse tensor)"),
    "55-subclass": (legacy("subclass.bin"), "(a tensor subclass, or a tensor with attributes)"),
    "55-quantized": (value(name("torch._utils", "_rebuild_qtensor")), "(a quantized tensor)"),
    "55-meta": (value(name("torch._utils", "_rebuild_meta_tensor_no_storage")), "(a meta tensor"),
    "55-conjugate": (w(more=b"}" + text("conj") + b"\x88s"), "conjugate or negative view"),
    "55-hooks": (w(hooks=HOOKS + text("h") + b"Ns"), "a tensor has hooks"),
    "55-hooks-of-a-parameter": (
        value(PARAMETER + tuple_of(tensor(), FALSE, HOOKS + text("h") + b"Ns") + b"R"),
        "wrong arguments", "_rebuild_parameter"),
    "55-no-hooks": (w(hooks=b"N"), "a tensor has hooks"),
    "root-a-tensor": (torch_zip(b"\x80\x02" + tensor() + b"."), "not a dict", "found: a tensor"),
    "value-a-number": (value(number(3)), "dict is not a tensor", "key: w", "found: 3"),
    "value-a-dict": (
        value(b"}" + text("k") + tensor() + b"s"), "dict is not a tensor", "found: a dict"),
    "name-with-a-path": (torch_zip(pickle_of(text("../w"), tensor())), "bad tensor name", "../w"),
    "name-empty": (torch_zip(pickle_of(text(""), tensor())), "bad tensor name"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_rejected(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw, *wording = REFUSED[case]
    with pytest.raises(FormatError) as caught:
        records_of(tmp_path, raw)
    for words in ("a.bin", *wording):
        assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]  # no code has run


def test_an_oversized_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_archive, "_MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(FormatError, match=r"directory is too large(.|\n)*at most 100 bytes\n"):
        records_of(tmp_path, GOOD)
    monkeypatch.setattr(zip_archive, "_MAX_MEMBERS", 3)
    with pytest.raises(FormatError, match=r"too many members(.|\n)*at most 3\n(.|\n)*found: 4"):
        records_of(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"K\1q\0" + b"h\0" * 99 + b".", "the pickle is too long"),
        (b"K\1q\0(" + b"h\0" * 9 + b"tq\1" + b"h\1h\1\x86" * 5, "the pickle is too long"),
        (b"}" + b"".join(b"q%c" % i for i in range(9)), "the pickle's memo is too large"),
        (b"(" * 70, "the pickle's marks are nested too deeply"),
    ],
    ids=["opcodes", "tuples-of-tuples", "memo", "marks"],
)
def test_pickles_that_take_too_long(body, words, tmp_path, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "_MAX_WORK", 100)
    monkeypatch.setattr(restricted_pickle, "_MAX_MEMO", 8)
    with pytest.raises(FormatError, match=f"^{words}"):
        records_of(tmp_path, whole(body))


def test_every_case_of_the_list_is_here():
    numbered = {int(case[:2]) for case in REFUSED if case[0].isdigit()}
    assert numbered == set(range(40, 56))  # 56 is the next test


def test_56_no_fallback():
    """The modules cannot import or run anything that a file names."""
    folder = Path(mtj_loader.formats.__file__).parent
    imported = set()
    for file in ("torch_zip", "zip_archive", "restricted_pickle", "torch_objects"):
        tree = ast.parse((folder / f"{file}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Name):
                assert node.id not in {"eval", "exec", "__import__", "compile", "globals"}
    others = {name for name in imported if not name.startswith("mtj_loader.")}
    assert others == {
        "__future__", "collections.abc", "dataclasses", "math", "struct", "typing", "zlib",
    }  # fmt: skip


def test_the_plain_file(tmp_path):
    [record] = records_of(tmp_path, GOOD)
    assert record == TensorRecord("w", "a.bin", record.offset_bytes, "F32", (2, 2), None)
    with zipfile.ZipFile(tmp_path / "a.bin") as archive_:
        info = archive_.getinfo("m/data/0")
    assert record.offset_bytes == info.header_offset + 30 + len("m/data/0") + len("pad")


@pytest.mark.parametrize(
    "raw",
    [flagged(8), flagged(0x808), flagged(8, zip64=True), torch_zip(W, zip64=True)],
    ids=["descriptor", "utf8", "zip64-member", "zip64-directory"],
)
def test_other_valid_archives(raw, tmp_path):
    assert [record.name for record in records_of(tmp_path, raw)] == ["w"]


def test_no_byte_order_is_little_endian(tmp_path):
    raw = archive(Part("m/data.pkl", W), Part("m/data/0", bytes(16)))
    assert [record.name for record in records_of(tmp_path, raw)] == ["w"]


SOUND = {
    "offset": (tensor(shape=(2,), strides=(1,), offset=2), 8, (2,), None),
    "transposed": (tensor(strides=(1, 2)), 0, (2, 2), (1, 2)),
    "scalar": (tensor(shape=(), strides=(), offset=3), 12, (), None),
    "empty": (tensor(shape=(0, 3), strides=(3, 1)), 0, (0, 3), None),
    "stride-of-a-single-row": (tensor(shape=(1, 4), strides=(9, 1)), 0, (1, 4), None),
    "spread": (tensor(shape=(2,), strides=(3,)), 0, (2,), (3,)),
    "metadata-none": (tensor(more=b"N"), 0, (2, 2), None),
    "half": (
        tensor(shape=(1,), strides=(1,), offset=7, where=storage(elements=8, kind="HalfStorage")),
        14, (1,), None),
    "parameter": (
        PARAMETER + tuple_of(tensor(), FALSE, HOOKS) + b"R", 0, (2, 2), None),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_valid_tensors(case, tmp_path):
    raw, offset_bytes, shape, strides = SOUND[case]
    [base] = records_of(tmp_path, GOOD)
    [record] = records_of(tmp_path, torch_zip(pickle_of(text("w"), raw)))
    moved = len(pickle_of(text("w"), raw)) - len(W)  # data.pkl comes first
    assert record.offset_bytes - base.offset_bytes - moved == offset_bytes
    assert (record.shape, record.strides) == (shape, strides)


def test_data_is_read_once_and_in_chunks(tmp_path):
    class Counting(LocalStorage):
        lengths: ClassVar[list[int]] = []

        def read(self, path, offset_bytes, length_bytes):
            self.lengths.append(length_bytes)
            return super().read(path, offset_bytes, length_bytes)

    where = storage(elements=2_500_000)
    pickle = pickle_of(text("w"), tensor(shape=(2_500_000,), strides=(1,), where=where))
    raw = torch_zip(pickle, {"0": bytes(10_000_000)})
    (tmp_path / "a.bin").write_bytes(raw)
    with Counting(tmp_path) as files:
        [record] = read_records(files, files.version("a.bin"))
    assert record.size_bytes == 10_000_000
    assert sum(Counting.lengths) < 10_003_000
    assert max(Counting.lengths) == 1 << 20


def test_51_every_bit_of_every_member_is_checked(tmp_path):
    start = GOOD.index(b"pad", GOOD.index(b"m/data/0")) + len("pad")
    for at in [*range(8 * start, 8 * (start + 16)), 8 * (GOOD.index(b"3\n") + 1)]:
        damaged = bytearray(GOOD)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(FormatError, match=r"wrong checksum(.|\n)*key: m/(data/0|version)\n"):
            records_of(tmp_path, bytes(damaged))


def test_messages_name_two_different_values(tmp_path):
    """For every byte of an archive changed, and for every length."""
    files = [GOOD[:at] + bytes([GOOD[at] ^ 0x55]) + GOOD[at + 1 :] for at in range(len(GOOD))]
    files += [GOOD[:length] for length in range(len(GOOD))]
    for raw in files:
        with contextlib.suppress(FormatError):
            records_of(tmp_path, raw)
            continue
        with pytest.raises(FormatError) as caught:
            records_of(tmp_path, raw)
        error = caught.value
        assert error.found is None or str(error.expected) != str(error.found)


def test_ten_thousand_tensors(tmp_path):
    count = 10_000
    items = (
        part
        for i in range(count)
        for part in (text(f"layer.{i}.w"), tensor(where=storage(key=str(i))))
    )
    batches = list(items)
    pickle = b"\x80\x02}" + b"".join(
        b"(" + b"".join(batches[i : i + 2000]) + b"u" for i in range(0, len(batches), 2000)
    )
    raw = torch_zip(pickle + b".", {str(i): bytes(16) for i in range(count)})
    assert len(records_of(tmp_path, raw)) == count


OPCODES = [b"(", b")", b"}", b"N", b"u", b"s", b"R", b"b", b"Q", b"t", b"\x85", b"q\0", b"h\0"]
OPCODES += [text("storage"), number(4), REBUILD, HOOKS, storage(), tensor()]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(OPCODES), max_size=12))
def test_any_opcodes_in_any_order(parts, tmp_path):
    try:
        records_of(tmp_path, whole(b"".join(parts) + b"."))
    except FormatError:
        return
