"""The rules that the role renders: loaded by nft itself, tried by hosts that are peers and hosts that are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from berth.errors import BerthError
from berth.host.firewall import compare, load

ROOT = Path(__file__).resolve().parents[3]
NETWORK = "10.199.77"
ADDRESSES = {
    "head01": f"{NETWORK}.10",
    "gpu01": f"{NETWORK}.21",
    "edge01": f"{NETWORK}.30",
    "client": f"{NETWORK}.50",
    "stranger": f"{NETWORK}.66",
}
# A worker's port of slot 1, its metrics, the API, the kernel's own, SSH, and one that is not Berth's.
WORKER, METRICS, API, EPHEMERAL, SSH, FOREIGN = 12208, 8501, 8000, 40000, 22, 9100


def can_make_namespaces() -> bool:
    if os.geteuid() or not all(map(shutil.which, ("nft", "ip", "unshare"))):
        return False
    return (
        subprocess.run(["unshare", "--net", "nft", "list", "ruleset"], capture_output=True, check=False).returncode == 0
    )


needs_root = pytest.mark.skipif(
    not can_make_namespaces(), reason="needs root, nftables, iproute2 and the right to make network namespaces"
)


def inventory(**extra: Any) -> dict[str, Any]:
    card = {"host": "gpu01", "rack": "", "zone": "", "product": "NVIDIA L40S", "vram_mib": 44974}
    slots = [{**card, "name": f"gpu01-{n}", "gpu_uuids": [f"GPU-{n}"]} for n in range(2)]
    common = {
        "ansible_connection": "local",
        "berth_cluster_id": "test-1a2b",
        "berth_run_dir": "/run/berth",
        "berth_etc_dir": "/etc/berth",
        "berth_state_dir": "/var/lib/berth",
        "berth_controller_dir": "/root/.berth",
        "ray_runtime_dir": "/opt/runtime",
        "nvidia_driver_environment": {},
        "serve_apps_http_port": API,
        "placement_plan": {"slots": slots},
        "__firewall_ephemeral": {"content": "MzI3NjgJNjA5OTkK"},
        "firewall_api_networks": [f"{ADDRESSES['client']}/32", "2001:db8::/64"],
        **extra,
    }
    hosts = {name: {"ansible_host": ADDRESSES[name], "placement_host_name": name} for name in ("head01", "gpu01")}
    groups = {name: {"hosts": {host: {}}} for name, host in (("ray_head", "head01"), ("ray_slots", "gpu01"))}
    edge = {"edge01": {"ansible_host": ADDRESSES["edge01"]}}
    return {"berth": {"hosts": hosts, "vars": common, "children": groups}, "ray_ingress": {"hosts": edge}}


def render(base: Path, **extra: Any) -> dict[str, Path]:
    """The file of rules of each host, as the role's template and variables make it."""
    roles = ("berth", "ray_head", "ray_slot", "firewall")
    files = [ROOT / "roles" / role / kind / "main.yml" for kind in ("defaults", "vars") for role in roles]
    # As a role has them: what the inventory says beats the defaults.
    known = inventory(**extra)["berth"]["vars"]
    defaults = {k: v for path in files[: len(roles)] for k, v in yaml.safe_load(path.read_text()).items()}
    book = [
        {
            "hosts": "berth",
            "gather_facts": False,
            "vars": {key: value for key, value in defaults.items() if key not in known},
            "tasks": [
                *({"ansible.builtin.include_vars": {"file": str(path)}} for path in files[len(roles) :]),
                *(
                    {
                        "ansible.builtin.template": {
                            "src": str(ROOT / f"roles/firewall/templates/{template}.j2"),
                            "dest": f"{base}/{{{{ inventory_hostname }}}}{suffix}",
                            "mode": "0644",
                        }
                    }
                    for template, suffix in (("berth.nft", ".nft"), ("berth-firewall.service", ".service"))
                ),
            ],
        }
    ]
    (base / "play.yml").write_text(json.dumps(book))
    (base / "hosts.json").write_text(json.dumps(inventory(**extra)))
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_LOCAL_TEMP": str(base / "local"),
        "ANSIBLE_REMOTE_TEMP": str(base / "remote"),
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    }
    command = [sys.executable, "-m", "ansible", "playbook", "-i", str(base / "hosts.json"), str(base / "play.yml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {host: base / f"{host}.nft" for host in ("head01", "gpu01")}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return render(tmp_path_factory.mktemp("rules"))


def test_a_host_guards_its_own_nodes_ports(rules: dict[str, Path]) -> None:
    head, gpu = (rules[name].read_text() for name in ("head01", "gpu01"))
    assert "6390, 12000, 12001, 12002, 12003, 12008-12099, 20190, 52690" in head
    assert "12108-12199, 12200, 12201, 12202, 12203, 12208-12299, 52700, 52701" in gpu
    for text in (head, gpu):
        assert f"elements = {{ {ADDRESSES['head01']}, {ADDRESSES['gpu01']} }}" in text
        assert "32768-60999" in text
        assert "flush" not in text, "other tables are not Berth's"
        assert text.index("dport { 22 } accept") < text.index("drop")


def test_an_ingress_beside_the_cluster_may_use_the_api_and_no_more(rules: dict[str, Path]) -> None:
    text = rules["gpu01"].read_text()
    assert f"elements = {{ {ADDRESSES['edge01']}, {ADDRESSES['client']} }}" in text
    assert text.count(ADDRESSES["edge01"]) == 1


def test_systemd_reads_the_unit_and_loads_it_before_there_is_a_network(rules: dict[str, Path]) -> None:
    unit = rules["gpu01"].with_suffix(".service")
    assert "Before=network-pre.target" in unit.read_text()
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    assert not [line for line in done.stderr.splitlines() if "gpu01.service" in line], done.stderr


def in_a_namespace(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["unshare", "--net", *command], capture_output=True, text=True, check=False)


@needs_root
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"firewall_guard_ephemeral": False},
        {"firewall_api_networks": []},
        {"firewall_metrics_networks": ["192.0.2.0/24"], "firewall_cluster_networks": ["10.0.0.0/8", f"{NETWORK}.21"]},
        {"ansible_port": 50022},
    ],
    ids=["as is", "no ephemeral", "no api", "overlapping networks", "ssh in the ephemeral range"],
)
def test_nft_takes_the_rules_twice_and_leaves_other_tables(tmp_path: Path, extra: dict[str, Any]) -> None:
    for path in render(tmp_path, **extra).values():
        script = f"nft add table ip other && nft -c -f {path} && nft -f {path} && nft -f {path} && nft list ruleset"
        done = in_a_namespace("sh", "-ec", script)
        assert done.returncode == 0, done.stderr
        assert "table ip other" in done.stdout
        assert done.stdout.count("table inet berth") == 1
        assert "policy accept" in done.stdout


