"""The command line, labels and environment of a Ray node, without starting one."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from berth.codec import dump, load, replace
from berth.errors import BerthError
from berth.ray.start import NO_IDLE_WORKERS, NodeConfig, command, digest, environment, labels, slot_nodes, unit_digests

# ray/_private/label_utils.py of Ray 2.60
LABEL = re.compile(r"([a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?)")
UUIDS = ("GPU-8f1d2c3b-0a4e-4d5f-9b6a-7c8d9e0f1a2b", "GPU-1f1d2c3b-0a4e-4d5f-9b6a-7c8d9e0f1a2c")
HEAD = NodeConfig(
    kind="head",
    name="head",
    cluster="lab",
    ray="/opt/berth/runtime/bin/ray",
    node_ip="10.0.0.1",
    gcs_address="10.0.0.1:6379",
    temp_dir="/run/berth/head",
    token_file="/etc/berth/token",
    dashboard_agent_port=52690,
    metrics_port=52790,
    node_port_base=12000,
    node_port_count=100,
    num_cpus=0,
    memory_bytes=2**30,
    object_store_bytes=2**27,
    dashboard_port=8275,
    client_port=10001,
)
SLOT = NodeConfig(
    kind="slot",
    name="gpu01-0",
    cluster="lab",
    ray="/opt/berth/runtime/bin/ray",
    node_ip="10.0.0.2",
    gcs_address="10.0.0.1:6379",
    temp_dir="/run/berth/gpu01-0",
    token_file="/etc/berth/token",
    dashboard_agent_port=52700,
    metrics_port=52800,
    node_port_base=12100,
    node_port_count=100,
    num_cpus=4,
    memory_bytes=2**33,
    object_store_bytes=2**28,
    log_monitor=False,
    gpu_uuids=UUIDS[:1],
    vram_mib=45_000,
    labels={"berth.host": "gpu01", "berth.rack": "", "berth.product": "NVIDIA-L40S"},
    env={"HF_HOME": "/var/cache/hf"},
)


def options(node: NodeConfig) -> dict[str, str]:
    words = command(node)
    assert words[:2] == [node.ray, "start"]
    pairs = [word.partition("=")[::2] for word in words[2:]]
    assert len({key for key, _ in pairs}) == len(pairs), "an option is given twice"
    return dict(pairs)


def test_a_slots_command() -> None:
    found = options(SLOT)
    assert json.loads(found.pop("--labels")) == labels(SLOT)
    assert json.loads(found.pop("--resources")) == {"VRAM_MB": 45_000}
    assert found == {
        "--disable-usage-stats": "",
        "--log-color": "false",
        "--node-ip-address": "10.0.0.2",
        "--temp-dir": "/run/berth/gpu01-0",
        "--dashboard-agent-listen-port": "52700",
        "--metrics-export-port": "52800",
        "--node-manager-port": "12100",
        "--object-manager-port": "12101",
        "--runtime-env-agent-port": "12102",
        "--dashboard-agent-grpc-port": "12103",
        "--min-worker-port": "12108",
        "--max-worker-port": "12199",
        "--num-cpus": "4",
        "--num-gpus": "1",
        "--memory": str(2**33),
        "--object-store-memory": str(2**28),
        "--include-log-monitor": "False",
        "--address": "10.0.0.1:6379",
    }


def test_a_slot_of_two_gpus_offers_both_memories() -> None:
    found = options(replace(SLOT, gpu_uuids=UUIDS))
    assert found["--num-gpus"] == "2"
    assert json.loads(found["--resources"]) == {"VRAM_MB": 90_000}


def test_a_heads_command() -> None:
    found = options(HEAD)
    assert "--head" in found
    assert "--address" not in found
    assert "--resources" not in found
    assert found["--port"] == "6379"
    assert (found["--dashboard-host"], found["--dashboard-port"]) == ("127.0.0.1", "8275")
    assert found["--ray-client-server-port"] == "10001"
    assert (found["--num-cpus"], found["--num-gpus"]) == ("0", "0")
    assert found["--memory"] == str(2**30), "else the head advertises the whole host's memory"


def test_the_gcs_port_of_an_ipv6_address() -> None:
    assert options(replace(HEAD, gcs_address="[fd00::1]:6380"))["--port"] == "6380"


def test_two_raylets_of_a_host_share_nothing_they_must_not() -> None:
    other = replace(SLOT, name="gpu01-1", temp_dir="/run/berth/gpu01-1", dashboard_agent_port=52701, metrics_port=52801)
    one, two = options(SLOT), options(other)
    for key in ("--temp-dir", "--dashboard-agent-listen-port", "--metrics-export-port", "--labels"):
        assert one[key] != two[key], key


@pytest.mark.parametrize("kind", ["head", "slot"])
def test_every_node_says_what_of_the_host_is_its_own(kind: str) -> None:
    found = options(HEAD if kind == "head" else SLOT)
    for key in ("--num-cpus", "--memory", "--object-store-memory", "--temp-dir", "--include-log-monitor"):
        assert key in found


def test_labels_of_a_slot_and_of_a_head() -> None:
    assert labels(SLOT) == {
        "berth.role": "slot",
        "berth.cluster": "lab",
        "berth.slot": "gpu01-0",
        "berth.gpu": UUIDS[0],
        "berth.host": "gpu01",
        "berth.product": "NVIDIA-L40S",
    }
    assert labels(HEAD) == {"berth.role": "head", "berth.cluster": "lab"}
    assert labels(replace(SLOT, gpu_uuids=UUIDS))["berth.gpu"].split(".") == list(UUIDS)


def test_no_label_of_the_inventory_overrides_what_selectors_match() -> None:
    forged = replace(SLOT, labels={"berth.slot": "gpu09-9", "berth.role": "head"})
    assert (labels(forged)["berth.slot"], labels(forged)["berth.role"]) == ("gpu01-0", "slot")


@pytest.mark.parametrize("uuid", [UUIDS[0], "MIG-8f1d2c3b-0a4e-4d5f-9b6a-7c8d9e0f1a2b"])
def test_labels_are_what_ray_takes(uuid: str) -> None:
    for node in (HEAD, replace(SLOT, gpu_uuids=(uuid,))):
        for key, value in labels(node).items():
            assert not key.startswith("ray.io/")
            assert LABEL.fullmatch(key)
            assert LABEL.fullmatch(value), f"{key}={value}"


def test_a_slots_environment() -> None:
    env = environment(SLOT, ("3",))
    assert env["BERTH_SLOT"] == "gpu01-0"
    assert env["BERTH_UNIT"] == "slot@gpu01-0"
    assert env["BERTH_GPU_UUIDS"] == UUIDS[0]
    assert env["CUDA_VISIBLE_DEVICES"] == "3"
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"]) == ("token", "/etc/berth/token")
    assert int(env["RAY_gcs_rpc_server_reconnect_timeout_s"]) >= 600
    assert env["RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"] == "minor", "preflight lets patch levels differ"
    assert env["HF_HOME"] == "/var/cache/hf"
    assert {key: env[key] for key in NO_IDLE_WORKERS} == NO_IDLE_WORKERS
    assert "RAY_gcs_storage" not in env


def test_a_heads_environment_shows_it_no_gpu() -> None:
    env = environment(replace(HEAD, gcs_storage_dir="/run/berth/gcs"), ())
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["BERTH_UNIT"] == "head"
    assert not {"BERTH_SLOT", "BERTH_GPU_UUIDS"} & env.keys()
    assert (env["RAY_gcs_storage"], env["RAY_gcs_storage_path"]) == ("rocksdb", "/run/berth/gcs")


def test_the_environment_keeps_the_units_own_and_lets_nothing_override_the_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OF_THE_UNIT", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    env = environment(replace(SLOT, env={"CUDA_VISIBLE_DEVICES": "0"}), ("2", "5"))
    assert env["OF_THE_UNIT"] == "1"
    assert env["CUDA_VISIBLE_DEVICES"] == "2,5"


def test_a_node_with_certificates_speaks_tls() -> None:
    env = environment(replace(SLOT, tls_dir="/etc/berth/tls"), ())
    assert {key: value for key, value in env.items() if "TLS" in key} == {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": "/etc/berth/tls/node.crt",
        "RAY_TLS_SERVER_KEY": "/etc/berth/tls/node.key",
        "RAY_TLS_CA_CERT": "/etc/berth/tls/ca.crt",
    }
    assert not [key for key in environment(SLOT, ()) if "TLS" in key]


def test_a_slot_with_more_cpus_than_ports_is_refused() -> None:
    with pytest.raises(BerthError, match=r"fewer ports for workers than CPUs.*92 ports.*ray_slot_node_port_count"):
        command(replace(SLOT, num_cpus=93))


@pytest.mark.parametrize("node", [HEAD, SLOT], ids=["head", "slot"])
def test_a_node_config_goes_through_json_unchanged(node: NodeConfig) -> None:
    assert load(NodeConfig, json.loads(json.dumps(dump(node))), "node.json") == node


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gpus": 1}, r"node\.json: num_gpus: unknown key"),
        ({"kind": "worker"}, r"kind: .*'head' or 'slot'.*found 'worker'"),
        ({"memory_bytes": "much"}, r"memory_bytes: .*found 'much'"),
    ],
)
def test_a_node_config_with_what_berth_does_not_know_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BerthError, match=message):
        load(NodeConfig, dump(SLOT) | change, "node.json")


SLOTS = [
    {
        "name": f"gpu01-{n}",
        "host": "gpu01",
        "rack": "r1",
        "zone": "",
        "gpu_uuids": [f"GPU-{n}"],
        "vram_mib": 44_974,
        "product": "NVIDIA H100 80GB HBM3",
    }
    for n in (10, 2)
]


def test_nodes_of_a_hosts_slots_keep_apart() -> None:
    nodes = slot_nodes(SLOTS, {"cluster": "c", "log_monitor": True}, "/run/berth", 52_700, 8_500, 12_100, 100)
    assert list(nodes) == ["gpu01-2", "gpu01-10"]
    assert [node["log_monitor"] for node in nodes.values()] == [True, False], "one log monitor per host"
    assert nodes["gpu01-2"]["metrics_port"] == 8_502
    assert nodes["gpu01-10"]["temp_dir"] == "/run/berth/gpu01-10"
    assert nodes["gpu01-2"]["labels"] == {
        "berth.host": "gpu01",
        "berth.rack": "r1",
        "berth.zone": "",
        "berth.product": "NVIDIA-H100-80GB-HBM3",
    }
    bases = [(node["node_port_base"], node["node_port_count"]) for node in nodes.values()]
    assert bases == [(12_300, 100), (13_100, 100)]


def test_a_digest_changes_with_its_node_alone() -> None:
    nodes = slot_nodes(SLOTS, {"cluster": "c"}, "/run/berth", 52_700, 8_500, 12_100, 100)
    other = slot_nodes(SLOTS[:1], {"cluster": "c"}, "/run/berth", 52_700, 8_500, 12_100, 100)
    units = unit_digests({**nodes, "head": {"kind": "head"}})
    assert sorted(units) == ["berth-ray-head", "berth-ray-slot@gpu01-10", "berth-ray-slot@gpu01-2"]
    assert units["berth-ray-slot@gpu01-10"] == digest(nodes["gpu01-10"]) != units["berth-ray-slot@gpu01-2"]
    # Alone on the host it becomes the one with the log monitor: another node.
    assert digest(other["gpu01-10"]) != digest(nodes["gpu01-10"])
