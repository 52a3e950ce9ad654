"""Faults of object stores: a server on this machine fails as stores do.

It serves the small checkpoint slowly. Requests for headers at the start of files succeed, so the
faults hit a load that is reading weights.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from pathlib import Path

from benchmarks.faults.fault import FIXTURE, Fault, Outcome, command, outcome
from tests.support import object_server
from tests.support.object_server import ObjectServer, serve

_FILE = "model/model-00002-of-00002.safetensors"
_BYTES_PER_SECOND = 1_000_000  # per connection; ranges of the other file take at least a second

Answer = object_server.Fault


def _run(answers: list[Answer], always: bool, scratch: Path) -> Outcome:
    """Loads while ranges of one file get these answers: each once, or the first one always."""
    objects = {f"model/{path.name}": path.read_bytes() for path in FIXTURE.iterdir()}
    rates = dict.fromkeys(objects, _BYTES_PER_SECOND)
    with serve(objects, rates=rates, spare_beginnings=True) as server:
        server.always = {_FILE: answers[0]} if always else {}
        server.faults = {} if always else {_FILE: deque(answers)}
        running = command(scratch, "load", f"{server.url}/model", "--mesh", "mp=1")
        running.wait_for(lambda: server.failed_at)
        return outcome([running], server.failed_at, lambda: _connections(server))


def _connections(server: ObjectServer) -> list[str]:
    """Connections that the ended client left open."""
    deadline = time.perf_counter() + 2
    while server.connections and time.perf_counter() < deadline:
        time.sleep(0.01)
    return [f"{server.connections} connections"] if server.connections else []


_RESET, _SHORT = Answer(after_bytes=1000, reset=True), Answer(after_bytes=1000)
_TEMPORARY = {
    "503, twice": [Answer(status=503)] * 2,
    "429 with Retry-After, once": [Answer(status=429, headers={"Retry-After": "1"})],
    "connection reset in the body, twice": [_RESET] * 2,
    "body ends early, once": [_SHORT],
    "body stalls, once": [Answer(after_bytes=1000, stall=True)],
}
_PERMANENT = {
    "403": Answer(status=403),
    "404: the object is gone": Answer(status=404),
    "another etag: the object was replaced": Answer(etag='"another"'),
    "200 and the whole file for a range": Answer(whole=True),
    "429, always": Answer(status=429),
    "500, always": Answer(status=500),
    "connection reset in the body, always": _RESET,
    "body ends early, always": _SHORT,
    "body stalls, always": Answer(after_bytes=1000, stall=True),
}

FAULTS = [
    *(Fault(name, "streaming", partial(_run, [a], True)) for name, a in _PERMANENT.items()),
    *(
        Fault(name, "streaming; temporary", partial(_run, a, False))
        for name, a in _TEMPORARY.items()
    ),
]
