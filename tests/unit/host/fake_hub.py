"""A hub on localhost: the endpoints that huggingface_hub asks for a snapshot, over files in memory.

``pause_s`` waits between blocks of a file, so that a download can be watched or interrupted; ``token`` is asked for
where it is set. ``asked`` lists the files that were downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 64 * 1024


@dataclass
class FakeHub:
    repos: dict[str, dict[str, bytes]]
    token: str = ""
    pause_s: float = 0.0
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body)
                path = self.path.split("?")[0]
                if match := re.fullmatch(r"/api/models/(.+)/revision/main", path):
                    return self.repo(match[1], {"id": match[1], "sha": COMMIT, "siblings": []}, body)
                if match := re.fullmatch(r"/api/models/(.+)/tree/\w+", path):
                    return self.repo(match[1], hub.tree(match[1]), body)
                if match := re.fullmatch(r"/(.+)/resolve/\w+/(.+)", path):
                    return self.file(match[1], match[2], body)
                self.send(404, b"{}", {}, body)

            def repo(self, name: str, data: Any, body: bool) -> None:
                if name not in hub.repos:
                    return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
                self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"}, body)

            def file(self, name: str, path: str, body: bool) -> None:
                content = hub.repos[name][path]
                if body:
                    hub.asked.append(path)
                self.send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(content)}"'}, body)

            def send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
                self.send_response(code)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                for at in range(0, len(content) if body else 0, BLOCK):
                    try:
                        self.wfile.write(content[at : at + BLOCK])
                    except OSError:
                        return
                    if len(content) > BLOCK:
                        time.sleep(hub.pause_s)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def tree(self, repo: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in sorted(self.repos.get(repo, {}).items())
        ]


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
