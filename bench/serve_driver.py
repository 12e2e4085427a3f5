"""A Ray of one node with Serve for a benchmark, run by the runtime's interpreter: a line of JSON in, a line out.

``{"apps": [...]}`` sets Serve's apps and waits until they run: ``{"pids": {app: {deployment: [pid, ...]}}}``, or
``{"error": ...}``. The cluster goes when standard input ends.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

LABELS = {"berth.role": "slot", "berth.slot": "bench-0"}


def main(port: int, temp_dir: str, wait_s: float) -> None:
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client

    ray.init(
        address="local",
        num_cpus=64,
        num_gpus=1,
        resources={"VRAM_MB": 64_000},
        labels=LABELS,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=temp_dir,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    client = _get_global_client()
    for line in sys.stdin:
        print(json.dumps(deploy(client, json.loads(line)["apps"], wait_s)), flush=True)
    ray.shutdown()


def deploy(client: Any, apps: list[dict[str, Any]], wait_s: float) -> dict[str, Any]:
    from ray.serve.schema import ServeDeploySchema

    client.deploy_apps(ServeDeploySchema(applications=apps))
    wanted, until = {app["name"] for app in apps}, time.monotonic() + wait_s
    found: dict[str, Any] = {}
    while time.monotonic() < until:
        found = client.get_serve_details()["applications"]
        if found.keys() == wanted and all(app["status"] == "RUNNING" for app in found.values()):
            return {"pids": {name: pids(app) for name, app in found.items()}}
        failed = {name: app["message"] for name, app in found.items() if app["status"] == "DEPLOY_FAILED"}
        if failed:
            return {"error": failed}
        time.sleep(0.5)
    return {"error": {name: (app["status"], app["message"]) for name, app in found.items()}}


def pids(app: dict[str, Any]) -> dict[str, list[int]]:
    return {
        name: [item["pid"] for item in deployment["replicas"] if item["state"] == "RUNNING"]
        for name, deployment in app["deployments"].items()
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
