"""An HTTP server on 127.0.0.1 with objects, range requests, and faults on demand."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_PIECE_BYTES = 64 << 10  # written at a time; small, so that rates and faults are precise


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one response.

    Attributes:
      status: sent instead of the object.
      headers: sent along with that status.
      after_bytes: length of the body before `reset`, `stall` or a normal close.
      reset: the connection is reset.
      stall: no more data is sent, and the connection stays open.
      whole: the range is ignored and the whole object is sent.
      etag: sent instead of the correct one.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int | None = None
    reset: bool = False
    stall: bool = False
    whole: bool = False
    etag: str | None = None


@dataclass(frozen=True)
class Request:
    """A received request: `start` and `stop` are its range, 0 and 0 if it has none."""

    method: str
    path: str
    start: int
    stop: int
    headers: Mapping[str, str]


@dataclass
class ObjectServer:
    """The server's contents, behavior and requests.

    Attributes:
      objects: path without leading slash → bytes.
      faults: path → faults of its next GETs, in order.
      always: path → the fault of every GET that `faults` does not cover.
      spare_beginnings: no faults for GETs that start at byte 0.
      etags: whether responses have one.
      dates: whether responses have a modification time.
      latency_seconds: between a request and its response.
      rates: path → bytes per second of each of its responses.
      bytes_sent: path → bytes of all its responses.
      requests: in order of arrival.
      most_active: the most requests that waited for responses at once.
      connections: currently open.
      failed_at: `time.perf_counter` at the first fault, 0 if there was none.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, deque[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    spare_beginnings: bool = False
    etags: bool = True
    dates: bool = True
    latency_seconds: float = 0.0
    rates: dict[str, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    connections: int = 0
    failed_at: float = 0.0
    bytes_sent: Counter[str] = field(default_factory=Counter)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def gets(self, path: str) -> list[Request]:
        """The GETs of one object."""
        return [r for r in self.requests if r.method == "GET" and r.path == path]

    def fault(self, request: Request) -> Fault:
        """The fault of the next response, by default none."""
        spared = self.spare_beginnings and not request.start
        if request.method != "GET" or spared or not (self.faults | self.always).get(request.path):
            return Fault()
        self.failed_at = self.failed_at or time.perf_counter()
        waiting = self.faults.get(request.path)
        return waiting.popleft() if waiting else self.always.get(request.path, Fault())

    @contextmanager
    def waiting(self, request: Request) -> Iterator[None]:
        """Counts a request as waiting, until the response starts."""
        with self.lock:
            self.requests.append(request)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            yield
        finally:
            with self.lock:
                self.active -= 1


@contextmanager
def serve(objects: Mapping[str, bytes], **behavior: object) -> Iterator[ObjectServer]:
    """Runs a server with these objects during the block."""
    state = ObjectServer(dict(objects), **behavior)  # pyright: ignore[reportArgumentType]
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


_CHANGED = 1_700_000_000  # 14 November 2023


@lru_cache(maxsize=64)
def _etag(data: bytes) -> str:
    return f'"{hashlib.sha1(data).hexdigest()}"'


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # many connections at once
    daemon_threads = True
    block_on_close = False  # clients close connections that are kept alive

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that disconnect early are part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    state: ObjectServer

    def setup(self) -> None:
        super().setup()
        with self.state.lock:
            self.state.connections += 1

    def finish(self) -> None:
        with self.state.lock:
            self.state.connections -= 1
        super().finish()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        start, stop = self._range(len(self.state.objects.get(path, b"")))
        request = Request(self.command, path, start, stop, dict(self.headers.items()))
        with self.state.waiting(request):
            time.sleep(self.state.latency_seconds)
        self._answer(request, self.state.fault(request))

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _range(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, 0)

    def _answer(self, request: Request, fault: Fault) -> None:
        path = request.path
        data = self.state.objects.get(path)
        if fault.status is not None or data is None:
            self._send(path, fault.status or 404, b"the server says no", fault.headers)
            return
        etag = fault.etag or _etag(data)
        headers = {"Last-Modified": formatdate(_CHANGED, usegmt=True)} if self.state.dates else {}
        headers |= {"ETag": etag} if self.state.etags else {}
        if self.headers.get("If-Match", etag) != etag:
            self._send(path, 412, b"", headers)
        elif request.start == request.stop or fault.whole:
            self._send(path, 200, data, headers, fault)
        else:
            headers["Content-Range"] = f"bytes {request.start}-{request.stop - 1}/{len(data)}"
            self._send(path, 206, data[request.start : request.stop], headers, fault)

    def _send(
        self,
        path: str,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        fault: Fault = Fault(),
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(path, memoryview(body)[: fault.after_bytes])
            if fault.after_bytes is not None:
                self._break_off(fault)

    def _write(self, path: str, body: memoryview) -> None:
        rate = self.state.rates.get(path, 0)
        step = min(_PIECE_BYTES, rate // 20) or _PIECE_BYTES  # slow servers send often
        started = time.monotonic()
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            with self.state.lock:
                self.state.bytes_sent[path] += len(piece)
            self.wfile.write(piece)
            if rate:
                time.sleep(max(0.0, started + (start + len(piece)) / rate - time.monotonic()))

    def _is_connected(self) -> bool:
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _break_off(self, fault: Fault) -> None:
        self.wfile.flush()
        while fault.stall and not self.state.closing.wait(0.01) and self._is_connected():
            pass
        if fault.reset:  # the client gets RST instead of a normal close
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
