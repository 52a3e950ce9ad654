"""Opening a checkpoint from a folder, a file, or a Hugging Face id on a local hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from mtj_loader.errors import CheckpointError, FormatError, StorageError, UsageError
from mtj_loader.formats.checkpoint import open_checkpoint
from mtj_loader.options import Source
from tests.support.checkpoints import write_checkpoint, write_safetensors
from tests.support.hub import serve

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {"model_type": "gpt_neox", "hidden_size": 8}
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
TOKENIZER = [
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two shards, with a tokenizer and unneeded files."""
    folder = write_checkpoint(tmp_path / "model", {ONE: {"a": A}, TWO: {"b": B}}, CONFIG)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    for name in (
        *TOKENIZER,
        "README.md",
        "pytorch_model.bin",
        "training_args.bin",
        "tokenizer.txt",
    ):
        (folder / name).write_text(json.dumps({"name": name}))  # equal files share a blob
    return folder


@pytest.fixture
def single(tmp_path):
    """A checkpoint of one file."""
    return write_checkpoint(tmp_path / "single", {"model.safetensors": {"a": A, "b": B}}, CONFIG)


def refusal(path, kind, **options) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(Source(path, **options))
    assert type(caught.value) is kind
    return f"{caught.value}\n"


def read_a(checkpoint):
    with checkpoint.storage as storage:
        record = checkpoint.index.records["a"]
        return storage.read(record.file, record.offset_bytes, record.size_bytes)


# ---- folders and files


