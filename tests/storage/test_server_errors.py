"""What obstore raises: these tests fail when a new version changes its classes or its text."""

from __future__ import annotations

from collections.abc import Iterator

import obstore
import pytest
from obstore.exceptions import (
    BaseError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from mtj_loader.errors import StorageError
from mtj_loader.storage.retry import TRANSIENT_STATUS, RetryPolicy, TransientError
from mtj_loader.storage.server_errors import describe, status_of, translate
from mtj_loader.storage.urls import connect
from tests.support.object_server import Fault, ObjectServer, serve

FAST = RetryPolicy(stalled_seconds=0.2)
CLASSES = {
    401: UnauthenticatedError,
    403: PermissionDeniedError,
    404: FileNotFoundError,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with serve({"m/a.bin": bytes(1000)}) as running:
        yield running


def failure(url: str) -> BaseError | FileNotFoundError:
    """The error of a request for a range of a file."""
    with pytest.raises((BaseError, FileNotFoundError)) as caught:
        obstore.get_range(connect(url, FAST), "a.bin", start=100, end=900)
    return caught.value


@pytest.mark.parametrize("status", [*CLASSES, 400, 410, 416, *sorted(TRANSIENT_STATUS)[:6], 599])
def test_every_status_has_its_class_or_is_in_the_text(server: ObjectServer, status: int):
    server.always["m/a.bin"] = Fault(status=status)
    error = failure(f"{server.url}/m")
    assert type(error) is CLASSES.get(status, GenericError)
    assert status_of(error) == status
    assert describe(error).startswith(f"HTTP {status} ")
    assert describe(error).endswith(": the server says no")
    is_retried = isinstance(translate(error, "a.bin", None), TransientError)
    assert is_retried == (status in TRANSIENT_STATUS)
    assert error.__traceback__ is None  # its frames hold the connection


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(after_bytes=100), "body error"),
        (Fault(after_bytes=100, reset=True), "body error"),
        (Fault(after_bytes=100, stall=True), "no data within the time limit"),
    ],
    ids=["short", "reset", "stalled"],
)
def test_a_broken_body_is_transient(server: ObjectServer, fault: Fault, words: str):
    server.always["m/a.bin"] = fault
    error = failure(f"{server.url}/m")
    assert type(error) is GenericError
    assert status_of(error) is None
    assert words in describe(error)
    assert isinstance(translate(error, "a.bin", None), TransientError)


def test_no_server_is_transient():
    error = failure("http://127.0.0.1:9/m")
    assert describe(error).endswith(": Connection refused")
    assert isinstance(translate(error, "a.bin", None), TransientError)


def test_a_server_without_ranges_is_not_supported(server: ObjectServer):
    server.always["m/a.bin"] = Fault(whole=True)
    error = failure(f"{server.url}/m")
    assert type(error) is NotSupportedError
    assert isinstance(translate(error, "a.bin", None), StorageError)


def test_the_body_of_a_response_does_not_decide():
    """Of an error with a class of its own, and after the status."""
    text = "Server returned non-2xx status code: 400 Bad Request: status code: 503"
    assert isinstance(translate(GenericError(text), "a", None), StorageError)
    refused = PermissionDeniedError("HttpError { kind: Timeout } status code: 503")
    assert isinstance(translate(refused, "a", None), StorageError)
