"""Which file contains which tensor, with and without an index, and contradictions to it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mtj_loader.errors import CheckpointError, FormatError
from mtj_loader.formats.checkpoint_index import build_index, read_index
from mtj_loader.formats.file_names import check_numbering, choose_files
from mtj_loader.storage.local import LocalStorage
from tests.support.checkpoints import write_checkpoint, write_index, write_safetensors

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ROW = np.ones(2, np.float32)


@pytest.fixture
def folder(tmp_path):
    """Two shards: a and b in the first, c in the second."""
    return write_checkpoint(tmp_path / "model", {ONE: {"b": ROW, "a": ROW}, TWO: {"c": ROW}})


def index_of(folder):
    with LocalStorage(folder) as storage:
        return build_index(storage)


def refusal(folder, kind=FormatError) -> str:
    with pytest.raises(kind) as caught:
        index_of(folder)
    return f"{caught.value}\n"


def write_raw_index(folder, text):
    (folder / INDEX).write_text(text)


def test_records_are_ordered_by_file_and_offset(folder):
    index = index_of(folder)
    assert [(r.name, r.file) for r in index.records.values()] == [
        ("b", ONE),
        ("a", ONE),
        ("c", TWO),
    ]
    assert [*index.records] == ["b", "a", "c"]
    assert [*index.files] == [ONE, TWO]
    assert index.files[TWO].size_bytes == (folder / TWO).stat().st_size
    assert index.warnings == ()


def test_shards_may_be_in_a_subfolder(folder):
    (folder / "sub").mkdir()
    for name in (ONE, TWO):
        (folder / name).rename(folder / "sub" / name)
    write_index(folder, {"a": f"sub/{ONE}", "b": f"sub/{ONE}", "c": f"sub/{TWO}"})
    assert index_of(folder).records["c"].file == f"sub/{TWO}"


@pytest.mark.parametrize(
    "path",
    ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors",
     "C:x.safetensors", "..\\x.safetensors", "\\\\host\\x.safetensors", "./x.safetensors", "",
     "a\0.safetensors"],
    ids=lambda path: f"B28-{path!a}",
)  # fmt: skip
def test_path_that_leaves_the_folder(folder, path):
    write_index(folder, {"a": ONE, "w": path})
    message = refusal(folder)
    assert f"file: {INDEX}\n" in message
    assert "key: weight_map.w\n" in message
    assert "expected: a file inside the checkpoint's folder" in message
    assert f"found: {path!r}\n" in message


def test_b28_link_that_leaves_the_folder(folder, tmp_path):
    (folder / TWO).rename(tmp_path / "elsewhere.safetensors")
    (folder / TWO).symlink_to(tmp_path / "elsewhere.safetensors")
    message = refusal(folder)
    assert "symbolic link leaves" in message
    assert f"file: {TWO}\n" in message
    assert "elsewhere.safetensors" in message


@pytest.mark.parametrize(
    "name", ["model.bin", "model.safetensors.bin", "model", "pytorch_model.bin"],
    ids=lambda name: f"B29-{name}",
)  # fmt: skip
def test_wrong_suffix(folder, name):
    write_index(folder, {"a": ONE, "w": name})
    message = refusal(folder)
    assert "key: weight_map.w\n" in message
    assert "ends in .safetensors" in message
    assert f"file: {INDEX}\n" in message
    assert f"found: {name!r}\n" in message


BAD_DOCUMENTS = {
    "B30-no-weight-map": ("{}", "key: weight_map\n", "found: None"),
    "B30-null": ('{"weight_map": null}', "key: weight_map\n", "found: None"),
    "B30-empty": ('{"weight_map": {}}', "key: weight_map\n", "found: {}"),
    "B30-list": ('{"weight_map": ["a"]}', "key: weight_map\n", "found: ['a']"),
    "B30-value-a-number": ('{"weight_map": {"a": 1}}', "weight_map.a\n", "expected: a string"),
    "B30-value-null": ('{"weight_map": {"a": null}}', "weight_map.a\n", "found: None"),
    "B30-value-a-list": ('{"weight_map": {"a": ["x"]}}', "weight_map.a\n", "found: ['x']"),
    "B30-document-a-list": ("[]", "not a JSON object", "found: []"),
    "B30-metadata-a-list": (
        '{"metadata": [], "weight_map": {"a": "x.safetensors"}}', "key: metadata\n", "an object"),
    "B31-tensor-twice": (
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        "duplicate key", "key: weight_map.a\n"),
    "B31-weight-map-twice": (
        '{"weight_map": {"a": "x.safetensors"}, "weight_map": {}}',
        "duplicate key", "key: weight_map\n"),
    "B39-index-is-an-lfs-pointer": (
        "version https://git-lfs.github.com/spec/v1\n", "not valid JSON", "near 'version http"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"), [(c[0], c[1:]) for c in BAD_DOCUMENTS.values()], ids=BAD_DOCUMENTS
)
def test_bad_document(folder, text, words):
    write_raw_index(folder, text)
    message = refusal(folder)
    for word in (f"file: {INDEX}\n", *words):
        assert word in message


def test_b32_missing_shard(folder):
    (folder / TWO).unlink()
    message = refusal(folder, CheckpointError)
    assert "a file in the index is missing" in message
    assert f"file: {INDEX}\n" in message
    assert f"found: no {TWO}\n" in message


def test_b33_tensor_in_another_shard(folder):
    write_index(folder, {"a": ONE, "b": TWO, "c": TWO})
    message = refusal(folder)
    assert "not in the file that the index names" in message
    for word in (f"file: {INDEX}", "tensor: b", f"expected: {TWO}", f"found: {ONE}"):
        assert f"{word}\n" in message


def test_b33_tensor_in_no_shard(folder):
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    message = refusal(folder)
    for word in ("tensor: d", f"expected: {TWO}", "found: in none of the index's files"):
        assert f"{word}\n" in message


def test_b34_the_index_is_an_allow_list(folder):
    write_index(folder, {"a": ONE, "c": TWO})
    index = index_of(folder)
    assert [*index.records] == ["a", "c"]
    assert index.warnings == (f"1 tensor is not in {INDEX}, so not read: b",)


def test_b35_tensor_in_two_shards(folder):
    write_safetensors(folder / TWO, {"c": ROW, "a": ROW})
    message = refusal(folder)
    assert "a tensor is in two files" in message
    for word in (f"file: {TWO}", "tensor: a", f"expected: only in {ONE}"):
        assert f"{word}\n" in message


def test_b36_the_index_decides(folder):
    for name in ("model.safetensors", "consolidated.safetensors"):
        write_safetensors(folder / name, {"a": 2 * ROW, "b": ROW, "c": ROW})
    index = index_of(folder)
    assert {r.file for r in index.records.values()} == {ONE, TWO}
    assert index.warnings == (
        f"not in {INDEX}, so not read: consolidated.safetensors, model.safetensors",
    )


@pytest.mark.parametrize("claim", [25, 24.5, "24", [24], True], ids=lambda c: f"B37-{c!r}")
def test_wrong_total_size(folder, claim):
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO}, claim)
    (warning,) = index_of(folder).warnings
    assert warning == f"{INDEX}: total_size is {claim!r}, but its tensors have 24 bytes"


@pytest.mark.parametrize("claim", [24, 24.0, None], ids=lambda c: f"B37-{c!r}")
def test_right_or_no_total_size(folder, claim):
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO}, claim)
    assert index_of(folder).warnings == ()


NUMBERINGS = {
    "B38-gap": (
        ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
        "a shard is missing", "expected: 3 shards", "found: 2 of them; shard 2 is missing"),
    "B38-last-is-missing": ([ONE], "a shard is missing", "shard 2 is missing"),
    "B38-huge-total": (["model-00001-of-999999999.safetensors"], "shard 2 is missing"),
    "B38-two-totals": (
        [ONE, TWO, "model-00003-of-00003.safetensors"],
        "shards of two different sets", "expected: one total", "found: of-2 and of-3"),
    "B38-counted-from-0": (
        ["model-00000-of-00002.safetensors", ONE],
        "wrong shard numbers", "expected: 1 to 2", "found: 0 to 1"),
    "B38-0-and-more": (
        ["model-00000-of-00002.safetensors", ONE, TWO], "wrong shard numbers", "found: 0 to 2"),
    "B38-number-over-total": (
        [ONE, "model-00003-of-00002.safetensors"], "wrong shard numbers", "found: 1 to 3"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "words"), [(c[0], c[1:]) for c in NUMBERINGS.values()], ids=NUMBERINGS
)
def test_numbering(tmp_path, files, words):
    for position, file in enumerate(files):
        write_safetensors(tmp_path / file, {f"t{position}": ROW})
    without_index = refusal(tmp_path)
    write_index(tmp_path, {f"t{position}": file for position, file in enumerate(files)})
    with_index = refusal(tmp_path)
    for word in ("file: model-*-of-*.safetensors", *words):
        assert word in without_index
        assert word in with_index


def test_sets_with_different_names_are_separate():
    check_numbering([ONE, TWO, "vision-00001-of-00001.safetensors", "extra.safetensors"])
    check_numbering(["model-000001-of-000001.safetensors"])
    long = "1" * 5000  # int() would raise
    check_numbering([f"model-{long}-of-{long}.safetensors"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["not a safetensors file", "found: an empty file"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
         ["not a safetensors file", "a Git LFS pointer", "git lfs pull"]),
    ],
    ids=["B39-empty-shard", "B39-lfs-pointer"],
)  # fmt: skip
def test_invalid_shard(folder, data, words):
    (folder / TWO).write_bytes(data)
    message = refusal(folder)
    for word in (f"file: {TWO}\n", *words):
        assert word in message


def test_shard_that_is_a_folder(folder):
    (folder / TWO).unlink()
    (folder / TWO).mkdir()
    assert f"no {TWO}" in refusal(folder, CheckpointError)


def test_weights_without_a_tensor(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {})
    message = refusal(tmp_path, CheckpointError)
    assert "the weights contain no tensors\n  file: model.safetensors" in message


def test_oversized_index(folder):
    with (folder / INDEX).open("wb") as file:
        file.truncate(1 << 40)
    message = refusal(folder)
    assert "too large" in message
    assert f"file: {INDEX}" in message


def test_complete_set_without_index(folder):
    (folder / INDEX).unlink()
    write_safetensors(folder / "adapter_model.safetensors", {"a": ROW})
    index = index_of(folder)
    assert [*index.records] == ["b", "a", "c"]
    assert index.warnings == (f"not read: adapter_model.safetensors; the weights are {ONE}, {TWO}",)


def test_tensor_twice_in_a_set_without_index(folder):
    (folder / INDEX).unlink()
    write_safetensors(folder / TWO, {"a": ROW})
    assert "a tensor is in two files" in refusal(folder)


def test_one_shard_by_name_warns(folder):
    with LocalStorage(folder) as storage:
        index = build_index(storage, [ONE])
    assert [*index.records] == ["b", "a"]
    assert index.warnings == (f"{ONE} is one of 2 files; pass their folder to read all of them",)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["config.json", "model.safetensors", "README.md"], ["model.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "weights.safetensors"], ["weights.safetensors"]),
        ([TWO, ONE, "pytorch_model.bin"], [ONE, TWO]),
        (["model.safetensors", "unet/model.safetensors"], ["model.safetensors"]),
    ],
)
def test_choice_by_name(names, chosen):
    assert choose_files(names, location="folder") == chosen


@pytest.mark.parametrize(
    "names",
    [["model.safetensors", ONE, TWO], ["x.safetensors", "y.safetensors"]],
    ids=["single-and-set", "two-others"],
)
def test_ambiguous_choice(names):
    with pytest.raises(CheckpointError, match="not clear which files") as caught:
        choose_files(names, location="folder")
    assert caught.value.file == "folder"
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json", "pytorch_model.bin"], ["found: pytorch_model.bin", "convert"]),
        (["config.json", "flax_model.msgpack", "tf_model.h5"], ["flax_model.msgpack, tf_model.h5"]),
        (["config.json", "README.md"], ["found: README.md, config.json"]),
        ([], ["found: no files"]),
        ([f"{i}.bin" for i in range(9)], ["4.bin, … (9 in total)"]),
    ],
)
def test_no_weights(names, words):
    with pytest.raises(CheckpointError, match="no safetensors weights") as caught:
        choose_files(names, location="folder")
    assert caught.value.file == "folder"
    for word in (INDEX, "model.safetensors", *words):
        assert word in str(caught.value)


def test_large_index(tmp_path):
    weight_map = {f"model.layers.{i}.weight": ONE if i % 2 else TWO for i in range(50_000)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with LocalStorage(tmp_path) as storage:
        assert read_index(storage).shards == [ONE, TWO]
