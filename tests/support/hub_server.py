"""A hub on loopback: the part of the protocol that pushing and fetching small files needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(BaseHTTPRequestHandler):
    """Repositories of models as files in memory: name → path → content. Every push is a commit on main."""

    repositories: dict[str, dict[str, bytes]] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, content: bytes = b"", code: int = 200, head: bool = False, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def data(self, content: Any, code: int = 200) -> None:
        self.answer(json.dumps(content).encode(), code, Content_Type="application/json")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization") or "me", request["name"])))
            self.repositories.setdefault(name, {})
            return self.data({"url": f"{self.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.data({"errors": [], "warnings": []})
        name = re.match(r"/api/models/([^/]+/[^/]+)/", self.path)[1]  # type: ignore[index]
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return self.data({"files": [{"path": file["path"], **regular} for file in files]})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"{self.url}/{name}/commit/{self.commit(name)}"
            return self.data({"commitUrl": address, "commitOid": self.commit(name), "pullRequestUrl": None})
        self.data({"error": "unknown"}, 404)

    def do_GET(self, head: bool = False) -> None:
        match = re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/?]+)?(?:\?.*)?$", self.path)
        if match:
            files = self.repositories.get(match[1])
            if files is None:
                return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            siblings = [{"rfilename": path} for path in files]
            return self.data({"id": match[1], "modelId": match[1], "sha": self.commit(match[1]), "siblings": siblings,
                              "private": False, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
        match = re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path)
        if match:
            contents = self.repositories.get(match[1], {}).items()
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in contents
            ]
            return self.data(listed)
        match = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
        content = self.repositories.get(match[1], {}).get(match[2]) if match else None
        if match is None or content is None:
            return self.answer(b"", 404, head, X_Error_Code="EntryNotFound")
        tag = hashlib.sha1(content).hexdigest()
        self.answer(content, 200, head, ETag=f'"{tag}"', X_Repo_Commit=self.commit(match[1]))

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    @property
    def url(self) -> str:
        address: Any = self.server.server_address
        return f"http://127.0.0.1:{address[1]}"

    def commit(self, name: str) -> str:
        whole = b"".join(path.encode() + content for path, content in sorted(self.repositories[name].items()))
        return hashlib.sha1(whole).hexdigest()


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Yield the endpoint and its repositories."""
    kind = type("OneHub", (Hub,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", kind.repositories  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
