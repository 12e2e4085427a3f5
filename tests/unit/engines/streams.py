"""Many streams at once from one process: HTTP/1.1 spoken by hand, because a client library takes ten times as long."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    """One request whose answer is read event by event."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    body: str = ""
    """Of an answer that is no stream."""

    @property
    def done(self) -> bool:
        return bool(self.events) and self.events[-1] == "[DONE]"

    @property
    def error(self) -> dict[str, Any] | None:
        """The error event of the stream, where there is one."""
        found = [json.loads(event)["error"] for event in self.events if event.startswith('{"error"')]
        return found[0] if found else None

    async def next(self) -> bool:
        """Read until another event is there; False at the end of the answer."""
        while line := await self.reader.readline():
            if line.startswith(b"data: "):
                self.events.append(line[6:].decode().strip())
                return True
            if line == b"0\r\n":
                return False
        return False

    async def rest(self) -> Stream:
        while await self.next():
            pass
        self.close()
        return self

    def close(self) -> None:
        self.writer.close()


async def open_stream(
    port: int, model: str, path: str = "/v1/chat/completions", session: str = "", **more: Any
) -> Stream:
    """Ask for a stream and wait for its status and first event; ``session``: its header x-session-id."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}], "stream": True, **more}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: berth\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    named = f"X-Session-Id: {session}\r\n" if session else ""
    writer.write(f"{head}{named}\r\n".encode() + data)
    stream = Stream(reader, writer, int((await reader.readline()).split()[1]))
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(": ")
        stream.headers[name.lower()] = value
    if stream.status == 200:
        await stream.next()
    else:
        stream.body = (await reader.readexactly(int(stream.headers["content-length"]))).decode()
    return stream
