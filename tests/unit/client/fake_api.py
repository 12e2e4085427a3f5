"""A small OpenAI-like server on 127.0.0.1: the light engine behind Python's own HTTP server, and what tests tell it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from berth.engines.errors import ApiError, full, unknown
from berth.engines.light import LightServer
from berth.engines.routes import Routes

METHODS = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1/embeddings": "embeddings"}


class FakeApi(ThreadingHTTPServer):
    """``busy``: how many requests are answered 429 first. A prompt with the word ``fail`` is refused, and one that
    holds JSON in ``say`` is answered with it. ``keys``: the API keys that came; ``peak``: most requests at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.busy, self.retry_after_s = 0, retry_after_s
        self.peak = self.now = 0
        self.keys: set[str] = set()
        self.say: str | None = None
        self.delay_s = 0.0
        self.lock = threading.Lock()
        light = LightServer({"model": "chat", "gpus": 1, "vram_mib": 100, "engine_args": {"dimensions": 8}})
        self.routes = Routes(lambda _model, _app: _Handle(light))
        berth = {"app": "chat@here", "replicas": 1, "adapters": ["sql"]}
        self.routes.take({"models": {name: {"berths": [berth]} for name in ("chat", "embedding", "rerank")}})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handle:
    """Serve's handle as far as Routes needs it."""

    def __init__(self, light: LightServer) -> None:
        self._light = light

    def __getattr__(self, method: str) -> Any:
        class Method:
            def remote(_, *args: Any) -> Any:
                return self._parts(method, *args)

        return Method()

    async def _parts(self, method: str, *args: Any) -> Any:
        async for part in await getattr(self._light, method)(*args):
            yield part


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "berth"} for name in self.server.routes.ids()]
        self._send(200, {"object": "list", "data": data})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.keys.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
            self.server.now += 1
            self.server.peak = max(self.server.peak, self.server.now)
            busy, self.server.busy = self.server.busy > 0, max(0, self.server.busy - 1)
        try:
            time.sleep(self.server.delay_s)
            if busy:
                raise ApiError(*full("chat").args[:4], self.server.retry_after_s)
            self._answer(body)
        except ApiError as error:
            self._send(error.status, error.body(), error.headers())
        finally:
            with self.server.lock:
                self.server.now -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        if "fail" in str(body.get("messages") or body.get("input")):
            raise ApiError(400, "The engine refused the request.")
        if self.path == "/v1/rerank":
            self._rerank(body)
            return
        if self.path not in METHODS:
            raise unknown(self.path)
        parts = self._parts(body["model"], METHODS[self.path], body)
        if isinstance(parts[0], str):
            self._stream(parts)
            return
        if self.server.say is not None:
            parts[0]["choices"][0]["message"]["content"] = self.server.say
        self._send(200, parts[0])

    def _rerank(self, body: dict[str, Any]) -> None:
        request = {"model": body["model"], "text_1": body["query"], "text_2": body["documents"]}
        (scored,) = self._parts(body["model"], "score", request)
        rows = sorted(scored["data"], key=lambda row: (-row["score"], row["index"]))[: body.get("top_n")]
        results = [{"index": row["index"], "relevance_score": row["score"]} for row in rows]
        self._send(200, {"id": scored["id"], "results": results, "usage": scored["usage"]})

    def _parts(self, model: str, method: str, body: dict[str, Any]) -> list[Any]:
        async def run() -> list[Any]:
            return [part async for part in self.server.routes.answer(model, method, body)]

        return asyncio.run(run())

    def _stream(self, events: list[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write("".join([*events, "data: [DONE]\n\n"]).encode())
        self.close_connection = True

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[FakeApi]:
    server = FakeApi()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
