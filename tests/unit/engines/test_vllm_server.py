"""The engine behind a socket: with a server of ours in vLLM's place, and with vLLM's own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from berth.engines.defaults import NOWHERE
from berth.engines.errors import ApiError
from berth.engines.vllm_server import ExternalServer, command

ROOT = Path(__file__).parents[3]
CONFIG = {"model": "chat", "source": "/models/chat", "gpus": 1, "engine_args": {}, "gpu_memory_utilization": 0.4}
SERVER = """
import json, socketserver, subprocess, sys, time
from http.server import BaseHTTPRequestHandler

subprocess.Popen(["sleep", "600"])  # an engine's process

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self): return "client"
    def do_GET(self): self.whole(200, {})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked.get("max_tokens") == -1:
            self.whole(400, {"error": {"message": "max_tokens must be at least 1", "code": 400, "param": "max_tokens"}})
        elif asked.get("stream"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            # Events torn apart and put together as a network may.
            for piece in ["data: {\\"n\\"", ": 1}\\n\\ndata: {\\"n\\": 2}\\n", "\\ndata: [DO", "NE]\\n\\n"]:
                data = piece.encode()
                self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data)); self.wfile.flush(); time.sleep(0.01)
            self.wfile.write(b"0\\r\\n\\r\\n")
        else:
            self.whole(200, {"path": self.path, "asked": asked})
    def whole(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer): pass
Server(sys.argv[1], Handler).serve_forever()
"""


def words_of(**engine_args: Any) -> list[str]:
    return command({**CONFIG, "engine_args": engine_args}, Path("/run/s"))[3:]


def test_vllms_arguments_as_its_command_line_has_them() -> None:
    found = words_of(
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=2048,
        hf_overrides={"num_hidden_layers": 2},
        middleware=["a", "b"],
        seed=None,
    )
    found = found[2:]  # --allowed-media-domains, see the next one
    assert found[:2] == ["--enforce-eager", "--no-enable-prefix-caching"]
    assert found[2:4] == ["--max-model-len", "2048"]
    assert found[4:6] == ["--hf-overrides", '{"num_hidden_layers": 2}']
    assert found[6:9] == ["--middleware", "a", "b"]
    assert "--seed" not in found


def test_the_plan_decides_where_and_how_much() -> None:
    found = words_of()
    pairs = dict(zip(found[::2], found[1::2], strict=True))
    assert pairs == {
        "--allowed-media-domains": NOWHERE,
        "--model": "/models/chat",
        "--served-model-name": "chat",
        "--tensor-parallel-size": "1",
        "--distributed-executor-backend": "uni",
        "--gpu-memory-utilization": "0.4",
        "--uds": "/run/s",
    }
    assert words_of(allowed_media_domains=["a.example"])[:2] == ["--allowed-media-domains", "a.example"]
    two = command({**CONFIG, "gpus": 2}, Path("/run/s"))
    assert two[two.index("--distributed-executor-backend") + 1] == "mp"
    assert two[two.index("--tensor-parallel-size") + 1] == "2"


def run(body: Callable[[ExternalServer], Awaitable[None]], script: str = SERVER) -> None:
    """``body`` with a server that has started, which is stopped afterwards."""

    async def whole() -> None:
        server = ExternalServer(CONFIG, [sys.executable, "-c", script])
        try:
            await server.start()
            await body(server)
        finally:
            await server.stop()
        assert not server._directory.exists()

    asyncio.run(whole())


async def parts(answer: Awaitable[AsyncIterator[Any]]) -> list[Any]:
    return [part async for part in await answer]


def test_whole_answers_and_streams() -> None:
    async def body(server: ExternalServer) -> None:
        (whole,) = await parts(server.chat({"messages": []}))
        assert whole == {"path": "/v1/chat/completions", "asked": {"messages": []}}
        (whole,) = await parts(server.completions({"prompt": "a"}))
        assert whole["path"] == "/v1/completions"
        (whole,) = await parts(server.responses({"input": "a"}))
        assert whole["path"] == "/v1/responses"
        assert await parts(server.chat({"stream": True})) == ['data: {"n": 1}\n\n', 'data: {"n": 2}\n\n']

    run(body)


def test_the_servers_refusal_is_handed_on() -> None:
    async def body(server: ExternalServer) -> None:
        with pytest.raises(ApiError) as refused:
            await parts(server.chat({"max_tokens": -1}))
        assert (refused.value.status, refused.value.param) == (400, "max_tokens")
        assert "max_tokens must be at least 1" in refused.value.message

    run(body)


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"the vLLM server of chat ended with 3: no such model"):
        run(no_body, "import sys; print('no such model', flush=True); sys.exit(3)")


async def no_body(_server: ExternalServer) -> None:
    raise AssertionError("it started")


def test_a_server_that_dies_leaves_no_engine_behind() -> None:
    async def body(server: ExternalServer) -> None:
        assert server._child.pid is not None
        (engine,) = psutil.Process(server._child.pid).children()
        os.kill(server._child.pid, signal.SIGKILL)
        await server._child.wait()
        assert engine.is_running(), "else there is nothing to try"
        with pytest.raises(RuntimeError, match=r"does not answer \(exit code -9\)"):
            await server.check_health()
        with pytest.raises(ApiError) as away:
            await parts(server.chat({"messages": []}))
        assert away.value.status == 503
        psutil.wait_procs([engine], timeout=5)
        assert not alive(engine)

    run(body)


def alive(process: psutil.Process) -> bool:
    """Running; a zombie that nobody has reaped yet is not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


