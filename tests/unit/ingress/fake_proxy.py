"""A Serve proxy's place: answers by path, counts what it is asked, and notices when it is left."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any


class FakeProxy:
    """Listens on ``address:port`` in a thread of its own until it is stopped."""

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port = address, port
        self.asked: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.open = 0
        self.healthy = True
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()

    def start(self) -> None:
        self._in_loop(self._start()).result(10)

    def stop(self) -> None:
        """As by a kill: nobody listens, every connection is gone."""
        self._in_loop(self._stop()).result(10)

    def _in_loop(self, work: Any) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._accept, self.address, self.port)

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open += 1
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort() if task.cancelling() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = first.split()[1].partition("?")[0]
        self.asked[path] += 1
        handler = getattr(self, "_" + path.strip("/").replace("/", "_"), self._echo)
        await handler(reader, writer, headers, body)

    async def _echo(self, _reader: Any, writer: asyncio.StreamWriter, headers: dict[str, str], body: bytes) -> None:
        await say(writer, 200, {"host": self.address, "headers": headers, "bytes": len(body)})

    async def _healthz(self, _reader: Any, writer: asyncio.StreamWriter, *_: Any) -> None:
        await say(writer, 200 if self.healthy else 503, {"models": {"secret-model": ["secret-model@gpu01-0"]}})

    async def _v1_busy(self, _reader: Any, writer: asyncio.StreamWriter, *_: Any) -> None:
        await say(writer, 503, {"error": {"message": "from Serve"}})

    async def _v1_break(self, _reader: Any, writer: asyncio.StreamWriter, *_: Any) -> None:
        writer.transport.abort()

    async def _v1_slow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *_: Any) -> None:
        await self._wait(reader, "/v1/slow", 1.5)
        await say(writer, 200, {"host": self.address})

    async def _v1_silent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *_: Any) -> None:
        await self._wait(reader, "/v1/silent", 4.0)
        await say(writer, 200, {"host": self.address})

    _v1_jobs_silent = _v1_silent

    async def _wait(self, reader: asyncio.StreamReader, path: str, seconds: float) -> None:
        """Until the time is over; who leaves before is counted."""
        try:
            await asyncio.wait_for(reader.read(1), seconds)
        except TimeoutError:
            return
        self.left[path] += 1
        raise ConnectionResetError

    async def _v1_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *_: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for number in range(10):
            writer.write(f"data: {number}\n\n".encode())
            await writer.drain()
            await self._wait(reader, "/v1/stream", 0.2)

    async def _v1_socket(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *_: Any) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        writer.write(await reader.readexactly(5))
        await writer.drain()


async def say(writer: asyncio.StreamWriter, status: int, data: Any) -> None:
    body = json.dumps(data).encode()
    head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    await writer.drain()
