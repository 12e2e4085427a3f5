"""Ray's REST answers, as Ray 2.60 gives them, become the witness that verification reads."""

from __future__ import annotations

from berth.ray.state import parse_state
from berth.ray.types import RayState, Replica
from tests.unit.ray.builders import app, node, replica, serve_app


def test_a_running_app() -> None:
    serve = {"applications": {"chat@gpu01-0": serve_app(app("chat", "gpu01-0", 2))}}
    state = parse_state([node("gpu01-0")], serve)
    (ray_node,) = state.nodes
    assert (ray_node.node_id, ray_node.alive, ray_node.slot, ray_node.is_head) == ("n1", True, "gpu01-0", False)
    assert ray_node.resources == {"CPU": 8.0, "GPU": 1.0, "VRAM_MB": 8_000.0}
    (deployment,) = state.apps[0].deployments
    assert (state.apps[0].name, state.apps[0].status) == ("chat@gpu01-0", "RUNNING")
    assert (deployment.name, deployment.status, deployment.target_replicas) == ("chat", "HEALTHY", 2)
    assert deployment.replicas == (
        Replica("chat0", "RUNNING", "n1", 4_000, "/serve/replica_chat0.log"),
        Replica("chat1", "RUNNING", "n1", 4_001, "/serve/replica_chat1.log"),
    )


def test_a_starting_replica_has_neither_node_nor_pid() -> None:
    config = app("chat", "gpu01-0")
    serve = {"applications": {"chat@gpu01-0": serve_app(config, "DEPLOYING", [replica("chat", "STARTING")])}}
    (deployment,) = parse_state([], serve).apps[0].deployments
    assert deployment.replicas == (Replica("chat0", "STARTING"),)


def test_an_app_that_is_being_deleted_or_built_shows_no_deployment() -> None:
    serve = {"applications": {"a@s": serve_app(None, "DELETING"), "b@s": serve_app({"name": "b@s"}, "DEPLOYING")}}
    assert [(item.name, item.status, item.deployments) for item in parse_state([], serve).apps] == [
        ("a@s", "DELETING", ()),
        ("b@s", "DEPLOYING", ()),
    ]


def test_the_order_of_the_answer_does_not_matter() -> None:
    config = app("chat", "gpu01-0", 2)
    shown = [replica("chat", number=1), replica("chat", number=0)]
    nodes = [node("gpu01-0", node_id="b"), node("gpu01-1", node_id="a")]
    one = parse_state(nodes, {"applications": {"chat@gpu01-0": serve_app(config, replicas=shown)}})
    other = parse_state(nodes[::-1], {"applications": {"chat@gpu01-0": serve_app(config, replicas=shown[::-1])}})
    assert one == other


def test_nodes_that_are_dead_heads_or_bare() -> None:
    state = parse_state(
        [
            node("gpu01-0", node_id="a", state="DEAD", resources_total={}),
            node("x", node_id="b", is_head_node=True, labels={"berth.role": "head"}),
            {"node_id": "c", "state": "ALIVE", "labels": None, "resources_total": None},
        ],
        {},
    )
    assert [(item.alive, item.is_head, item.slot) for item in state.nodes] == [
        (False, False, "gpu01-0"),
        (True, True, None),
        (True, False, None),
    ]


def test_no_serve_instance_is_no_app() -> None:
    assert parse_state([], {"applications": {}}) == parse_state([], {}) == RayState()
