"""Passes of the rollout over HTTP, against a server that plays Ray's dashboard."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from berth.errors import BerthError, CouldNotTell
from berth.plan.types import Plan
from berth.ray.client import RayClient, Refused, read_token
from berth.ray.deploy import check_feasible, failure_logs, lives, missing_slots, reconcile, rehearse, stuck, watch
from berth.ray.rollout import Wanted, next_step
from berth.ray.serve_config import GATEWAY, gateway_app, gateway_table
from berth.ray.state import parse_state, read_state
from tests.unit.ray.builders import OPTIONS, app, node, plan, pool, replica, serve_app, slot, wanted
from tests.unit.ray.dashboard import TOKEN, Dashboard

CAPACITY = {"gpu01-0": 8_000, "gpu01-1": 8_000}
NOTES = {"name": "notes", "route_prefix": "/notes", "import_path": "notes:app", "runtime_env": {"env_vars": {}}}
NODES = [node("gpu01-0", node_id="n1"), node("gpu01-1", node_id="n2")]


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    found = Dashboard(nodes=list(NODES))
    server = found.serve()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(dashboard: Dashboard) -> RayClient:
    return RayClient(dashboard.address, TOKEN, timeout_s=5)


def aim(*berths: tuple[str, str, int, int]) -> tuple[Plan, Wanted]:
    """A plan of these berths and the rollout's aim for it."""
    made = plan([slot(name) for name in CAPACITY], berths)
    return made, wanted([app(*berth) for berth in berths], CAPACITY)


def running(*berths: tuple[str, str, int, int]) -> dict[str, Any]:
    """Serve's applications with these berths, their gateway and a foreign app."""
    apps = [app(*berth) for berth in berths]
    table = gateway_table([item["args"]["model"] for item in apps], apps)
    everything = [NOTES, *apps, gateway_app(table, OPTIONS)]
    return {item["name"]: serve_app(item) for item in everything}


CHAT = ("chat", "gpu01-0", 1, 2_000)
RERANK = ("rerank", "gpu01-1", 1, 2_000)


def put(dashboard: Dashboard) -> list[str]:
    return [item["name"] for item in dashboard.puts[-1]["applications"]]


# ---- one pass ------------------------------------------------------------------------------------------------


def test_a_pass_takes_one_step_and_says_which(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.applications = {"notes": serve_app(NOTES)}
    outcome = reconcile(client, *aim(CHAT, RERANK), retry_failed=True)
    assert (outcome.kind, outcome.changed) == ("put", True)
    assert outcome.text == "make chat@gpu01-0, rerank@gpu01-1"
    assert put(dashboard) == ["notes", "chat@gpu01-0", "rerank@gpu01-1", GATEWAY]
    config = dashboard.puts[0]
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8000}
    assert config["proxy_location"] == "EveryNode"
    assert config["applications"][0] == NOTES


