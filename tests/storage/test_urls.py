"""URLs of checkpoints: which are accepted, and what they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtj_loader.errors import UsageError
from mtj_loader.storage import urls


@pytest.mark.parametrize("path", ["s3://b/x", "gs://b", "https://h/x", "abfs://c@a.b/x", "x+y://z"])
def test_urls(path):
    assert urls.is_url(path)


@pytest.mark.parametrize("path", ["b/x", "/b/x", "C:\\x", "s3:/b", "", Path("s3://b/x")], ids=str)
def test_paths_that_are_not_urls(path):
    assert not urls.is_url(path)


def test_a_url_of_one_file():
    storage, files = urls.open_url(
        "gs://bucket/some/model%201.safetensors", file_suffix=".safetensors"
    )
    assert storage.location == "gs://bucket/some"
    assert files == ["model 1.safetensors"]
    storage, files = urls.open_url(
        "abfs://box@account.dfs.core.windows.net/some/model/", file_suffix=".safetensors"
    )
    assert storage.location == "abfs://box@account.dfs.core.windows.net/some/model"
    assert files is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "starts with s3://, s3a://, gs://"),
        ("s3:///x", "not the URL of a checkpoint"),
        ("https://host/..%2F.safetensors", "not a file name"),
        ("az://container/x", "cannot use this URL\n  file: az://container/x\n  found: "),
    ],
)
def test_unusable_urls(url, words, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UsageError) as caught:
        urls.open_url(url, file_suffix=".safetensors")
    assert words in str(caught.value)
