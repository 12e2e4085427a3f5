"""Mistakes that the inventory alone shows: each is found, named with what mends it, and nothing else is."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from berth.preflight.inventory import REMOVED, SecretFile, check_inventory, read_secret
from tests.unit.preflight.builders import ROLES, host, inventory, only, said

APP = {"name": "chat", "engine": "light", "replicas": 1, "vram_mib": 100}


def test_a_good_inventory_has_no_problem() -> None:
    assert check_inventory(inventory(host("gpu1", serve_apps_list=[APP]), host("gpu2", serve_apps_list=[APP]))) == []
    assert check_inventory(inventory(host("gpu1", ray_head_node_ip="127.0.0.1", ray_slot_node_ip="127.0.0.1"))) == []


def test_a_head_too_many_and_a_host_without_work() -> None:
    hosts = (host("gpu1"), host("gpu2"), host("gpu3"))
    groups = {"ray_head": ("gpu1", "gpu2"), "ray_slots": ()}
    found = check_inventory(inventory(*hosts, groups=groups))
    assert said(found) == [
        ("error", "groups", ("inventory",)),
        ("error", "groups", ("inventory",)),
        ("warning", "groups", ("gpu3",)),
    ]
    assert "the group ray_head must have one host" in found[0].what
    assert found[0].found == "gpu1, gpu2"


def test_a_host_of_the_groups_that_the_playbooks_would_not_touch() -> None:
    groups = {"ray_head": ("gpu1",), "ray_slots": ("gpu1", "gpu9")}
    problem = only(check_inventory(inventory(host("gpu1"), groups=groups)))
    assert (problem.kind, problem.objects) == ("groups", ("gpu9",))


@pytest.mark.parametrize(
    ("first", "second", "objects", "words"),
    [
        (
            {"placement_slot_shapes": [["GPU-a", "GPU-b"], ["GPU-a", 3]]},
            {},
            ("gpu1",),
            "placement_slot_shapes names GPU GPU-a 2 times",
        ),
        ({"placement_slot_shapes": [[0, 1], [2, "1"]]}, {}, ("gpu1",), "placement_slot_shapes names GPU 1 2 times"),
        ({"placement_cordoned_gpus": [3, 3]}, {}, ("gpu1",), "placement_cordoned_gpus names GPU 3 2 times"),
        (
            {"placement_slot_shapes": [["GPU-a", "GPU-b"]]},
            {"placement_cordoned_gpus": ["GPU-b"]},
            ("gpu1", "gpu2"),
            "several hosts name GPU GPU-b",
        ),
        ({"placement_cordoned_gpus": ["first"]}, {}, ("gpu1",), "neither a UUID nor an index"),
    ],
)
def test_gpus_named_twice(first: dict[str, Any], second: dict[str, Any], objects: tuple[str, ...], words: str) -> None:
    problem = only(check_inventory(inventory(host("gpu1", **first), host("gpu2", **second))))
    assert (problem.kind, problem.severity, problem.objects) == ("gpu", "error", objects)
    assert words in problem.what


def test_the_same_index_on_two_hosts_and_a_cordoned_gpu_of_a_group_are_right() -> None:
    hosts = (
        host("gpu1", placement_slot_shapes=[[0, 1]], placement_cordoned_gpus=[0]),
        host("gpu2", placement_slot_shapes=[[0, 1]]),
    )
    assert check_inventory(inventory(*hosts)) == []


def test_pins_named_twice() -> None:
    problem = only(check_inventory(inventory(host("gpu1", serve_apps_list=[{**APP, "pins": ["GPU-a", "GPU-a"]}]))))
    assert problem.what == "app chat: pins names GPU GPU-a 2 times"


def test_every_mistake_of_the_app_list_at_once() -> None:
    apps = [
        {**APP, "replcias": 3},
        {**APP, "name": "Upper"},
        {"name": "nomodel", "engine": "llm", "replicas": 1},
        {**APP, "name": "owned", "engine_args": {"tensor_parallel_size": 2}},
        {**APP, "name": "twin"},
        {**APP, "name": "twin"},
    ]
    found = check_inventory(inventory(host("gpu1", serve_apps_list=apps)))
    assert {item.kind for item in found} == {"app"}
    texts = [f"{item.what} {item.found}" for item in found]
    for words in (
        "chat: replcias: unknown key",
        "a name cannot be used in a Serve app's name 'Upper'",
        "engine llm needs a model",
        "engine_args.tensor_parallel_size would break",
        "two apps have the same name twin",
    ):
        assert sum(words in text for text in texts) == 1, (words, texts)
    assert len(found) == 5


def test_an_unknown_strategy() -> None:
    problem = only(check_inventory(inventory(host("gpu1", placement_strategy="pakc"))))
    assert (problem.what, problem.found) == ("unknown strategy", "pakc")
    assert "strict_spread" in problem.allowed


@pytest.mark.parametrize(
    ("name", "severity", "words"),
    [
        ("ray_slot_num_cpu", "error", "did you mean ray_slot_num_cpus?"),
        ("placement_stratgy", "error", "did you mean placement_strategy?"),
        ("berth_our_own_note", "warning", "VARIABLES.md"),
        ("ray_slot_slots", "error", "remove it"),
    ],
)
def test_a_variable_that_no_role_takes(name: str, severity: str, words: str) -> None:
    problem = only(check_inventory(inventory(host("gpu1", given=(name,)))))
    assert (problem.kind, problem.severity, problem.objects) == ("variable", severity, ("gpu1",))
    assert name in problem.what
    assert words in problem.mend


def test_others_variables_and_what_roles_register_are_left_alone() -> None:
    given = ("ansible_host", "my_rack", "strategy", "placement_host_input")
    made = frozenset(name for role in ROLES for name in role.made)
    assert check_inventory(inventory(host("gpu1", given=given), made=made)) == []


def test_a_removed_variable_fails_with_the_name_of_its_replacement() -> None:
    found = check_inventory(inventory(host("gpu1", given=("ray_slot_cpus",))), {"ray_slot_cpus": "ray_slot_num_cpus"})
    problem = only(found)
    assert problem.severity == "error"
    assert problem.what == "the variable ray_slot_cpus is no more"
    assert problem.mend == "use ray_slot_num_cpus instead"


def test_what_replaces_a_removed_variable_is_there() -> None:
    options = {option.name for role in ROLES for option in role.options}
    assert not set(REMOVED) & options
    assert {name for name in REMOVED.values() if name} <= options


def test_one_host_name_for_two_hosts() -> None:
    found = check_inventory(inventory(host("gpu1", placement_host_name="gpu"), host("gpu2", placement_host_name="gpu")))
    assert (only(found).kind, only(found).objects) == ("host_name", ("gpu1", "gpu2"))


def test_node_addresses_that_others_cannot_use() -> None:
    found = check_inventory(inventory(host("gpu1"), host("gpu2", ray_slot_node_ip="127.0.1.1")))
    assert (only(found).objects, only(found).found) == (("gpu2",), "127.0.1.1")
    found = check_inventory(inventory(host("gpu1"), host("gpu2", ray_slot_node_ip="10.0.0.1")))
    assert (only(found).objects, only(found).found) == (("gpu1", "gpu2"), "10.0.0.1")


def test_what_the_cluster_has_one_of() -> None:
    problem = only(check_inventory(inventory(host("gpu1"), host("gpu2", ray_head_gcs_port=6400))))
    assert problem.what.startswith("ray_head_gcs_port differs between hosts")
    assert problem.found == "gpu1: 6390; gpu2: 6400"
    # A rack is a host's own.
    assert check_inventory(inventory(host("gpu1"), host("gpu2", placement_rack="b"))) == []


def test_wrong_and_unresolved_options_are_told_as_the_validator_says_them() -> None:
    bad = replace(
        host("gpu1"), wrong=("argument 'x' is of type str",), unresolved=(("ray_slot_cache_dir", "'d' is undefined"),)
    )
    found = check_inventory(inventory(bad))
    assert [item.kind for item in found] == ["option", "option"]
    assert "cannot be resolved" in found[0].what
    assert found[1].found == "argument 'x' is of type str"


def secret(tmp_path: Path, content: str = "a" * 64, mode: int = 0o600) -> SecretFile:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    return read_secret(str(path))


def test_a_secret_as_it_should_be_or_still_to_be_made(tmp_path: Path) -> None:
    good = (secret(tmp_path), read_secret(str(tmp_path / "none" / "token")))
    assert check_inventory(inventory(host("gpu1"), secrets=good)) == []


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(" \n", 0o600, "is empty"), ("a", 0o640, "may be read by others"), ("a", 0o604, "may be read by others")],
)
def test_a_secret_that_cannot_be_one(tmp_path: Path, content: str, mode: int, words: str) -> None:
    problem = only(check_inventory(inventory(host("gpu1"), secrets=(secret(tmp_path, content, mode),))))
    assert (problem.kind, problem.objects) == ("secret", ("controller",))
    assert words in problem.what


def test_a_secret_nobody_may_read_or_make() -> None:
    unreadable = SecretFile("/s", 0o600, readable=False)
    nowhere = SecretFile("/s", None, writable=False)
    found = check_inventory(inventory(host("gpu1"), secrets=(unreadable, nowhere)))
    assert ["cannot be read" in found[0].what, "cannot be written" in found[1].what] == [True, True]


def test_an_unreadable_secret_is_seen() -> None:
    # Root may read everything: it looks as nobody, who may not enter pytest's own directories.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "token"
        path.write_text("a" * 64)
        path.chmod(0o000)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            found = read_secret(str(path))
        finally:
            if root:
                os.seteuid(0)
    assert (found.mode, found.readable) == (0o000, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ingress_keys": []}, "an ingress without keys would let nobody in"),
        ({"ingress_keys": [{"name": "a", "key": "S" * 40}]}, "the key of a cannot be used"),
        ({"ingress_keys": [{"name": "a"}], "ingress_burst": 0}, "burst of the key a"),
        ({"ingress_keys": [{"name": "a"}], "serve_apps_http_host": "127.0.0.1"}, "Serve's proxies listen on loopback"),
    ],
)
def test_an_ingress_that_could_not_be(changes: dict[str, Any], words: str) -> None:
    good = {"ingress_keys": [{"name": "a"}], "serve_apps_http_host": "0.0.0.0"}
    hosts = (host("gpu1", **good), host("gpu2", **good))
    groups = {**inventory(*hosts).groups, "ray_ingress": ("gpu1", "edge1")}
    assert check_inventory(inventory(*hosts, groups=groups)) == []
    bad = inventory(host("gpu1", **good | changes), hosts[1], groups=groups)
    problem = only(check_inventory(bad))
    assert (problem.kind, problem.objects) == ("ingress", ("gpu1",))
    assert words in problem.what
    assert "S" * 8 not in str(problem)
