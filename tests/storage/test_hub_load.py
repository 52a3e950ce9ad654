"""Loads that stream from a local hub."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import huggingface_hub.constants
import jax
import pytest

from mtj_loader.errors import CheckpointError, StorageError, UsageError
from mtj_loader.formats.checkpoint import open_checkpoint
from mtj_loader.options import Source
from mtj_loader.storage import retry
from mtj_loader.storage.retry import TransientError
from tests.support import hub as hub_server
from tests.support.command_line import run
from tests.support.remote_load import FAST, FILES, FOLDER, digests, load


@pytest.fixture(scope="module")
def local():
    """Digests of the parameters loaded from the folder."""
    return digests(load(FOLDER))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_POLICY", FAST)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server.serve({"org/neox": FILES, "org/bare": {"README.md": b"x"}}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.redirects = True
        yield running


def test_hub_equals_local(hub, local, tmp_path):
    model = load("org/neox", stream=True, token="hf_secret")
    assert digests(model) == local
    assert model.plan.checkpoint.location == f"org/neox@{hub.commit('org/neox')}"
    assert model.tokenizer is not None
    assert not (tmp_path / "cache").exists()
    assert len(hub.signatures) == 2 * 2  # one per file for planning, and one for loading
    assert hub.tokens == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {""}}


def test_addresses_that_expire(hub, local):
    hub.uses = 3
    assert digests(load("org/neox", stream=True, host_memory="64MiB")) == local
    assert len(hub.signatures) > 2 * 2


def test_an_address_that_is_always_denied(hub):
    hub.uses = 0
    with pytest.raises(StorageError, match="the server refuses access") as caught:
        open_checkpoint(Source("org/neox", stream=True))
    assert "HTTP 403" in str(caught.value)
    assert "Request has expired" in str(caught.value)
    assert "sig=" not in str(caught.value)


def test_a_hub_that_is_overloaded_briefly(hub, local):
    hub.refused = 5
    assert digests(load("org/neox", stream=True)) == local
    assert hub.refused == 0


@pytest.mark.parametrize("request_name", ["HfApi.model_info", "get_hf_file_metadata"])
def test_an_interrupt_does_not_wait_for_the_hub(hub, monkeypatch, request_name):
    interrupted, answered, ended = threading.Event(), threading.Event(), threading.Event()

    def interrupt_once(*_):
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    def stall(*_, **__):
        while not interrupted.is_set():  # a signal just before the main thread waits is not seen
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        answered.wait(60)
        ended.set()
        raise TransientError("too late")

    monkeypatch.setattr(f"mtj_loader.storage.hub.{request_name}", stall)
    previous = signal.signal(signal.SIGINT, interrupt_once)
    try:
        with pytest.raises(KeyboardInterrupt):
            open_checkpoint(Source("org/neox", stream=True))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not ended.is_set()
    answered.set()


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/"])
def test_a_hub_that_stays_overloaded(hub, path):
    hub.refused, hub.refused_path = 10**6, path
    with pytest.raises(StorageError, match="the hub keeps failing") as caught:
        open_checkpoint(Source("org/neox", stream=True))
    file = "org/neox\n" if "api" in path else f"org/neox@{hub.commit('org/neox')}/"
    assert f"file: {file}" in str(caught.value)
    assert "found: 6 attempts in " in str(caught.value)
    assert "503" in str(caught.value)


def test_a_permanent_error_of_the_hub_is_not_retried(hub):
    hub.refused, hub.refusal = 10**6, 410
    with pytest.raises(StorageError, match="the download failed") as caught:
        open_checkpoint(Source("org/neox", stream=True))
    assert "410" in str(caught.value)
    assert "attempts" not in str(caught.value)


def test_a_commit_is_pinned(hub):
    """The branch may move after planning; the load uses the planned commit."""
    checkpoint = open_checkpoint(Source("org/neox", stream=True))
    assert checkpoint.storage.location.endswith(hub.commit("org/neox"))
    with checkpoint.storage as storage:
        assert storage.names() == sorted(FILES)
        assert not storage.exists("no.safetensors")
        assert "no.safetensors" not in hub.fetched


@pytest.mark.parametrize(
    ("repo_id", "options", "kind", "words"),
    [
        ("org/none", {}, UsageError, "no such Hugging Face repository"),
        ("org/neox", {"revision": "v9"}, UsageError, "no such revision"),
        ("org/bare", {}, CheckpointError, "there is no config.json"),
        ("org/neox", {"local_files_only": True}, UsageError, "streaming needs the network"),
    ],
)
def test_hub_errors(hub, repo_id, options, kind, words):
    with pytest.raises(kind) as caught:
        open_checkpoint(Source(repo_id, stream=True, **options))
    assert words in str(caught.value)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"the hub keeps failing(.|\n)*Connection refused"):
        open_checkpoint(Source("org/name", stream=True))


def test_stream_option(hub):
    result = run("plan", "org/neox", "--stream", "--mesh", "mp=2", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["location"].startswith("org/neox@")
    assert jax.device_count() == 8
