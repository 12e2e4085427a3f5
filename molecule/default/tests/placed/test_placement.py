"""The three witnesses, each asked directly on the hosts and not through Berth's own verification."""

from __future__ import annotations

from testinfra.host import Host

from tests.lab import Lab, gpus_of, name_of, ray

testinfra_hosts = ["ssh://head01", "ssh://gpu01", "ssh://gpu02"]


def test_ray_has_a_node_per_slot_with_its_labels(host: Host, lab: Lab) -> None:
    if name_of(host) != "head01":
        return
    nodes = ray(host, "/api/v0/nodes?detail=1")["data"]["result"]["result"]
    slots = [node for node in nodes if node["state"] == "ALIVE" and not node["is_head_node"]]
    alive = {node["labels"]["berth.slot"]: node for node in slots}
    assert sorted(alive) == sorted(slot["name"] for slot in lab.plan["slots"])
    for slot in lab.plan["slots"]:
        node = alive[slot["name"]]
        assert node["labels"]["berth.gpu"] == ".".join(slot["gpu_uuids"])
        assert node["labels"]["berth.rack"] == slot["rack"]
        assert node["resources_total"]["VRAM_MB"] == slot["vram_mib"]
        assert node["node_ip"] == lab.address(slot["host"])


def test_the_driver_shows_each_replica_on_its_gpu(host: Host, lab: Lab) -> None:
    gpus = {gpu["uuid"]: gpu for gpu in gpus_of(host)} if lab.slots_of(name_of(host)) else {}
    for slot in lab.slots_of(name_of(host)):
        berths = lab.berths_on(slot["name"])
        promised = sum(berth["vram_mib"] * berth["replicas"] for berth in berths)
        for uuid in slot["gpu_uuids"]:
            holders = gpus[uuid]["processes"]
            assert len(holders) == sum(berth["replicas"] for berth in berths)
            held = sum(process["vram_mib"] for process in holders)
            assert 0 < held <= promised if berths else held == 0
            for process in holders:
                environ = host.check_output("tr '\\0' '\\n' </proc/%s/environ | grep -c .", str(process["pid"]))
                assert int(environ) > 0


def test_pack_uses_one_host_of_two(host: Host, lab: Lab) -> None:
    # 2 x 24000 + 50000 + 2 x 4000 MiB: two H100 hold them all, and no single L40S could hold the large one.
    assert lab.plan["strategy"] == "pack"
    assert {berth["slot"] for berth in lab.plan["berths"]} == {"gpu02-0", "gpu02-1"}
    assert host.run("true").rc == 0


def test_the_api_answers_on_the_head_and_wherever_replicas_are(host: Host, lab: Lab) -> None:
    # Serve has no proxy on another host, and where the gateway's only replica is, is Ray's choice.
    planned = {slot["name"]: slot["host"] for slot in lab.plan["slots"]}
    homes = {planned[berth["slot"]] for berth in lab.plan["berths"]}
    if name_of(host) not in {"head01", *homes} and host.run("pgrep -f ray::ServeReplica").rc != 0:
        return
    body = '{"model": "chat", "messages": [{"role": "user", "content": "hello"}]}'
    url = "http://127.0.0.1:8000/v1/chat/completions"
    answer = host.check_output("curl -sS --fail -H 'Content-Type: application/json' -d %s %s", body, url)
    assert "light replica of chat" in answer