@needs_root
def test_the_module_mends_what_was_changed_by_hand(rules: dict[str, Path]) -> None:
    code = (
        "import subprocess; from pathlib import Path; from berth.host.firewall import compare, load\n"
        f"path = Path({str(rules['gpu01'])!r})\n"
        "state = lambda: compare(path, 'berth').differ\n"
        "seen = [state()]; load(path); seen.append(state())\n"
        "subprocess.run('nft insert rule inet berth input tcp dport 12108 accept'.split(), check=True)\n"
        "seen.append(state()); load(path); seen.append(state())\n"
        "subprocess.run('nft flush ruleset'.split(), check=True); seen.append(state()); print(seen)"
    )
    done = in_a_namespace(sys.executable, "-c", code)
    assert done.stdout.strip() == "[True, False, True, False, True]", done.stderr


@needs_root
def test_rules_that_nft_refuses_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.nft").write_text("table inet berth { chain input { nonsense } }\n")
    with pytest.raises(BerthError, match=r"nft refuses .*bad\.nft"):
        compare(tmp_path / "bad.nft", "berth")
    with pytest.raises(BerthError, match="what was in force still is"):
        load(tmp_path / "bad.nft")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@pytest.fixture(scope="module")
def hosts(rules: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Four hosts on one bridge, each a network namespace; gpu01 has the rules and listens. Host to namespace."""
    names = {host: f"berth{os.getpid()}-{number}" for number, host in enumerate([*ADDRESSES, "switch"])}
    with ExitStack() as stack:
        for space in names.values():
            ip("netns", "add", space)
            stack.callback(ip, "netns", "delete", space)
        switch = names["switch"]
        ip("-n", switch, "link", "add", "bridge0", "up", "type", "bridge")
        for number, (host, address) in enumerate(ADDRESSES.items()):
            ip(
                "-n",
                switch,
                "link",
                "add",
                f"port{number}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                names[host],
            )
            ip("-n", switch, "link", "set", f"port{number}", "master", "bridge0", "up")
            ip("-n", names[host], "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", names[host], "address", "add", f"fd00:77::{address.rpartition('.')[2]}/64", "dev", "eth0", "nodad")
            for device in ("eth0", "lo"):
                ip("-n", names[host], "link", "set", device, "up")
        ip("netns", "exec", names["gpu01"], "nft", "-f", str(rules["gpu01"]))
        listen = (
            "import socket, time\n"
            f"all = [socket.create_server(('::', p), family=socket.AF_INET6, dualstack_ipv6=True) for p in "
            f"{[WORKER, METRICS, API, EPHEMERAL, SSH, FOREIGN]}]\n"
            "print('listening', flush=True); time.sleep(600)"
        )
        server = subprocess.Popen(
            ["ip", "netns", "exec", names["gpu01"], sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        assert server.stdout
        assert server.stdout.readline() == "listening\n"
        yield names


def reaches(space: str, address: str, port: int) -> bool:
    code = f"import socket; socket.create_connection(({address!r}, {port}), 1).close()"
    done = subprocess.run(["ip", "netns", "exec", space, sys.executable, "-c", code], capture_output=True, check=False)
    return done.returncode == 0


@needs_root
@pytest.mark.parametrize(
    ("host", "open_ports"),
    [
        ("head01", {WORKER, METRICS, API, EPHEMERAL, SSH, FOREIGN}),
        ("client", {API, SSH, FOREIGN}),
        ("stranger", {SSH, FOREIGN}),
    ],
)
def test_who_comes_in_where(hosts: dict[str, str], host: str, open_ports: set[int]) -> None:
    ports = {WORKER, METRICS, API, EPHEMERAL, SSH, FOREIGN}
    assert {port for port in ports if reaches(hosts[host], ADDRESSES["gpu01"], port)} == open_ports


@needs_root
def test_a_stranger_does_not_come_in_by_ipv6(hosts: dict[str, str]) -> None:
    assert reaches(hosts["stranger"], "fd00:77::21", FOREIGN), "there is IPv6 between the hosts"
    assert not reaches(hosts["stranger"], "fd00:77::21", WORKER)


@needs_root
def test_the_host_itself_reaches_its_own_ports(hosts: dict[str, str]) -> None:
    for address in ("127.0.0.1", ADDRESSES["gpu01"]):
        assert reaches(hosts["gpu01"], address, WORKER)
