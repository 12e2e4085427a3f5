"""A replica over several slots: one Serve app with a deployment per slot, vLLM's own multi-node executor between them.

The first slot's deployment is the replica proper. It asks each of the others, over a Serve handle, to join as a node:
the node starts its workers and keeps the request open for as long as they run. So the one that leads learns of a
node's end, and a node is not stopped while the replica that leads still answers. The other way round there is a TCP
connection: a request does not end with whoever made it, a connection does; and a byte over it says that the engine is
up, until when a node keeps its GPU's lock. No placement group: each part is in its slot, like any replica
(docs/decisions/0026).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from berth.engines.child import Child
from berth.engines.gpu_lock import gpu_locks
from berth.engines.start_errors import explain, planned_of

JOINED = "joined"
HOST_IP = "VLLM_HOST_IP"
"""Where vLLM looks for the address that its other nodes reach it at."""
READY = b"r"
STOP_S = 5.0
POLL_S = 0.5
JOIN_TIMEOUT_S = 600.0
"""For a node's replica to be there and to get its GPU's lock; its engine has no limit of its own."""


class TeamNode:
    """The deployment of every slot but the first: workers of an engine whose API is elsewhere."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._directory = Path(tempfile.mkdtemp(prefix="berth-"))
        self._child: Child | None = None
        self._turn = asyncio.Event()
        """Set when somebody else leads."""
        self._held: Any = None

    async def join(self, node: dict[str, Any], lead: tuple[str, int]) -> AsyncIterator[str]:
        """Be ``node`` (vLLM's ``nnodes``, ``node_rank``, ``master_addr``, ``master_port``) of the engine of the
        replica that listens at ``lead``: yields JOINED once the workers start, and goes on while both are there.

        Raises:
            RuntimeError: the workers ended, with the end of what they said.
        """
        # The replica that led before is gone, or nobody would ask again.
        self._turn.set()
        self._turn = turn = asyncio.Event()
        if self._child is not None:
            await self._child.stop(STOP_S)
        link, writer = await asyncio.open_connection(*lead)
        ready = asyncio.Event()
        ends = [asyncio.ensure_future(_gone(link, ready)), asyncio.ensure_future(turn.wait())]
        try:
            if self._config["engine"] == "light":
                await self._hold()
                yield JOINED
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                return
            async for said in self._work(node, ready, ends):
                yield said
        finally:
            writer.close()
            for end in ends:
                end.cancel()

    async def _work(
        self, node: dict[str, Any], ready: asyncio.Event, ends: Sequence[asyncio.Future[Any]]
    ) -> AsyncIterator[str]:
        self._child = child = Child(self._directory / f"log-{node['master_port']}")
        words = [sys.executable, "-m", "berth.engines.team_workers"]
        try:
            async with gpu_locks():
                await child.start([*words, json.dumps({**self._config, "node": node})], {HOST_IP: own_address()})
                yield JOINED
                while child.returncode is None and not ready.is_set() and not any(end.done() for end in ends):
                    await asyncio.sleep(POLL_S)
            ended = asyncio.ensure_future(child.wait())
            await asyncio.wait([ended, *ends], return_when=asyncio.FIRST_COMPLETED)
            if any(end.done() for end in ends):
                return
            told = explain(child.text(), planned_of(self._config))
            raise RuntimeError(str(told) if told else f"ended with exit code {child.returncode}: {child.tail()}")
        finally:
            # Nobody waits for what it would still compute.
            child.kill()

    async def _hold(self) -> None:
        from berth.engines.light import LightServer

        if self._held is None:
            self._held = LightServer(self._config)
            await self._held.start()

    def __del__(self) -> None:
        if self._child is not None:
            self._child.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


async def _gone(link: asyncio.StreamReader, ready: asyncio.Event) -> None:
    """Until whoever leads is gone; sets ``ready`` when he says that the engine is up."""
    while await link.read(1):
        ready.set()


class Team:
    """The nodes of a replica, as the one that leads sees them."""

    _door: socket.socket

    def __init__(self, config: dict[str, Any], nodes: Sequence[Any]) -> None:
        """``nodes``: Serve handles of the TeamNodes, in the order of ``config["team"]`` from its second slot on."""
        self._slots = list(config["team"])
        self._across = str(config["across_slots"])
        self._links: list[socket.socket] = []
        self._nodes = list(nodes)
        self.failed: str | None = None
        """Why the team is no more."""

    async def gather(self) -> dict[str, Any]:
        """Have every node join; what vLLM has to know to lead them.

        Raises:
            RuntimeError: a node could not join.
        """
        address = os.environ[HOST_IP] = own_address()
        lead = {"nnodes": len(self._slots), "master_addr": address, "master_port": free_port(address)}
        if self._across == "data":
            lead |= {"data_parallel_address": address, "data_parallel_rpc_port": free_port(address)}
        self._door = socket.create_server((address, 0), family=_family(address), backlog=len(self._nodes))
        threading.Thread(target=self._let_in, daemon=True).start()
        joined = [threading.Event() for _ in self._nodes]
        for rank, handle in enumerate(self._nodes, 1):
            # A thread each: the engine's start keeps the replica's own loop busy for minutes.
            threading.Thread(
                target=self._follow, args=(handle, {**lead, "node_rank": rank}, joined[rank - 1]), daemon=True
            ).start()
        for event, slot in zip(joined, self._slots[1:], strict=True):
            if not await asyncio.to_thread(event.wait, JOIN_TIMEOUT_S):
                self.failed = f"slot {slot} did not join within {JOIN_TIMEOUT_S:.0f} s"
            if self.failed is not None:
                raise RuntimeError(self.failed)
        return {**lead, "node_rank": 0}

    def ready(self) -> None:
        """Tell every node that the engine is up."""
        for link in self._links:
            link.sendall(READY)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: a node is gone.
        """
        if self.failed is not None:
            raise RuntimeError(self.failed)

    def _follow(self, handle: Any, node: dict[str, Any], joined: threading.Event) -> None:
        slot = self._slots[node["node_rank"]]
        why = "its workers ended"
        try:
            for said in handle.options(stream=True).join.remote(node, self._door.getsockname()[:2]):
                if said == JOINED:
                    joined.set()
        except Exception as error:  # whatever a remote call can raise: the team is no more
            why = str(error)
        self.failed = f"the part on slot {slot} is gone: {why}"
        logging.getLogger("ray.serve").error(self.failed)
        joined.set()
        # An engine that starts or works without it would wait for ever.
        for child in psutil.Process().children(recursive=True):
            child.kill()

    def _let_in(self) -> None:
        """Keep every connection that comes, for as long as this process lives."""
        while True:
            self._links.append(self._door.accept()[0])


def own_address() -> str:
    """This node's address in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def free_port(address: str) -> int:
    """A port of ``address`` that nobody listens on now."""
    with socket.socket(_family(address)) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
