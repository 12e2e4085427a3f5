"""Ray's dashboard in small: a real HTTP server that gives Ray's REST answers and remembers what it was told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "let-me-in"


@dataclass
class Dashboard:
    """``answers`` overrides a path's answer with (status, body); ``slow_s`` is what every answer takes."""

    applications: dict[str, Any] = field(default_factory=dict)
    nodes: list[Mapping[str, Any]] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    token: str = TOKEN
    slow_s: float = 0.0
    puts: list[dict[str, Any]] = field(default_factory=list)
    queries: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    address: str = ""

    def answer(self, method: str, url: str, authorization: str, body: bytes) -> tuple[int, str]:
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.queries.append((parts.path, query))
        time.sleep(self.slow_s)
        if self.token and authorization != f"Bearer {self.token}":
            return 401, "Unauthorized: missing or invalid token"
        if parts.path in self.answers:
            return self.answers[parts.path]
        if (method, parts.path) == ("GET", "/api/serve/applications/"):
            return 200, json.dumps({"proxy_location": "EveryNode", "applications": self.applications})
        if (method, parts.path) == ("PUT", "/api/serve/applications/"):
            self.puts.append(json.loads(body))
            return 200, ""
        if (method, parts.path) == ("GET", "/api/v0/nodes"):
            result = {"total": len(self.nodes), "num_after_truncation": len(self.nodes), "result": self.nodes}
            return 200, json.dumps({"result": True, "msg": "", "data": {"result": result}})
        if (method, parts.path) == ("GET", "/api/v0/logs/file"):
            found = self.logs.get(query["filename"])
            return (200, found) if found is not None else (500, "no such file")
        return 404, "Not Found"

    def serve(self) -> ThreadingHTTPServer:
        """Start it on a free port of this machine; the caller stops it."""
        dashboard = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                authorization = self.headers.get("Authorization", "")
                status, text = dashboard.answer(self.command, self.path, authorization, body)
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = _answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{server.server_port}"
        return server
