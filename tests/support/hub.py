"""A minimal Hugging Face hub on 127.0.0.1 for huggingface_hub.

Optionally redirects requests for files to signed addresses, which expire.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

_API = re.compile(r"/api/models/(?P<id>.+?)/(?P<kind>revision|tree)/(?P<revision>[^/?]+)")
_SIGNED = re.compile(r"/cdn/(?P<id>.+)/-/(?P<file>[^?]+)\?sig=(?P<signature>.+)")
_RESOLVE = re.compile(r"/(?P<id>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """The server's contents, behavior and requests."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)  # id → file → bytes
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)  # id → status, X-Error-Code
    fetched: list[str] = field(default_factory=list)  # a file name for every GET of a file
    url: str = ""
    redirects: bool = False  # to `other_host`, as for large files
    refused: int = 0  # how many of the next requests fail, with this status:
    refusal: int = 503
    refused_path: str = ""  # only requests for paths that contain this
    uses: int = 10**9  # of a signature; after them its address returns 403
    signatures: dict[str, int] = field(default_factory=dict)  # signature → uses left
    tokens: dict[str, set[str]] = field(default_factory=dict)  # host → Authorization headers seen

    @property
    def other_host(self) -> str:
        """The same server under another name, which clients treat as another host."""
        return self.url.replace("127.0.0.1", "localhost")

    def signed(self, repo_id: str, file: str) -> str:
        """A fresh address of a file; its signature has characters that must not be re-encoded."""
        signature = f"a/b+c%2F=={len(self.signatures)}"
        self.signatures[signature] = self.uses
        path = quote(f"/cdn/{repo_id}/-/{file}")
        return f"{self.other_host}{path}?sig={quote(signature, safe='')}"

    def commit(self, repo_id: str) -> str:
        """The only commit of a repository, which depends on its contents."""
        digest = hashlib.sha1()
        for name, data in sorted(self.repositories[repo_id].items()):
            digest.update(f"{name} {len(data)} ".encode() + data)
        return digest.hexdigest()


@contextmanager
def serve(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """Runs a hub with these repositories during the block."""
    hub = Hub({repo_id: dict(files) for repo_id, files in repositories.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):  # HTTP/1.0: no connection outlives the server
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path)
        seen = self.hub.tokens.setdefault(self.headers["Host"].partition(":")[0], set())
        seen.add(self.headers.get("Authorization", ""))
        if match := _SIGNED.fullmatch(path):
            self._answer_signed(match["id"], match["signature"], match["file"])
        elif match := _API.match(path):
            self._answer_api(match["id"], match["kind"], match["revision"])
        elif match := _RESOLVE.fullmatch(path):
            self._answer_file(match["id"], match["revision"], match["file"])
        else:
            self._send(404)

    def _refused(self, repo_id: str, revision: str) -> bool:
        status, code = self.hub.failures.get(repo_id, (0, ""))
        if not status and repo_id not in self.hub.repositories:
            status, code = 404, "RepoNotFound"
        if not status and revision not in ("main", self.hub.commit(repo_id)):
            status, code = 404, "RevisionNotFound"
        if status:
            self._send(status, headers={"X-Error-Code": code} if code else {})
        return bool(status)

    def _fails(self) -> bool:
        if fails := self.hub.refused > 0 and self.hub.refused_path in self.path:
            self.hub.refused -= 1
            self._send(self.hub.refusal)
        return fails

    def _answer_api(self, repo_id: str, kind: str, revision: str) -> None:
        if self._refused(repo_id, revision) or self._fails():
            return
        files = self.hub.repositories[repo_id]
        if kind == "tree":
            answer: object = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repo_id, "sha": self.hub.commit(repo_id), "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, repo_id: str, revision: str, file: str) -> None:
        if self._refused(repo_id, revision):
            return
        data = self.hub.repositories[repo_id].get(file)
        if data is None:
            self._send(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        if self._fails():
            return
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": self.hub.commit(repo_id)}
        if self.hub.redirects and file.endswith(".safetensors"):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": headers["ETag"]}
            self._send(302, b"", headers | {"Location": self.hub.signed(repo_id, file)})
            return
        self._send_file(file, data, headers)

    def _answer_signed(self, repo_id: str, signature: str, file: str) -> None:
        self.hub.signatures[signature] = self.hub.signatures.get(signature, 0) - 1
        if self.hub.signatures[signature] < 0:
            self._send(403, b"Request has expired")
            return
        data = self.hub.repositories[repo_id][file]
        self._send_file(file, data, {"ETag": f'"cdn-{_etag(data)}"'})

    def _send_file(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        if self.command == "GET":
            self.hub.fetched.append(file)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, data[first : last + 1], headers)
        else:
            self._send(200, data, headers)

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
