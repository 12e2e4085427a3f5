"""What berth.host.ingress computes and refuses before nginx hears of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from berth.errors import BerthError
from berth.host.ingress import (
    Key,
    Limits,
    Upstream,
    answers,
    key_table,
    limit_classes,
    long_paths,
    lost,
    missing,
    read_keys,
    upstreams,
)

ROOT = Path(__file__).resolve().parents[3]
DEFAULT = Limits(600, 60, 64)
SECRET = "0123456789abcdef" * 3


def refused(entries: list[dict[str, Any]]) -> str:
    with pytest.raises(BerthError) as caught:
        limit_classes(read_keys(entries), DEFAULT)
    return str(caught.value)


def test_keys_with_the_same_limits_share_a_class_and_only_the_definition() -> None:
    keys = read_keys([{"name": "b"}, {"name": "slow", "requests_per_minute": 6, "burst": 1}, {"name": "a"}])
    slow, usual = limit_classes(keys, DEFAULT)
    assert (slow.number, slow.requests_per_minute, slow.burst, slow.connections, slow.keys) == (1, 6, 1, 64, ("slow",))
    assert (usual.number, usual.requests_per_minute, usual.keys) == (2, 600, ("a", "b"))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "an ingress without keys would let nobody in"),
        ([{"name": "a"}, {"name": "a"}], "a name twice; found: a"),
        ([{"name": 'a"; return 200'}], "allowed: lower-case letters"),
        ([{"name": "a", "keys": "x"}], "keys: unknown key"),
        ([{"name": "a", "key": "short"}], "found: 5 characters (not shown)"),
        ([{"name": "a", "burst": 0}], "burst of the key a is no limit that can be kept; found: 0; allowed: 1 to"),
        ([{"name": "a", "connections": 70000}], "allowed: 1 to 65535"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_words(entries: list[dict[str, Any]], words: str) -> None:
    assert words in refused(entries)


@pytest.mark.parametrize("text", [SECRET.upper(), SECRET + '"', SECRET + " x", SECRET * 3, ["list"]])
def test_no_message_shows_a_key(text: Any) -> None:
    said = refused([{"name": "a", "key": text}])
    assert "not shown" in said
    assert str(text)[:16] not in said


def test_two_names_with_one_key_are_refused_without_showing_it() -> None:
    said = refused([{"name": "a", "key": SECRET}, {"name": "b", "key": SECRET}])
    assert "several names have the same key; found: a, b" in said
    assert SECRET not in said


def test_a_key_is_the_one_given_or_the_one_made(tmp_path: Path) -> None:
    keys = (Key("given", "k" * 40), Key("made"), Key("later"))
    (tmp_path / "made").write_text(f"{SECRET}\n")
    assert missing(keys, tmp_path) == ["later"]
    assert key_table(keys, tmp_path) == {"given": "k" * 40, "made": SECRET}
    (tmp_path / "later").write_text("k" * 40)
    with pytest.raises(BerthError, match="several names have the same key; found: given, later"):
        key_table(keys, tmp_path)


def test_a_key_that_clients_have_is_found_in_the_hosts_file() -> None:
    text = f'map $http_authorization $ingress_key {{\n    "Bearer {SECRET}" "team-a";\n}}\n'
    assert lost(["team", "team-a", "other"], text) == ["team-a"]


# --- Proxies ----------------------------------------------------------------------------------------------------------

VARIABLES = {
    "head01": {"ansible_host": "192.0.2.10"},
    "gpu01": {"ansible_host": "192.0.2.21", "ray_slot_node_ip": "2001:db8::21"},
    "gpu02": {},
}


def test_the_head_is_a_backup_and_the_gpu_hosts_are_asked() -> None:
    assert upstreams("edge01", ["head01"], ["gpu01", "gpu02"], VARIABLES, "0.0.0.0") == (
        Upstream("gpu01", "[2001:db8::21]", backup=False),
        Upstream("gpu02", "gpu02", backup=False),
        Upstream("head01", "192.0.2.10", backup=True),
    )


def test_a_head_that_has_slots_is_no_backup() -> None:
    (only,) = upstreams("head01", ["head01"], ["head01"], VARIABLES, "127.0.0.1")
    assert only == Upstream("head01", "127.0.0.1", backup=False)


def test_proxies_on_loopback_are_refused_where_others_must_be_reached() -> None:
    with pytest.raises(BerthError, match=r"head01 must reach gpu01; mend: serve_apps_http_host: 0\.0\.0\.0"):
        upstreams("head01", ["head01"], ["gpu01"], VARIABLES, "127.0.0.1")


def test_the_ports_default_is_that_of_the_role_that_serves() -> None:
    port = yaml.safe_load((ROOT / "roles/serve_apps/defaults/main.yml").read_text())["serve_apps_http_port"]
    assert f"default({port})" in (ROOT / "roles/ingress/vars/main.yml").read_text()


@pytest.mark.parametrize("path", ["jobs", "/", "/-/error/", "/v1/jobs { }", "/v1/$x"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(BerthError, match="what is no path of the API"):
        long_paths(["/v1/jobs/", path])


def test_answers_are_openais_shape() -> None:
    for answer in answers(32):
        error = json.loads(answer.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
    assert "larger than 32 MiB" in next(answer.body for answer in answers(32) if answer.status == 413)