@pytest.mark.parametrize("kind", [str, Path], ids=["str", "path"])
def test_folder(folder, kind):
    checkpoint = open_checkpoint(Source(kind(folder)))
    assert checkpoint.location == str(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {"eos_token_id": 0}
    assert [*checkpoint.index.records] == ["a", "b"]
    assert sorted(checkpoint.tokenizer_files) == TOKENIZER
    assert checkpoint.tokenizer_files["vocab.json"] == folder / "vocab.json"
    assert read_a(checkpoint) == A.tobytes()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_is_named_and_not_waited_for(single, name):
    (single / name).unlink(missing_ok=True)
    os.mkfifo(single / name)
    message = refusal(single, FormatError)
    assert message.startswith(f"not a regular file\n  file: {name}\n")


def test_folder_without_optional_files(single):
    checkpoint = open_checkpoint(Source(single))
    assert checkpoint.generation_config == {}
    assert checkpoint.tokenizer_files == {}
    assert read_a(checkpoint) == A.tobytes()


def test_relative_and_home_paths(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in ("model", "./model", "model/", "~/model"):
        assert read_a(open_checkpoint(Source(path))) == A.tobytes()


def test_messages_name_the_path_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "\n  file: empty\n" in refusal("empty", CheckpointError)


def test_single_file(single):
    other = write_safetensors(single / "other.safetensors", {"c": B})
    checkpoint = open_checkpoint(Source(other))
    assert checkpoint.location == str(other)
    assert checkpoint.config == CONFIG
    assert [*checkpoint.index.records] == ["c"]


def test_file_of_another_format(folder):
    message = refusal(folder / "pytorch_model.bin", UsageError)
    assert "not a checkpoint\n" in message
    assert "pytorch_model.bin\n" in message
    assert "expected: a folder, a .safetensors file, a URL or a Hugging Face id" in message


@pytest.mark.parametrize(
    "path",
    ["/no/such/folder", "./nothing", "../nothing", "nothing/", "a/b/c", "x.safetensors/y/z", "a\\b",
     "C:\\models\\x", "~/nothing-here", "", " ", Path("org/name")],
    ids=ascii,
)  # fmt: skip
def test_path_that_does_not_exist(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no hub may be contacted
    monkeypatch.chdir(tmp_path)
    if path == "":  # the working directory
        assert "no config.json" in refusal(path, CheckpointError)
    else:
        assert f"no such file or folder\n  file: {path}\n" in refusal(path, UsageError)


@pytest.mark.parametrize(
    "path", ["x" * 5000, "~no-such-user-here/model", "a\0b"], ids=["long", "user", "nul"]
)
def test_invalid_path(path):
    assert re.match("cannot use this path|no such file", refusal(path, UsageError))


def test_revision_of_a_folder(folder):
    assert "only a Hugging Face id has revisions" in refusal(folder, UsageError, revision="main")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    message = refusal(folder, CheckpointError)
    assert "there is no config.json" in message
    assert f"file: {folder}\n" in message
    assert "README.md" in message


def test_file_without_config_beside_it(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", {"a": A})
    assert "there is no config.json" in refusal(path, CheckpointError)


@pytest.mark.parametrize(
    ("name", "words"),
    [("pytorch_model.bin", ["found: pytorch_model.bin", "convert"]), ("README.md", ["README.md"])],
)
def test_folder_without_safetensors(tmp_path, name, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    message = refusal(tmp_path, CheckpointError)
    for word in ("no safetensors weights", "model.safetensors", *words):
        assert word in message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_config_is_read_strictly(folder, name):
    (folder / name).write_text('{"hidden_size": 8, "hidden_size": 16}')
    message = refusal(folder, FormatError)
    assert "duplicate key" in message
    assert f"file: {name}\n  key: hidden_size\n" in message


def test_nothing_stays_open(folder):
    before = len(list(Path("/proc/self/fd").iterdir()))
    checkpoint = open_checkpoint(Source(folder))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert read_a(checkpoint) == A.tobytes()
    (folder / TWO).write_bytes(b"12345678{}")
    refusal(folder, FormatError)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ---- the hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    disable_progress_bars()
    yield tmp_path / "cache"
    enable_progress_bars()


@pytest.fixture
def hub(folder, single, cache, monkeypatch):
    def contents(path):
        return {file.name: file.read_bytes() for file in path.iterdir()}

    repositories = {
        "org/sharded": contents(folder) | {"onnx/model.onnx": b"x", "unet/x.safetensors": b"x"},
        "single": contents(single) | {"flax_model.msgpack": b"x"},
        "org/odd": {
            "config.json": b"{}",
            "weights.safetensors": contents(single)["model.safetensors"],
        },
        "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"x"},
        "org/empty": {"README.md": b"x"},
    }
    with serve(repositories) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_hub_fetches_only_what_is_needed(hub, cache):
    checkpoint = open_checkpoint(Source("org/sharded", cache_dir=cache))
    needed = ["config.json", "generation_config.json", ONE, TWO, INDEX, *TOKENIZER]
    assert sorted(hub.fetched) == sorted(needed)
    assert checkpoint.location == f"org/sharded@{hub.commit('org/sharded')}"
    assert checkpoint.config == CONFIG
    assert json.loads(checkpoint.tokenizer_files["tokenizer.json"].read_text()) == {
        "name": "tokenizer.json"
    }
    assert read_a(checkpoint) == A.tobytes()


@pytest.mark.parametrize(
    ("repo_id", "weights"), [("single", "model.safetensors"), ("org/odd", "weights.safetensors")]
)
def test_hub_without_index(hub, cache, repo_id, weights):
    assert read_a(open_checkpoint(Source(repo_id, cache_dir=cache))) == A.tobytes()
    assert sorted(hub.fetched) == ["config.json", weights]


@pytest.mark.parametrize("repo_id", ["org/sharded", "single", "org/odd"])
def test_second_load_needs_no_network(hub, cache, repo_id, monkeypatch):
    first = open_checkpoint(Source(repo_id, cache_dir=cache))
    hub.fetched.clear()
    again = open_checkpoint(Source(repo_id, cache_dir=cache))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port, which is closed
    offline = open_checkpoint(Source(repo_id, cache_dir=cache, local_files_only=True))
    unreachable = open_checkpoint(Source(repo_id, cache_dir=cache))
    assert hub.fetched == []
    for checkpoint in (again, offline, unreachable):
        assert checkpoint.location == first.location
        assert read_a(checkpoint) == A.tobytes()


def test_hub_by_commit(hub, cache):
    commit = hub.commit("single")
    checkpoint = open_checkpoint(Source("single", cache_dir=cache, revision=commit))
    assert checkpoint.location == f"single@{commit}"


def test_new_commit_on_the_hub_is_fetched(hub, cache):
    before = open_checkpoint(Source("single", cache_dir=cache))
    hub.repositories["single"]["config.json"] = b'{"model_type": "new"}'
    after = open_checkpoint(Source("single", cache_dir=cache))
    assert before.location != after.location
    assert after.config == {"model_type": "new"}
    assert hub.fetched.count("model.safetensors") == 1


def test_shard_names_are_not_patterns(hub, cache):
    files = hub.repositories["org/sharded"]
    files["model[1].safetensors"] = files[ONE]
    files["model1.safetensors"] = b"not needed"
    files[INDEX] = json.dumps({"weight_map": {"a": "model[1].safetensors"}}).encode()
    assert read_a(open_checkpoint(Source("org/sharded", cache_dir=cache))) == A.tobytes()
    assert "model1.safetensors" not in hub.fetched


def test_hub_file_with_a_name_that_would_control_the_terminal(hub, cache):
    """It is not fetched: the hub's progress bar would show its name."""
    hub.repositories["org/pickles"]["\x1b[2J.safetensors"] = b"x"
    message = refusal("org/pickles", CheckpointError, cache_dir=cache)
    assert message.startswith("no safetensors weights\n  file: org/pickles\n")
    assert hub.fetched == ["config.json"]


def test_hub_index_with_a_bad_path(hub, cache):
    hub.repositories["org/sharded"][INDEX] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    assert "inside the checkpoint's folder" in refusal("org/sharded", FormatError, cache_dir=cache)


def test_hub_without_a_listed_shard(hub, cache):
    del hub.repositories["org/sharded"][TWO]
    message = refusal("org/sharded", CheckpointError, cache_dir=cache)
    assert f"found: no {TWO}\n" in message


@pytest.mark.parametrize(
    ("repo_id", "found"), [("org/pickles", "pytorch_model.bin"), ("org/empty", "README.md")]
)
def test_hub_without_safetensors(hub, cache, repo_id, found):
    message = refusal(repo_id, CheckpointError, cache_dir=cache)
    assert "no safetensors weights" in message
    assert f"found: {found}\n" in message
    assert "pytorch_model.bin" not in hub.fetched


def test_unknown_repository(hub, cache):
    message = refusal("org/nothing", UsageError, cache_dir=cache)
    assert "no such folder, and no such Hugging Face repository" in message
    assert "file: org/nothing\n" in message
    assert "token" in message


def test_unknown_revision(hub, cache):
    message = refusal("single", UsageError, cache_dir=cache, revision="v9")
    assert "no such revision\n  file: single\n  key: revision v9\n" in message


def test_invalid_id(hub, cache):
    message = refusal("org/a--b..", UsageError, cache_dir=cache)
    assert "not a Hugging Face id\n  file: org/a--b..\n" in message


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((403, "GatedRepo"), UsageError, ["is gated", "ask for access"]),
        ((401, "RepoNotFound"), UsageError, ["if the repository is private", "pass a token"]),
        ((401, ""), UsageError, ["rejects the token", "401"]),
        ((403, ""), UsageError, ["rejects the token", "403"]),
        ((429, ""), StorageError, ["the download failed", "429"]),
        ((500, ""), StorageError, ["the download failed", "500"]),
        ((503, ""), StorageError, ["the download failed", "503"]),
    ],
)
def test_hub_errors(hub, cache, answer, kind, words):
    hub.failures["single"] = answer
    message = refusal("single", kind, cache_dir=cache, token="hf_secret")
    for word in ("file: single\n", *words):
        assert word in message
    assert "hf_secret" not in message


def test_hub_that_cannot_be_reached(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refusal("org/name", StorageError, cache_dir=cache)
    assert "the download failed\n  file: org/name\n  found: " in message
    assert "refused" in message


def test_nothing_in_the_cache(cache):
    message = refusal("org/name", UsageError, cache_dir=cache, local_files_only=True)
    assert "not in the local cache, or incomplete\n  file: org/name\n" in message


def test_incomplete_checkpoint_in_the_cache(hub, cache):
    source = Source("org/sharded", cache_dir=cache)
    open_checkpoint(source)
    snapshot = cache / "models--org--sharded" / "snapshots" / hub.commit("org/sharded")
    (snapshot / TWO).unlink()
    message = refusal("org/sharded", UsageError, cache_dir=cache, local_files_only=True)
    assert "not in the local cache, or incomplete" in message
    assert read_a(open_checkpoint(source)) == A.tobytes()  # fetched again


def test_a_url_is_not_read_without_the_network():
    with pytest.raises(UsageError, match="a URL or streaming needs the network"):
        open_checkpoint(Source("http://127.0.0.1:9/model", local_files_only=True))
