"""What a careless or hostile client sends, straight to Serve's proxies, and what of it must not stay."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.cluster import Cluster

CHAT = "/v1/chat/completions"
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}
REFUSED: tuple[tuple[str, Any, int, str | None], ...] = (
    (CHAT, {**ASK, "model": "nobody"}, 404, "model_not_found"),
    (CHAT, {**ASK, "model": "chat:nobody"}, 404, "model_not_found"),
    (CHAT, {**ASK, "messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context_length_exceeded"),
    (CHAT, {**ASK, "response_format": SCHEMA}, 400, None),
    (CHAT, {**ASK, "response_format": SCHEMA, "stream": True}, 400, None),
    (CHAT, b'{"model": ', 400, None),
    (CHAT, {"model": "chat", "messages": "hi"}, 400, None),
    ("/v1/embeddings", {"model": "chat", "input": "hi"}, 400, None),
    ("/tokenize", {"model": "nobody", "prompt": "hi"}, 404, "model_not_found"),
    ("/v1/nothing", {}, 404, None),
)
"""Path, body, status, and OpenAI's code."""


def send(port: int, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return exchange(port, head(path, len(data)), [data])


def head(path: str, length: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}")
    return "\r\n".join((*lines, "", "")).encode()


def exchange(port: int, first: bytes, parts: Sequence[bytes]) -> tuple[int, dict[str, Any]]:
    """Send until everything is sent or an answer is there, as a browser does with a large upload."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(first)
        for part in parts:
            if select.select([client], [], [], 0)[0]:
                break
            client.sendall(part)
        answer = b""
        while b"\r\n\r\n" not in answer or len(answer.partition(b"\r\n\r\n")[2]) < _length(answer):
            more = client.recv(1 << 16)
            assert more, f"the connection ended after {answer!r}"
            answer += more
    return int(answer[9:12]), json.loads(answer.partition(b"\r\n\r\n")[2])


def _length(answer: bytes) -> int:
    lines = answer.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    return next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))


def too_large(port: int) -> tuple[int, dict[str, Any]]:
    """A body of 100 MB."""
    part = b" " * 1_000_000
    return exchange(port, head(CHAT, 100 * len(part)), [part] * 100)


def slow_clients(port: int, others: Any, count: int = 20) -> None:
    """Clients that never come to the end of their header or body, while ``others()`` asks."""
    with ExitStack() as stack:
        for number in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            client.sendall(head(CHAT, 1000)[: 40 if number % 2 else None])
        others()


def hang_up(port: int) -> None:
    """Leave in the middle of a stream."""
    body = json.dumps({**ASK, "max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(head(CHAT, len(body)) + body)
        assert client.recv(1 << 12).startswith(b"HTTP/1.1 200")


def held(cluster: Cluster) -> dict[str, int]:
    """What clients could leave behind: connections of the proxies, open files, requests, VRAM by the driver (MiB)."""
    port = cluster.port_base + 5
    (gateway,) = cluster.replicas()["berth-gateway"].values()
    proxies = [item.pid for item in cluster.processes() if "ProxyActor" in " ".join(psutil.Process(item.pid).cmdline())]
    assert proxies
    found = {f"files of {pid}": psutil.Process(pid).num_fds() for pid in (gateway, *proxies)}
    for pid in proxies:
        connections = psutil.Process(pid).net_connections("tcp")
        open_ones = [item for item in connections if item.status != psutil.CONN_LISTEN and item.laddr.port == port]
        found[f"connections of {pid}"] = len(open_ones)
    found["requests"] = sum(cluster.api("/healthz", headers={"Connection": "close"}).json()["outstanding"].values())
    return found | {f"VRAM of {uuid}": gpu["used"] for uuid, gpu in cluster.nvml().items()}


def write_adapter(directory: Path, hidden: int = 64, query: int = 64, layers: int = 2, rank: int = 8) -> None:
    """A LoRA adapter of the tiny chat model, far from zero, in the format of peft; written by hand, since neither peft
    nor safetensors is among the tests' packages."""
    directory.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "chat",
        "r": rank,
        "lora_alpha": 4 * rank,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    data = b""
    for layer in range(layers):
        for module, wide, out in (("q_proj", hidden, query), ("o_proj", query, hidden)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("lora_A", (rank, wide)), ("lora_B", (out, rank))):
                count = shape[0] * shape[1]
                values = [((7 * number + layer) % 11 - 5) / 2 for number in range(count)]
                packed = struct.pack(f"<{count}f", *values)
                span = [len(data), len(data) + len(packed)]
                header[f"{name}.{part}.weight"] = {"dtype": "F32", "shape": list(shape), "data_offsets": span}
                data += packed
    text = json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