REPLICA = """
import asyncio, sys
from berth.engines.vllm_server import ExternalServer
async def main():
    server = ExternalServer({config}, {words})
    await server.start()
    print(server._child.pid, server._directory, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_a_killed_replica_takes_its_server_with_it() -> None:
    script = REPLICA.format(config=CONFIG, words=[sys.executable, "-c", SERVER])
    replica = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert replica.stdout is not None
    pid, directory = replica.stdout.readline().split()
    server = psutil.Process(int(pid))
    (engine,) = server.children()
    try:
        replica.kill()
        replica.wait()
        psutil.wait_procs([server], timeout=10)
        assert not alive(server)
    finally:
        # Of vLLM's server this is its own part of a graceful end.
        engine.kill()
        subprocess.run(["rm", "-rf", directory], check=True)


REAL = """
import asyncio, json, os, sys
import psutil
from berth.engines.tiny_models import main as build
from berth.engines.vllm_server import ExternalServer
from pathlib import Path

async def main():
    build(Path(sys.argv[1]))
    arguments = {"max_model_len": 256, "max_num_seqs": 4, "enforce_eager": True, "kv_cache_memory_bytes": 2**25}
    server = ExternalServer({"model": "tiny", "source": sys.argv[1] + "/chat", "gpus": 1, "engine_args": arguments})
    await server.start()
    family = psutil.Process(server._child.pid).children(recursive=True)
    said = {"engines": len(family)}
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    async for part in await server.chat(ask):
        said["whole"] = part
    said["events"] = [part async for part in await server.chat({**ask, "stream": True})]
    respond = {"model": "tiny", "input": "hi", "max_output_tokens": 4}
    async for part in await server.responses(respond):
        said["response"] = part
    said["response_events"] = [part async for part in await server.responses({**respond, "stream": True})]
    async for part in await server.tokenize({"model": "tiny", "prompt": "hi"}):
        said["tokens"] = part
    try:
        async for part in await server.chat({**ask, "max_tokens": 5000}):
            pass
    except Exception as error:
        said["refused"] = [error.status, error.message]
    await server.check_health()
    await server.stop()
    _, alive = psutil.wait_procs(family, timeout=10)
    said["left"] = len(alive)
    print(json.dumps(said))
asyncio.run(main())
"""


@pytest.mark.runtime
def test_vllms_own_server(runtime_python: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [runtime_python, "-c", textwrap.dedent(REAL), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, (time.monotonic() - begun, done.stdout[-1000:], done.stderr[-3000:])
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["engines"] >= 1
    assert said["whole"]["choices"][0]["message"]["role"] == "assistant"
    assert said["whole"]["usage"]["completion_tokens"] >= 1
    assert all(event.startswith("data: {") for event in said["events"])
    assert len(said["events"]) >= 2
    assert said["response"]["object"] == "response"
    assert said["response"]["usage"]["output_tokens"] >= 1
    kinds = [event.split("\n")[0] for event in said["response_events"]]
    assert (kinds[0], kinds[-1]) == ("event: response.created", "event: response.completed")
    assert said["tokens"]["count"] == len(said["tokens"]["tokens"]) >= 1
    assert said["refused"][0] == 400
    assert said["left"] == 0
