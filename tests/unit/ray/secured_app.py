"""A driver for a secured cluster: a Serve app on the slot, asked through the head's proxy. Prints what it saw, JSON."""

from __future__ import annotations

import json
import sys
import urllib.request


def main(address: str, node_ip: str, http_port: int) -> None:
    import ray
    from ray import serve

    ray.init(address=address, _node_ip_address=node_ip, log_to_driver=False, logging_level="ERROR")

    @serve.deployment(ray_actor_options={"num_cpus": 0, "label_selector": {"berth.role": "slot"}})
    class Where:
        def __call__(self) -> str:
            return str(ray.util.get_node_ip_address())

    serve.start(proxy_location="HeadOnly", http_options={"host": node_ip, "port": http_port})
    serve.run(Where.bind(), route_prefix="/")
    with urllib.request.urlopen(f"http://{node_ip}:{http_port}/", timeout=20) as answer:
        where = answer.read().decode()

    @ray.remote(num_cpus=0, label_selector={"berth.role": "slot"})
    def size(data: bytes) -> int:
        return len(data)

    # From object store to object store: larger than what travels inside a call.
    found = ray.get(size.remote(ray.put(b"x" * 20_000_000)), timeout=20)
    print(json.dumps({"replica": where, "object": found}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
