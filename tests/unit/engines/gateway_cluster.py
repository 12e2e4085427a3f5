"""A Ray of one node with Serve, run by the runtime's interpreter: does what its standard input says, line by line.

``{"apps": [...]}`` sets Serve's apps and waits until they run, ``{"put": [...]}`` does not wait; ``{"kill": "chat@a"}``
kills the process of one of that app's replicas; ``{"pids": "chat@a"}`` names them; ``{"details": true}`` asks for
Serve's own and for Ray's nodes. Each answer is a line of JSON; Ray's own go with the driver.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

LABELS = {"berth.role": "slot", "berth.slot": "local-0"}
WAIT_S = 300


def main(port: int, temp_dir: str) -> None:
    import ray

    ray.init(
        num_cpus=4,
        num_gpus=1,
        resources={"VRAM_MB": 8_000},
        labels=LABELS,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=temp_dir,
    )
    obey(port)


def obey(port: int) -> None:
    """Serve on the Ray that this process is connected to, until standard input ends."""
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client

    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    client = _get_global_client()
    say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if "apps" in command:
            say(deploy(client, command["apps"]))
        elif "put" in command:
            put(client, command["put"])
            say({"put": len(command["put"])})
        elif "details" in command:
            say({"serve": client.get_serve_details(), "nodes": [about(node) for node in ray.nodes()]})
        else:
            found = pids(client, command.get("kill") or command["pids"])
            if "kill" in command:
                os.kill(found[0], signal.SIGKILL)
            say({"pids": found})
    serve.shutdown()
    ray.shutdown()


def deploy(client: Any, apps: list[dict[str, Any]]) -> dict[str, Any]:
    put(client, apps)
    wanted = {app["name"] for app in apps}
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        found = client.get_serve_details()["applications"]
        if found.keys() == wanted and all(
            app["status"] == "RUNNING" and settled(name, found, apps) for name, app in found.items()
        ):
            return {"running": sorted(found)}
        time.sleep(0.2)
    return {"error": {name: (app["status"], app["message"]) for name, app in found.items()}}


def put(client: Any, apps: list[dict[str, Any]]) -> None:
    from ray.serve.schema import ServeDeploySchema

    client.deploy_apps(ServeDeploySchema(applications=apps))


def settled(name: str, found: dict[str, Any], apps: list[dict[str, Any]]) -> bool:
    """An app that was running before is RUNNING for a moment longer than it should be."""
    wanted = next(app for app in apps if app["name"] == name)["deployments"][0].get("num_replicas")
    if wanted is None:
        return True  # Serve scales it
    states = [item["state"] for each in found[name]["deployments"].values() for item in each["replicas"]]
    return states == ["RUNNING"] * wanted


def pids(client: Any, app: str) -> list[int]:
    deployments = client.get_serve_details()["applications"][app]["deployments"].values()
    return [item["pid"] for each in deployments for item in each["replicas"] if item["state"] == "RUNNING"]


def about(node: dict[str, Any]) -> dict[str, Any]:
    """A node as the dashboard's REST shows it."""
    return {
        "node_id": node["NodeID"],
        "state": "ALIVE" if node["Alive"] else "DEAD",
        "labels": node["Labels"],
        "resources_total": node["Resources"],
        "metrics_port": node["MetricsExportPort"],
    }


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what, default=str), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
