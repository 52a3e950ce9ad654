"""An HTTP server on 127.0.0.1 that holds objects, answers ranges, and fails when it is told to."""

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

_PIECE_BYTES = 64 << 10  # what is written at a time, so that rates and faults are finely grained


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Attributes:
      status: answered instead of the object.
      headers: sent along with that status.
      after_bytes: of the body, then `reset`, `stall` or the plain end of the connection.
      reset: the connection is reset.
      stall: nothing more comes, and the connection stays.
      whole: the range is ignored and all of the object is sent.
      etag: what the answer says it is; None: the truth.
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
    """One request that came in: `start` and `stop` are the range asked for, 0 and 0 for none."""

    method: str
    path: str
    start: int
    stop: int
    headers: Mapping[str, str]


@dataclass
class ObjectServer:
    """What the server holds, how it behaves, and what it was asked for.

    Attributes:
      objects: path without its first slash → bytes.
      faults: path → faults of the next GETs of it, in order.
      always: path → the fault of every GET that `faults` does not cover.
      spare_beginnings: GETs from the first byte on are answered right.
      etags: whether answers carry one.
      dates: whether they say when the object last changed.
      latency_seconds: between a request and its answer.
      rates: path → bytes a second of each answer with it.
      bytes_sent: path → bytes of all answers with it.
      requests: all of them, in order of arrival.
      most_active: the most requests that waited for their answers at once.
      connections: that are open now.
      failed_at: when the first answer was wrong, by `time.perf_counter`; 0: none was.
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
        """What goes wrong with the next answer, in most cases nothing."""
        spared = self.spare_beginnings and not request.start
        if request.method != "GET" or spared or not (self.faults | self.always).get(request.path):
            return Fault()
        self.failed_at = self.failed_at or time.perf_counter()
        waiting = self.faults.get(request.path)
        return waiting.popleft() if waiting else self.always.get(request.path, Fault())

    @contextmanager
    def waiting(self, request: Request) -> Iterator[None]:
        """Counts the requests that wait for their answers; who has one may send the next."""
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
    """Runs a server with these objects until the block ends."""
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
    block_on_close = False  # connections that are kept alive end when their client closes them

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients go away in the middle: that is tested here


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
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
        step = min(_PIECE_BYTES, rate // 20) or _PIECE_BYTES  # a slow server is never still
        begun = time.monotonic()
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            with self.state.lock:
                self.state.bytes_sent[path] += len(piece)
            self.wfile.write(piece)
            if rate:
                time.sleep(max(0.0, begun + (start + len(piece)) / rate - time.monotonic()))

    def _client_is_there(self) -> bool:
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _break_off(self, fault: Fault) -> None:
        self.wfile.flush()
        while fault.stall and not self.state.closing.wait(0.01) and self._client_is_there():
            pass
        if fault.reset:  # no lingering: the other side gets RST instead of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