def test_a_pass_over_what_is_as_planned_changes_nothing(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.applications = running(CHAT)
    outcome = reconcile(client, *aim(CHAT), retry_failed=True)
    assert (outcome.kind, outcome.changed, outcome.text) == ("done", False, "as planned")
    assert dashboard.puts == []


def test_a_pass_that_waits_tells_how_far_it_is(dashboard: Dashboard, client: RayClient) -> None:
    two = ("chat", "gpu01-0", 2, 2_000)
    dashboard.applications = running(two)
    shown = [replica("chat"), replica("chat", "STARTING", 1)]
    dashboard.applications["chat@gpu01-0"] = serve_app(app(*two), "DEPLOYING", shown)
    outcome = reconcile(client, *aim(two), retry_failed=False)
    assert (outcome.kind, outcome.text) == ("wait", "chat@gpu01-0 to run [chat@gpu01-0 deploying 1/2]")


def test_a_pass_waits_for_what_drains(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.applications = running(CHAT) | {"rerank@gpu01-1": serve_app(None, "DELETING")}
    outcome = reconcile(client, *aim(CHAT), retry_failed=False)
    assert outcome.kind == "wait"
    assert outcome.text == "rerank@gpu01-1 to drain and stop [rerank@gpu01-1 deleting 0/0]"


def test_a_step_that_takes_a_model_down_says_so(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.applications = running(("chat", "gpu01-0", 1, 8_000), ("rerank", "gpu01-1", 1, 8_000))
    swapped = aim(("chat", "gpu01-1", 1, 8_000), ("rerank", "gpu01-0", 1, 8_000))
    assert reconcile(client, *swapped, retry_failed=False).down == ("chat", "rerank")


def test_a_slot_that_has_not_joined_is_waited_for(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.nodes = [NODES[0], node("gpu01-1", node_id="n2", state="DEAD")]
    outcome = reconcile(client, *aim(CHAT, RERANK), retry_failed=True)
    assert (outcome.kind, outcome.text) == ("wait", "slots gpu01-1 to join the Ray cluster")
    assert dashboard.puts == []


def test_a_pass_looks_on_while_nothing_else_is_waited_for(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.nodes, known = [NODES[0]], "slots gpu01-1 to join the Ray cluster"

    def looks(known: str, watch_s: float) -> int:
        dashboard.queries.clear()
        outcome = watch(client, *aim(RERANK), True, known, watch_s, every_s=0.01)
        assert (outcome.kind, outcome.text) == ("wait", "slots gpu01-1 to join the Ray cluster")
        return sum(path == "/api/v0/nodes" for path, _ in dashboard.queries)

    assert looks("", 60) == 1, "what is new is told at once"
    assert looks(known, 0) == 1
    assert looks(known, 0.3) > 1
    joins = threading.Timer(0.2, lambda: dashboard.nodes.extend(NODES[1:]))
    joins.start()
    assert watch(client, *aim(RERANK), True, known, 60, every_s=0.01).kind == "put"
    joins.join()


def test_slots_without_a_berth_are_waited_for_once_the_rest_is_done(dashboard: Dashboard, client: RayClient) -> None:
    made, _ = aim(CHAT)
    assert missing_slots(made, parse_state([NODES[0]], {}), holding=True) == []
    assert missing_slots(made, parse_state([], {}), holding=True) == ["gpu01-0"]
    dashboard.nodes = [NODES[0]]
    assert reconcile(client, *aim(CHAT), retry_failed=True).kind == "put", "the rollout does not wait for them"
    dashboard.applications = running(CHAT)
    outcome = reconcile(client, *aim(CHAT), retry_failed=False)
    assert (outcome.kind, outcome.joining) == ("wait", True)
    assert outcome.text == "slots gpu01-1 to join the Ray cluster"


# ---- what Ray would let pend for ever ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"CPU": 8, "GPU": 1, "VRAM_MB": 1_999}, "its Ray node has 1999 VRAM_MB, 2000 are asked for; mend: ansible-"),
        ({"CPU": 0.25, "GPU": 1, "VRAM_MB": 8_000}, "has 0.25 CPU, 0.5 are asked for; mend: set num_cpus of the apps"),
        ({"CPU": 8, "VRAM_MB": 8_000}, "its Ray node has 0 GPU, 0.01 are asked for; mend: ansible-playbook"),
    ],
)
def test_what_a_node_cannot_hold_is_refused(
    dashboard: Dashboard, client: RayClient, resources: dict[str, float], message: str
) -> None:
    dashboard.nodes = [node("gpu01-0", resources)]
    with pytest.raises(BerthError, match=f"slot gpu01-0 cannot hold what the plan puts there: .*{message}"):
        reconcile(client, *aim(CHAT), retry_failed=True)
    assert dashboard.puts == []


def test_the_sum_over_a_slots_berths_counts_and_the_last_mib_fits() -> None:
    made, to_be = aim(("chat", "gpu01-0", 2, 3_000), ("rerank", "gpu01-0", 1, 2_000))
    check_feasible(made, to_be, parse_state([node("gpu01-0")], {}))
    short = node("gpu01-0", {"CPU": 8, "GPU": 1, "VRAM_MB": 7_999})
    with pytest.raises(BerthError, match="has 7999 VRAM_MB, 8000 are asked for"):
        check_feasible(made, to_be, parse_state([short], {}))


def test_a_dead_node_of_the_same_slot_counts_for_nothing() -> None:
    made, to_be = aim(CHAT)
    dead = node("gpu01-0", {"CPU": 1}, node_id="z9", state="DEAD")
    check_feasible(made, to_be, parse_state([NODES[0], dead], {}))


# ---- failures, with what the log says ------------------------------------------------------------------------


def failing(message: str = "The deployment failed to start 3 times in a row.") -> dict[str, Any]:
    dead = [replica("chat", "STOPPED", 7, node_id="n1")]
    config = app("chat", "gpu01-0", 2)
    shown = [replica("chat"), replica("chat", "STARTING", 1)]
    return running(CHAT) | {"chat@gpu01-0": serve_app(config, "DEPLOY_FAILED", shown, message, dead)}


def test_a_failed_app_ends_the_rollout_with_its_log(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.applications = failing()
    dashboard.logs["serve/replica_chat7.log"] = "INFO start\nValueError: no such model\n"
    with pytest.raises(BerthError) as error:
        reconcile(client, *aim(("chat", "gpu01-0", 2, 2_000)), retry_failed=False)
    assert str(error.value) == (
        "chat@gpu01-0 failed to deploy: The deployment failed to start 3 times in a row.\n"
        "--- chat@gpu01-0 chat7: /serve/replica_chat7.log\nINFO start\nValueError: no such model"
    )
    path, query = dashboard.queries[-1]
    assert path == "/api/v0/logs/file"
    assert query == {"node_id": "n1", "filename": "serve/replica_chat7.log", "lines": "30"}


def test_the_log_of_a_failure_is_found_behind_replicas_that_run(dashboard: Dashboard, client: RayClient) -> None:
    config = app("chat", "gpu01-0", 3)
    shown = [replica("chat", number=number) for number in range(3)]
    dead = [replica("chat", "STOPPED", number) for number in range(3, 6)]
    dashboard.logs = {f"serve/replica_chat{number}.log": f"log {number}" for number in range(6)}
    told = failure_logs(client, {"applications": {"chat@gpu01-0": serve_app(config, "UNHEALTHY", shown, "", dead)}})
    assert told.count("---") == 2
    assert "log 0" not in told
    assert "log 3" in told


def test_foreign_failures_are_not_ours_to_tell(dashboard: Dashboard, client: RayClient) -> None:
    config = {**NOTES, "deployments": [{"name": "notes"}]}
    dashboard.logs["serve/replica_notes0.log"] = "private"
    shown = [replica("notes", "STOPPING")]
    dashboard.applications = {"notes": serve_app(config, "DEPLOY_FAILED", shown)}
    assert failure_logs(client, {"applications": dashboard.applications}) == ""
    assert stuck(client) == ""


def test_a_log_that_ray_does_not_give_is_left_out(dashboard: Dashboard, client: RayClient) -> None:
    assert client.log_tail("n1", "/serve/none.log") == ""
    dashboard.applications = failing("out of memory")
    with pytest.raises(BerthError, match=r"^chat@gpu01-0 failed to deploy: out of memory$"):
        reconcile(client, *aim(("chat", "gpu01-0", 2, 2_000)), retry_failed=False)


def test_what_failed_before_is_cleared_on_the_first_pass(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.applications = failing()
    outcome = reconcile(client, *aim(("chat", "gpu01-0", 2, 2_000)), retry_failed=True)
    assert outcome.text == "clear what failed before: chat@gpu01-0"
    assert put(dashboard) == ["notes", GATEWAY]


def test_why_a_rollout_is_stuck(dashboard: Dashboard, client: RayClient) -> None:
    pending = serve_app(app(*CHAT), "DEPLOYING", [replica("chat", "STARTING")])
    pending["deployments"]["chat"]["message"] = "1 replicas have taken more than 30s to be scheduled.\n"
    dashboard.applications = running(RERANK) | {"chat@gpu01-0": pending}
    assert stuck(client) == "\nchat@gpu01-0: DEPLOYING 1 replicas have taken more than 30s to be scheduled."


# ---- check mode ----------------------------------------------------------------------------------------------


def why(serve: dict[str, Any], to_be: Wanted) -> list[str]:
    return [step.why for step in rehearse(serve, to_be)]


def test_a_rehearsal_names_every_step_and_takes_none() -> None:
    _, to_be = aim(CHAT, RERANK)
    make = ["make chat@gpu01-0, rerank@gpu01-1", "switch the gateway's table"]
    assert why({}, to_be) == make
    assert why({"applications": {"default": serve_app({"import_path": "a:b", "route_prefix": "/a"})}}, to_be) == make
    assert why({"applications": running(CHAT, RERANK)}, to_be) == []


def test_a_rehearsal_of_a_flip_of_a_failure_and_of_a_removal() -> None:
    moved = ("chat", "gpu01-1", 1, 2_000)
    serve = {"applications": running(CHAT)}
    assert why(serve, aim(moved)[1]) == ["make chat@gpu01-1", "switch the gateway's table", "break chat@gpu01-0"]
    assert why(serve, wanted([], CAPACITY)) == ["remove the gateway", "break chat@gpu01-0"]
    first, *rest = why({"applications": failing()}, aim(("chat", "gpu01-0", 2, 2_000))[1])
    assert first == "clear what failed before: chat@gpu01-0"
    assert "make chat@gpu01-0" in rest


def test_a_rehearsal_looks_past_what_drains_or_starts() -> None:
    serve = {"applications": running(CHAT) | {"rerank@gpu01-0": serve_app(None, "DELETING")}}
    serve["applications"]["chat@gpu01-0"] = serve_app(app(*CHAT), "DEPLOYING", [replica("chat", "STOPPING")])
    assert why(serve, aim(CHAT)[1]) == []


# ---- reading Serve's answer ----------------------------------------------------------------------------------


def test_replicas_that_stop_still_hold_their_memory() -> None:
    config = app("chat", "gpu01-0")
    shown = [replica("chat"), replica("chat", "STOPPING", 1), replica("chat", "STOPPING", 2)]
    serve = {"applications": running(CHAT) | {"chat@gpu01-0": serve_app(config, replicas=shown)}}
    found = lives(serve)["chat@gpu01-0"]
    assert (found.running, found.stopping) == (1, 2)
    full = wanted([config, app("rerank", "gpu01-0", 1, 6_000)], CAPACITY)
    assert next_step(lives(serve), full).kind != "put" or "rerank" not in next_step(lives(serve), full).why


def test_a_pool_may_hold_memory_where_it_is_allowed_and_where_its_replicas_still_are() -> None:
    config = pool("chat", "gpu01-0", "gpu01-1")
    held = [replica("a", "STOPPING", node_id="n3"), replica("b", node_id="n1"), replica("c", node_id="strange")]
    serve = {"applications": {"chat@pool": serve_app(config, replicas=held)}}
    assert lives(serve)["chat@pool"].slots == ("gpu01-0", "gpu01-1")
    nodes = {"n1": "gpu01-0", "n3": "gpu02-0"}
    assert lives(serve, nodes)["chat@pool"].slots == ("gpu01-0", "gpu01-1", "gpu02-0")
    # Serve forgets the config of an app that it deletes, and not that of its deployments.
    serve["applications"]["chat@pool"] |= {"status": "DELETING", "deployed_app_config": None}
    assert lives(serve)["chat@pool"].slots == ("gpu01-0", "gpu01-1")


def test_a_pass_leaves_alone_what_a_pool_has_not_yet_left(dashboard: Dashboard, client: RayClient) -> None:
    capacity = {"gpu01-0": 8_000, "gpu01-1": 8_000}
    config = pool("chat", "gpu01-1", count=1, vram=8_000)
    still = [replica("a", node_id="n1"), replica("b", "STARTING")]
    dashboard.applications = {"chat@pool": serve_app(config, "DEPLOYING", still)}
    made = plan([slot(name) for name in capacity], [RERANK])
    rerank = app("rerank", "gpu01-0", vram=8_000)
    reconcile(client, made, wanted([config, rerank], capacity), retry_failed=True)
    assert put(dashboard) == ["chat@pool", GATEWAY], "rerank has no room before the pool's replica has left n1"
    dashboard.applications = {"chat@pool": serve_app(config, "RUNNING", [replica("b", node_id="n2")])}
    reconcile(client, made, wanted([config, rerank], capacity), retry_failed=True)
    assert put(dashboard) == ["chat@pool", "rerank@gpu01-0", GATEWAY]


def test_a_slot_must_hold_all_that_a_pool_may_put_there() -> None:
    config = pool("chat", "gpu01-0", "gpu01-1", count=2, each=2, vram=5_000)
    state = parse_state(NODES, {})
    with pytest.raises(BerthError, match=r"slot gpu01-0 cannot hold .* 8000 VRAM_MB, 10000 are asked for"):
        check_feasible(plan([], []), wanted([config], CAPACITY), state)


def test_an_apps_message_and_its_deployments_are_told_once() -> None:
    details = serve_app(app(*CHAT), "DEPLOY_FAILED", message="no")
    details["deployments"]["chat"]["message"] = "no"
    assert lives({"applications": {"chat@gpu01-0": details}})["chat@gpu01-0"].message == "no"


def test_an_app_deployed_by_hand_is_told_from_ours_by_its_missing_config() -> None:
    details = serve_app(None) | {"route_prefix": "/lab"}
    found = lives({"applications": {"chat@home": details}})["chat@home"]
    assert (found.ours, found.route) == (False, "/lab")


# ---- the wire ------------------------------------------------------------------------------------------------


def test_without_the_token_ray_refuses_and_berth_says_what_to_do(dashboard: Dashboard) -> None:
    with pytest.raises(CouldNotTell, match=r"refuses our token; found: HTTP 401; mend: .*teardown.yml and site.yml"):
        RayClient(dashboard.address).serve()
    assert "refuses our token" in (read_state(RayClient(dashboard.address, "wrong")).unreachable or "")


def test_a_cluster_without_a_token_is_asked_without_one(dashboard: Dashboard) -> None:
    dashboard.token = ""
    assert RayClient(dashboard.address).serve()["applications"] == {}


def test_nobody_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(Refused, match=r"does not answer at http://127.0.0.1.*; mend: look at the unit berth-ray-h"):
            RayClient(address).serve()
        state = read_state(RayClient(address))
    assert state.refused
    assert "does not answer" in (state.unreachable or "")


def test_an_unknown_host_or_a_cut_connection_is_not_a_head_that_is_down() -> None:
    assert not read_state(RayClient("http://no-such-host.invalid:1", timeout_s=2)).refused
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        state = read_state(RayClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2))
    assert not state.refused
    assert "did not answer within 0.2 s" in (state.unreachable or "")


def test_a_slow_answer_is_given_up(dashboard: Dashboard) -> None:
    dashboard.slow_s = 1.0
    with pytest.raises(CouldNotTell, match=r"did not answer within 0\.1 s"):
        RayClient(dashboard.address, TOKEN, timeout_s=0.1).nodes()


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/api/serve/applications/", (503, "The GCS may be down"), "HTTP 503: The GCS may be down"),
        ("/api/v0/nodes", (500, '{"result": false, "msg": "Failed to query GCS"}'), "HTTP 500: .*Failed to query GCS"),
        ("/api/serve/applications/", (200, "<html>another server</html>"), "not Ray's; found: .*another server"),
        ("/api/serve/applications/", (200, "[1]"), "not Ray's; found: "),
        ("/api/v0/nodes", (200, '{"result": true, "data": null}'), "not Ray's; found: "),
    ],
)
def test_an_answer_that_is_none_is_could_not_tell(
    dashboard: Dashboard, client: RayClient, path: str, answer: tuple[int, str], message: str
) -> None:
    dashboard.answers[path] = answer
    outcome = reconcile(client, *aim(CHAT), retry_failed=False)
    assert (outcome.kind, outcome.joining) == ("wait", True), "a head that is coming up is waited for"
    state = read_state(client)
    assert re.search(message, state.unreachable or "")
    assert not state.refused


def test_a_config_that_serve_refuses_is_an_error_with_serves_words(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.answers["/api/serve/applications/"] = (400, "1 validation error for ServeDeploySchema")
    with pytest.raises(BerthError, match=r"refused PUT /api/serve.*HTTP 400: 1 validation error") as error:
        client.put_serve({})
    assert not isinstance(error.value, CouldNotTell)


def test_no_proxy_of_the_environment_stands_between(
    dashboard: Dashboard, client: RayClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert client.nodes() == NODES


def test_the_state_is_read_whole(dashboard: Dashboard, client: RayClient) -> None:
    dashboard.applications = running(CHAT)
    state = read_state(client)
    assert state.unreachable is None
    assert [item.slot for item in state.nodes] == ["gpu01-0", "gpu01-1"]
    assert [item.name for item in state.apps] == [GATEWAY, "chat@gpu01-0", "notes"]


def test_the_token_file(tmp_path: Any) -> None:
    (tmp_path / "token").write_text("abc\n", encoding="utf-8")
    assert read_token(str(tmp_path / "token")) == "abc"
    with pytest.raises(BerthError, match=r"cannot be read from .*none; found: No such file or directory; mend: "):
        read_token(str(tmp_path / "none"))
