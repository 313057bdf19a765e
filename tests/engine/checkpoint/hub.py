"""A stand-in for the Hugging Face hub: an HTTP server in this process, and its cache laid out by hand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Hub:
    """Models by name, each with its files, and what was asked of the server."""

    models: dict[str, dict[str, bytes]]
    gated: bool = False
    status: int | None = None
    """Answers with this status only."""
    breaks: set[str] = field(default_factory=set)
    """Files whose first answer breaks off in the middle."""
    url: str = ""
    asked: list[str] = field(default_factory=list)
    """Files that were sent, with the byte from which on."""


class _Answer(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if hub.status is not None:
            return self._send(hub.status)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self._about(found[1], found[2] or "revision", found[3] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(found[1], found[3])
        if found := re.fullmatch(r"/bytes/([^/]+/[^/]+)/(.+)", path):
            return self._bytes(found[2], hub.models[found[1]][found[2]])
        return self._send(404)

    def _about(self, name: str, what: str, revision: str) -> None:
        if name not in self.hub.models:
            return self._send(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.models[name]
        if what == "tree":
            found: Any = [
                {"type": "file", "path": file, "size": len(data), "oid": _digest(data)} for file, data in files.items()
            ]
        else:
            siblings = [{"rfilename": file, "size": len(data), "blobId": _digest(data)} for file, data in files.items()]
            found = {"id": name, "sha": COMMIT, "siblings": siblings}
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def _file(self, name: str, file: str) -> None:
        if self.hub.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        if (data := self.hub.models[name].get(file)) is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(data)}"'}
        if not file.endswith(".safetensors"):
            return self._send(200, about, data)
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # weights come from another server than the hub
        linked = {"X-Linked-Etag": about["ETag"], "X-Linked-Size": str(len(data))}
        return self._send(302, about | linked | {"Location": f"{elsewhere}/bytes/{name}/{file}"})

    def _bytes(self, file: str, data: bytes) -> None:
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.command == "GET":
            self.hub.asked.append(f"{file} {first}")
        part = data[first:]
        about = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if first else {}
        if file in self.hub.breaks and self.command == "GET":
            self.hub.breaks.discard(file)
            self._send(200, about, part[: len(part) // 2], len(part))
            self.close_connection = True
            return
        self._send(206 if first else 200, about, part)

    def _send(
        self, status: int, headers: Mapping[str, str] | None = None, data: bytes = b"", length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub while it answers at its `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lay_out(cache: Path, name: str, files: dict[str, bytes], revision: str = "main", commit: str = COMMIT) -> Path:
    """Put a model into a cache as huggingface_hub does: blobs, a reference, and a snapshot of links."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    for file, data in files.items():
        blob = home / "blobs" / _digest(data)
        blob.write_bytes(data)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
