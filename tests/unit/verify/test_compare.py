"""One broken thing per test: its kind, severity, object, numbers, mend and exit code."""

from __future__ import annotations

import pytest

from berth.codec import dump, replace
from berth.gpu.types import GpuProcess
from berth.ray.types import Replica, ServeApp, ServeDeployment
from berth.verify.compare import CRITICAL_XIDS, Finding, Report
from tests.unit.plan.helpers import gpu, host, slot
from tests.unit.verify.scene import A0, A1, B0, CHAT, CLUSTER, EMBED, Lab, _card, app, engine, node


@pytest.fixture
def lab() -> Lab:
    return Lab()


def check(finding: Finding, severity: str, thing: str, uuid: str | None, found: str, wanted: str) -> None:
    assert (finding.severity, finding.object, finding.gpu_uuid) == (severity, thing, uuid)
    assert found in finding.found
    assert wanted in finding.wanted
    assert f"docs/GPU_PLACEMENT_PLAYBOOK.md#{finding.kind}" in finding.mend
    assert all(part in finding.text for part in (finding.kind, finding.object, finding.found, finding.mend))


def test_all_as_wanted(lab):
    report = lab.report()
    assert report.findings == ()
    assert (report.ok, report.exit_code) == (True, 0)
    row = report.rows[0]
    assert (row.slot, row.host, row.index, row.uuid) == ("a-0", "a", 0, A0)
    assert (row.planned_mib, row.ray_mib, row.nvml_mib, row.total_mib) == (21_621, 21_621, 21_420, 45_600)
    assert [(item.berth, item.state, item.pid) for item in row.replicas] == [
        ("chat@a-0", "RUNNING", 101),
        ("chat@a-0", "RUNNING", 102),
        ("embed@a-0", "RUNNING", 104),
    ]
    assert sum(item.vram_mib for item in row.replicas) == row.nvml_mib - 20, "the driver keeps 20 beside its processes"
    assert dump(report)["rows"][1]["planned_mib"] == 0


def growing(lab: Lab, berth: str, reserved: int) -> None:
    berths = [replace(item, reserved=reserved) if item.name == berth else item for item in lab.plan.berths]
    lab.plan = replace(lab.plan, berths=tuple(berths))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_where_serve_scales_any_number_within_the_room_is_as_wanted(lab, count):
    growing(lab, "chat@a-0", 2)
    replicas = [Replica(f"r{number}", "RUNNING", "node-a-0", 100 + number) for number in range(1, count + 1)]
    coming = Replica("r9", "STARTING", "node-a-0", None)
    lab.apps["chat@a-0"] = app("chat@a-0", *replicas, coming)
    assert not {"replica_missing", "replica_extra", "replica_not_running"} & set(lab.kinds())
    assert lab.report().rows[0].planned_mib == 4 * CHAT + EMBED


def test_where_serve_scales_too_few_and_too_many_are_drift(lab):
    growing(lab, "chat@a-0", 1)
    lab.apps["chat@a-0"] = app("chat@a-0", Replica("r1", "RUNNING", "node-a-0", 101))
    check(lab.one("replica_missing"), "drift", "chat@a-0", A0, "1 RUNNING", "2 to 3")
    many = [Replica(f"r{number}", "RUNNING", "node-a-0", 100 + number) for number in range(4)]
    lab.apps["chat@a-0"] = app("chat@a-0", *many)
    check(lab.one("replica_extra"), "drift", "chat@a-0", A0, "4 RUNNING", "2 to 3")


def test_an_app_that_is_nothing_but_room_must_be_there_to_wake(lab):
    growing(lab, "chat@b-0", 1)
    del lab.apps["chat@b-0"]
    check(lab.one("app_missing"), "drift", "chat@b-0", B0, "no such Serve app", "1 to 2 RUNNING on b-0")


def test_what_a_replica_holds_is_not_guessed(lab):
    lab.gpu(A0, processes=None)
    assert {item.vram_mib for item in lab.report().rows[0].replicas} == {None}


def test_ray_refused_is_drift_and_the_driver_is_still_asked(lab):
    lab.ray = {"unreachable": "connection refused at 10.0.0.1:8265", "refused": True}
    lab.gpu(A1, lost="GPU is lost")
    check(lab.one("ray_unreachable"), "drift", "Ray", None, "connection refused", "an answer")
    assert lab.kinds() == ["gpu_lost", "ray_unreachable"]
    assert lab.report().exit_code == 1
    assert lab.report().rows[0].ray_mib is None


def test_ray_silent_is_not_known(lab):
    lab.ray = {"unreachable": "timed out after 10 s"}
    assert lab.one("ray_unreachable").severity == "unknown"
    assert lab.report().exit_code == 2
    assert lab.report().ok is False


def test_a_host_that_could_not_be_asked(lab):
    lab.hosts["b"] = "ssh: no route to host"
    check(lab.one("host_unreachable"), "unknown", "b", None, "no route", "its driver")
    assert lab.kinds() == ["host_unreachable"]
    assert lab.report().exit_code == 2
    assert lab.report().rows[2].nvml_mib is None
    del lab.hosts["b"]
    assert lab.one("host_unreachable").found == "was not asked"


def test_drift_outweighs_unknown(lab):
    lab.hosts["b"] = "ssh: no route to host"
    del lab.nodes["a-1"]
    assert lab.report().exit_code == 1


def test_slot_missing(lab):
    lab.nodes["a-1"] = replace(lab.nodes["a-1"], alive=False)
    check(lab.one("slot_missing"), "drift", "a-1", A1, "no alive Ray node", "one Ray node")


def test_slot_unplanned(lab):
    lab.nodes["c-0"] = node("c-0")
    check(lab.one("slot_unplanned"), "drift", "c-0", None, "node-c-0", "no such slot")


def test_slot_twice(lab):
    lab.nodes["again"] = replace(node("a-1"), node_id="node-again")
    check(lab.one("slot_unplanned"), "drift", "a-1", None, "2 alive Ray nodes", "one Ray node")


def test_slot_wrong_gpu(lab):
    lab.nodes["a-1"] = replace(lab.nodes["a-1"], labels={"berth.slot": "a-1", "berth.gpu": A0})
    check(lab.one("slot_wrong_gpu"), "drift", "a-1", A1, A0, A1)


def test_slot_of_two_gpus_joins_its_labels_and_offers_the_sum(lab):
    pair = slot("c-0", gpus=2)
    lab.plan = replace(lab.plan, slots=(*lab.plan.slots, pair))
    lab.hosts["c"] = replace(lab.hosts["b"], host="c", gpus=tuple(gpu(u, n) for n, u in enumerate(pair.gpu_uuids)))
    good = node("c-0", vram=88_000)
    lab.nodes["c-0"] = replace(good, labels={"berth.slot": "c-0", "berth.gpu": ".".join(pair.gpu_uuids)})
    assert lab.report().ok
    lab.nodes["c-0"] = replace(lab.nodes["c-0"], resources={"VRAM_MB": 44_000.0})
    check(lab.one("slot_wrong_vram"), "drift", "c-0", pair.gpu_uuids[0], "VRAM_MB 44000", "88000 MiB")


def test_slot_wrong_vram(lab):
    lab.nodes["a-1"] = node("a-1", vram=46_068)
    check(lab.one("slot_wrong_vram"), "drift", "a-1", A1, "VRAM_MB 46068", "44000 MiB")
    lab.nodes["a-1"] = replace(lab.nodes["a-1"], resources={})
    assert lab.one("slot_wrong_vram").found == "no VRAM_MB"


def test_app_missing(lab):
    del lab.apps["embed@a-0"]
    check(lab.one("app_missing"), "drift", "embed@a-0", A0, "no such Serve app", "1 RUNNING on a-0")


def test_app_not_running_carries_serves_words(lab):
    lab.apps["embed@a-0"] = replace(lab.apps["embed@a-0"], status="DEPLOY_FAILED", message="OutOfMemoryError: 1.9 GiB")
    check(lab.one("app_not_running"), "drift", "embed@a-0", A0, "DEPLOY_FAILED: OutOfMemoryError: 1.9 GiB", "RUNNING")


def test_replica_missing(lab):
    lab.apps["chat@a-0"] = app("chat@a-0", Replica("r1", "RUNNING", "node-a-0", 101))
    check(lab.one("replica_missing"), "drift", "chat@a-0", A0, "1 RUNNING", "2")
    assert "orphan_process" in lab.kinds()


def test_replica_extra(lab):
    lab.apps["embed@a-0"] = app(
        "embed@a-0", Replica("r4", "RUNNING", "node-a-0", 104), Replica("r5", "RUNNING", "node-a-0", 105)
    )
    lab.process(A0, engine(105, 1_900, "a-0"))
    check(lab.one("replica_extra"), "drift", "embed@a-0", A0, "2 RUNNING", "1")
    assert lab.kinds() == ["replica_extra"]


def test_replica_not_running(lab):
    lab.apps["embed@a-0"] = app("embed@a-0", Replica("r4", "STARTING"), status="DEPLOYING")
    check(lab.one("replica_not_running"), "drift", "embed@a-0 replica r4", A0, "STARTING", "RUNNING")
    assert "orphan_process" not in lab.kinds()


def test_replica_wrong_slot(lab):
    lab.apps["embed@a-0"] = app("embed@a-0", Replica("r4", "RUNNING", "node-a-1", 104))
    check(lab.one("replica_wrong_slot"), "drift", "embed@a-0 replica r4", A0, "on slot a-1", "slot a-0")
    lab.apps["embed@a-0"] = app("embed@a-0", Replica("r4", "RUNNING", "node-head", 104))
    assert "node-head, which is no slot" in lab.one("replica_wrong_slot").found
    assert "orphan_process" not in lab.kinds()


def test_zero_replicas_planned_is_right(lab):
    assert lab.plan.deployments["idle"] == 0
    lab.plan = replace(lab.plan, berths=(*lab.plan.berths, replace(lab.plan.berths[0], deployment="idle", replicas=0)))
    assert lab.report().ok
    lab.apps["idle@a-0"] = app("idle@a-0")
    assert lab.report().ok


def test_gateway_down(lab):
    lab.apps["berth-gateway"] = replace(lab.apps["berth-gateway"], status="UNHEALTHY", message="no route table")
    check(lab.one("gateway_down"), "drift", "berth-gateway", None, "UNHEALTHY: no route table", "RUNNING")
    del lab.apps["berth-gateway"]
    check(lab.one("gateway_down"), "drift", "berth-gateway", None, "no such Serve app", "RUNNING")


def test_no_berths_need_no_gateway(lab):
    lab.plan = replace(lab.plan, berths=())
    lab.apps.clear()
    lab.gpu(A0, processes=(), used_mib=0)
    lab.gpu(B0, processes=(), used_mib=0)
    assert lab.report().ok


@pytest.mark.parametrize("name", ["old@a-1", "old@a-7"])
def test_app_unplanned(lab, name):
    lab.apps[name] = app(name)
    check(lab.one("app_unplanned"), "drift", name, None, "RUNNING", "not in the plan")


@pytest.mark.parametrize("name", ["default", "someone@elsewhere"])
def test_a_foreign_app_is_left_alone(lab, name):
    lab.apps[name] = app(name, Replica("x", "RUNNING", "node-a-0", 555), status="UNHEALTHY")
    assert lab.one("app_foreign").severity == "note"
    assert (lab.report().ok, lab.report().exit_code) == (True, 0)


def test_gpu_missing(lab):
    lab.hosts["a"] = replace(lab.hosts["a"], gpus=lab.hosts["a"].gpus[:1])
    check(lab.one("gpu_missing"), "drift", "a-1 GPU 1", A1, "not shown by a's driver", "present")


def test_a_gpu_that_two_hosts_show(lab):
    lab.hosts["b"] = replace(lab.hosts["b"], gpus=(*lab.hosts["b"].gpus, gpu(A1, 1)))
    check(lab.one("gpu_duplicate"), "drift", "a, b", A1, "shown by a, b", "one host")
    assert lab.report().exit_code == 1


def test_the_same_placeholder_of_lost_cards_on_two_hosts_is_no_duplicate(lab):
    for name in ("a", "b"):
        ghost = gpu("lost-index-7", 7, total=0, lost="GPU is lost")
        lab.hosts[name] = replace(lab.hosts[name], gpus=(*lab.hosts[name].gpus, ghost))
    assert set(lab.kinds()) == {"gpu_lost"}


def test_another_driver_version_is_a_note(lab):
    other = lab.hosts["a"].driver_version
    lab.hosts["b"] = replace(lab.hosts["b"], driver_version="570.10")
    finding = lab.one("driver_mismatch")
    assert (finding.severity, finding.found) == ("note", f"570.10: b; {other}: a")
    assert lab.report().exit_code == 0


def test_gpu_lost_with_its_uuid(lab):
    lab.gpu(A1, lost="GPU is lost")
    check(lab.one("gpu_lost"), "drift", "a-1 GPU 1", A1, "lost GPU at index 1: GPU is lost", "usable")
    assert lab.kinds() == ["gpu_lost"]


def test_gpu_lost_without_its_uuid_is_one_finding_for_the_planned_one(lab):
    ghost = gpu("lost-index-1", 1, total=0, lost="GPU is lost")
    lab.hosts["a"] = replace(lab.hosts["a"], gpus=(lab.hosts["a"].gpus[0], ghost))
    check(lab.one("gpu_lost"), "drift", "a-1 GPU 1", A1, "lost GPU at index 1", "usable")
    assert lab.kinds() == ["gpu_lost"]


def test_a_lost_gpu_that_nothing_is_planned_on_is_a_note(lab):
    ghost = gpu("lost-index-2", 2, total=0, lost="GPU is lost")
    lab.hosts["a"] = replace(lab.hosts["a"], gpus=(*lab.hosts["a"].gpus, ghost))
    assert lab.one("gpu_lost").severity == "note"
    assert lab.report().exit_code == 0


@pytest.mark.parametrize("xid", sorted(CRITICAL_XIDS))
def test_a_critical_xid_is_drift(lab, xid):
    lab.gpu(B0, xid=xid)
    check(lab.one("gpu_xid"), "drift", "b GPU 0", B0, f"XID {xid} (", "no XID")


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 63, 92, 94, 154])
def test_an_xid_that_the_driver_or_ray_deals_with_is_a_note(lab, xid):
    lab.gpu(B0, xid=xid)
    assert lab.one("gpu_xid").severity == "note"
    assert lab.report().exit_code == 0


def test_process_wrong_gpu(lab):
    lab.gpu(A0, processes=tuple(p for p in lab.hosts["a"].gpus[0].processes if p.pid != 202), used_mib=11_620)
    lab.process(A1, engine(202, 9_800, "a-0", parent=102))
    finding = lab.one("process_wrong_gpu")
    check(finding, "drift", "chat@a-0 replica r2", A1, f"pid 202 on GPU 1 ({A1})", A0)
    assert lab.kinds() == ["process_wrong_gpu"]


def test_replica_without_vram(lab):
    lab.gpu(A0, processes=tuple(p for p in lab.hosts["a"].gpus[0].processes if p.pid != 104), used_mib=19_520)
    check(lab.one("replica_without_vram"), "drift", "embed@a-0 replica r4", A0, "pid 104 holds no memory", "1965 MiB")
    assert lab.kinds() == ["replica_without_vram"]


def test_the_same_pid_on_another_host_proves_nothing(lab):
    lab.gpu(B0, processes=(), used_mib=0)
    assert lab.one("replica_without_vram").object == "chat@b-0 replica r3"


@pytest.mark.parametrize("processes", [None, ()])
def test_pids_hidden(lab, processes):
    lab.gpu(B0, processes=processes)
    check(lab.one("pids_hidden"), "unknown", "b-0", B0, "no process", "every process")
    assert lab.kinds() == ["pids_hidden"]
    assert lab.report().exit_code == 2


def test_memory_per_process_hidden(lab):
    lab.gpu(B0, processes=(engine(101, None, "b-0"),))
    check(lab.one("pids_hidden"), "unknown", "b-0", B0, "how much", "every process")
    assert lab.kinds() == ["pids_hidden"]


def test_vram_over_footprint(lab):
    lab.gpu(B0, processes=(engine(101, CHAT + 256, "b-0"),), used_mib=CHAT + 256)
    assert lab.report().ok
    lab.gpu(B0, processes=(engine(101, 9_000, "b-0"), engine(150, 1_085, "b-0", parent=101)), used_mib=10_085)
    check(lab.one("vram_over_footprint"), "drift", "chat@b-0 replica r3", B0, "10085 MiB", f"{CHAT} MiB")


def test_gpu_oversold_by_the_plan_and_by_ray(lab):
    lab.plan = replace(lab.plan, slots=(replace(lab.plan.slots[0], vram_mib=20_000), *lab.plan.slots[1:]))
    lab.nodes["a-0"] = node("a-0", vram=20_000)
    check(lab.one("gpu_oversold"), "drift", "a-0", A0, "21621 MiB by the plan", "20000 MiB at most")
    assert lab.kinds() == ["gpu_oversold"]


def test_vram_unaccounted(lab):
    lab.gpu(A1, used_mib=256)
    assert lab.report().ok
    lab.gpu(A1, used_mib=3_000)
    check(lab.one("vram_unaccounted"), "drift", "a-1", A1, "3000 MiB in use that no process holds", "256 MiB")
    lab.gpu(A1, used_mib=0)
    lab.gpu(A0, used_mib=25_000)
    check(lab.one("vram_unaccounted"), "drift", "a-0", A0, "3600 MiB", "256 MiB")


def test_foreign_process_is_a_note_until_it_takes_what_is_promised(lab):
    lab.process(A0, GpuProcess(7, 20_000, "eve", "python train.py"))
    check(lab.one("foreign_process"), "note", "a-0", A0, "pid 7 python train.py (eve) 20000 MiB", "beside the 21621")
    assert lab.report().exit_code == 0
    lab.process(A0, GpuProcess(8, 3_400, "eve", "python", "other-cluster"))
    check(lab.one("foreign_process"), "drift", "a-0", A0, "pid 8", "at most 23379 MiB")
    assert lab.report().exit_code == 1


def test_orphan_process(lab):
    lab.process(A1, engine(666, 9_000, "a-1"))
    finding = lab.one("orphan_process")
    check(finding, "drift", "pid 666 (VLLM::EngineCore)", A1, f"9000 MiB for cluster {CLUSTER}", "that Ray knows")
    lab.ray = {"unreachable": "timed out"}
    assert "orphan_process" not in lab.kinds()


def test_gpus_in_no_slot_are_in_the_picture(lab):
    lab.hosts["a"] = replace(lab.hosts["a"], gpus=(*lab.hosts["a"].gpus, gpu("GPU-spare", 2, used=12)))
    row = lab.report().rows[-1]
    assert (row.slot, row.host, row.uuid, row.planned_mib, row.ray_mib, row.nvml_mib) == (
        "",
        "a",
        "GPU-spare",
        0,
        None,
        12,
    )


def test_worst_first_and_the_same_every_time(lab):
    lab.hosts["b"] = "ssh: no route to host"
    lab.apps["default"] = app("default")
    del lab.nodes["a-1"]
    del lab.apps["embed@a-0"]
    report = lab.report()
    assert [item.severity for item in report.findings] == ["drift", "drift", "drift", "unknown", "note"]
    lab.apps = dict(reversed(lab.apps.items()))
    lab.nodes = dict(reversed(lab.nodes.items()))
    assert lab.report() == report


def test_exit_codes():
    def code(*severities):
        made = tuple(Finding("k", severity, "o", None, "f", "w", "m", "t") for severity in severities)
        return Report(False, made, ()).exit_code

    assert [code(), code("note"), code("unknown", "note"), code("unknown", "drift")] == [0, 0, 2, 1]


def test_an_orphan_is_not_excused_by_the_same_pid_on_another_host(lab):
    lab.process(B0, engine(104, 1_900, "b-0"))
    assert lab.one("orphan_process").gpu_uuid == B0


def _team(lab):
    """chat's two berths as one replica over a-0 and b-0, each part a deployment of the one app."""
    lab.plan = replace(
        lab.plan,
        berths=tuple(
            replace(berth, replicas=1, team=("a-0", "b-0")) if berth.deployment == "chat" else berth
            for berth in lab.plan.berths
        ),
    )
    parts = (
        ServeDeployment("chat", "HEALTHY", "", 1, (Replica("r1", "RUNNING", "node-a-0", 101),)),
        ServeDeployment("chat~b-0", "HEALTHY", "", 1, (Replica("r3", "RUNNING", "node-b-0", 101),)),
    )
    del lab.apps["chat@b-0"]
    lab.apps["chat@a-0"] = ServeApp("chat@a-0", "RUNNING", "", parts)
    lab.hosts["a"] = host("a", _card(A0, 0, (engine(101, 9_700, "a-0"), engine(104, 1_900, "a-0"))), _card(A1, 1, ()))
    return parts


def test_a_replica_over_two_slots_is_seen_in_both(lab):
    _team(lab)
    report = lab.report()
    assert report.findings == ()
    held = {row.slot: [(item.berth, item.vram_mib) for item in row.replicas] for row in report.rows}
    assert held["b-0"] == [("chat@b-0", 9_750)]
    assert ("chat@a-0", 9_700) in held["a-0"]


def test_a_part_that_does_not_run_is_named(lab):
    leader, _ = _team(lab)
    lab.apps["chat@a-0"] = ServeApp("chat@a-0", "UNHEALTHY", "a part is gone", (leader,))
    lab.hosts["b"] = host("b", _card(B0, 0, ()))
    assert lab.kinds() == ["app_not_running", "replica_missing"]
    assert lab.one("replica_missing").object == "chat@b-0"


def test_a_part_on_another_slot_is_drift(lab):
    leader, node = _team(lab)
    strayed = replace(node, replicas=(Replica("r3", "RUNNING", "node-a-1", 333),))
    lab.apps["chat@a-0"] = ServeApp("chat@a-0", "RUNNING", "", (leader, strayed))
    assert lab.one("replica_wrong_slot").object == "chat@b-0 replica r3"


def _pool(lab: Lab, reserved: int = 0) -> None:
    """chat as a pool of 2 replicas (with ``reserved``, of up to 2 + 2 * reserved) over a-0, a-1 and b-0."""
    chat = next(berth for berth in lab.plan.berths if berth.deployment == "chat")
    embed = tuple(berth for berth in lab.plan.berths if berth.deployment == "embed")
    pooled = tuple(
        replace(chat, slot=name, replicas=count, reserved=1 + reserved - count, pool=2 + 2 * reserved)
        for name, count in (("a-0", 1), ("a-1", 1), ("b-0", 0))
    )
    lab.plan = replace(lab.plan, berths=(*pooled, *embed))
    del lab.apps["chat@a-0"], lab.apps["chat@b-0"]
    lab.hosts["a"] = host("a", _card(A0, 0, (engine(104, 1_900, "a-0"),)), _card(A1, 1, ()))
    lab.hosts["b"] = host("b", _card(B0, 0, ()))
    _stand(lab, ("a-0", 101), ("b-0", 103))


def _stand(lab: Lab, *places: tuple[str, int]) -> None:
    """The pool's replicas: Ray has each on a slot, the driver its memory there."""
    replicas = [Replica(f"r{pid}", "RUNNING", f"node-{name}", pid) for name, pid in places]
    lab.apps["chat@pool"] = app("chat@pool", *replicas)
    for name, pid in places:
        lab.process(f"GPU-{name}-0", engine(pid, 9_700, name))


@pytest.mark.parametrize("places", [("a-0", "a-1"), ("a-0", "b-0"), ("b-0", "a-1")])
def test_a_pools_replicas_may_stand_on_any_of_its_slots(lab, places):
    _pool(lab)
    for uuid in (A0, B0):
        lab.gpu(uuid, processes=(), used_mib=20)
    del lab.apps["embed@a-0"]
    lab.plan = replace(lab.plan, berths=lab.plan.berths[:3])
    _stand(lab, *zip(places, (301, 302), strict=True))
    report = lab.report()
    assert report.findings == ()
    held = {row.slot: [(item.berth, item.pid, item.vram_mib) for item in row.replicas] for row in report.rows}
    assert {slot for slot, here in held.items() if here} == set(places)
    assert held[places[0]] == [("chat@pool", 301, 9_700)]
    assert {row.planned_mib for row in report.rows} == {CHAT}, "each slot is promised its most"


def test_a_pools_replica_on_a_slot_of_the_cluster_that_is_not_the_pools_is_drift(lab):
    _pool(lab)
    lab.plan = replace(lab.plan, berths=tuple(item for item in lab.plan.berths if item.name != "chat@b-0"))
    finding = lab.one("replica_wrong_slot")
    check(finding, "drift", "chat@pool replica r103", None, "on slot b-0", "a slot in the pool of 2 slots (a-0, a-1)")
    assert lab.report().exit_code == 1


def test_a_pools_replica_on_no_slot_is_drift(lab):
    _pool(lab)
    lab.apps["chat@pool"] = app(
        "chat@pool", Replica("r1", "RUNNING", "node-a-0", 101), Replica("r2", "RUNNING", "x", 9)
    )
    assert lab.one("replica_wrong_slot").found == "on Ray node x, which is no slot"


def test_more_of_a_pool_on_a_slot_than_it_is_reserved_for_is_drift(lab):
    _pool(lab)
    _stand(lab, ("a-0", 110), ("a-0", 111))
    check(lab.one("replica_extra"), "drift", "chat@a-0", A0, "2 RUNNING of the pool chat@pool", "1 at most")


@pytest.mark.parametrize(("count", "kinds"), [(1, ["replica_missing"]), (3, ["replica_extra"])])
def test_a_pool_of_a_fixed_size_has_that_size(lab, count, kinds):
    _pool(lab)
    _stand(lab, *[("a-0", 101), ("b-0", 103), ("a-1", 105)][:count])
    found = [finding for finding in lab.report().findings if finding.kind.startswith("replica")]
    assert [finding.kind for finding in found] == kinds
    check(found[0], "drift", "chat@pool", None, f"{count} RUNNING", "2 in the pool of 3 slots (a-0, a-1, b-0)")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_pool_that_serve_scales_is_as_wanted_within_its_bounds(lab, count):
    _pool(lab, reserved=1)
    _stand(lab, *[("a-0", 101), ("b-0", 103), ("a-1", 105), ("a-1", 106)][:count])
    pool = lab.apps["chat@pool"]
    coming = Replica("r9", "STARTING", None, None)
    deployment = replace(pool.deployments[0], replicas=(*pool.deployments[0].replicas, coming))
    lab.apps["chat@pool"] = replace(pool, deployments=(deployment,))
    # It is starting somewhere in the pool: its memory there is nobody's yet.
    lab.process(B0, engine(999, 4_000, "b-0"))
    assert not {kind for kind in lab.kinds() if kind.startswith(("replica", "app", "orphan"))}


@pytest.mark.parametrize(("count", "kind"), [(1, "replica_missing"), (5, "replica_extra")])
def test_a_pool_out_of_its_bounds_is_drift(lab, count, kind):
    _pool(lab, reserved=1)
    _stand(lab, *[("a-0", 101), ("a-0", 102), ("b-0", 103), ("b-0", 104), ("a-1", 105)][:count])
    check(lab.one(kind), "drift", "chat@pool", None, f"{count} RUNNING", "2 to 4 in the pool of 3 slots")


def test_a_starting_replica_of_a_pool_does_not_excuse_memory_elsewhere(lab):
    _pool(lab, reserved=1)
    lab.plan = replace(lab.plan, berths=tuple(item for item in lab.plan.berths if item.name != "chat@b-0"))
    lab.apps["chat@pool"] = app("chat@pool", Replica("r9", "STARTING", None, None))
    lab.process(B0, engine(999, 4_000, "b-0"))
    assert "pid 999" in [item.object[:7] for item in lab.report().findings if item.kind == "orphan_process"]


def test_a_pools_process_on_another_gpu_of_the_pool_than_its_replicas_is_drift(lab):
    _pool(lab)
    lab.apps["chat@pool"] = app(
        "chat@pool", Replica("r101", "RUNNING", "node-a-0", 101), Replica("r102", "RUNNING", "node-a-1", 102)
    )
    lab.gpu(B0, processes=(), used_mib=20)
    lab.process(A0, engine(102, 9_700, "a-1"))
    check(lab.one("process_wrong_gpu"), "drift", "chat@pool replica r102", A0, "pid 102 on GPU 0", f"a-1: {A1}")


def test_a_pools_replica_over_its_footprint_is_drift(lab):
    _pool(lab)
    lab.process(B0, engine(103, 1_000, "b-0"))
    check(lab.one("vram_over_footprint"), "drift", "chat@pool replica r103", B0, "10700 MiB", f"{CHAT} MiB")


def test_a_pool_that_is_not_there_is_named_with_its_slots(lab):
    _pool(lab, reserved=1)
    del lab.apps["chat@pool"]
    wanted = "2 to 4 RUNNING in the pool of 3 slots (a-0, a-1, b-0)"
    check(lab.one("app_missing"), "drift", "chat@pool", None, "no such Serve app", wanted)


def test_a_pool_that_does_not_run_is_drift(lab):
    _pool(lab)
    lab.apps["chat@pool"] = replace(lab.apps["chat@pool"], status="UNHEALTHY", message="two are gone")
    check(lab.one("app_not_running"), "drift", "chat@pool", None, "UNHEALTHY: two are gone", "RUNNING")


def test_what_is_left_of_the_berths_beside_the_pool_is_unplanned_and_none_of_its_replicas(lab):
    _pool(lab)
    lab.apps["chat@a-1"] = app("chat@a-1", Replica("old", "RUNNING", "node-a-1", 77))
    assert lab.one("app_unplanned").object == "chat@a-1"
    assert not {"replica_extra", "replica_missing"} & set(lab.kinds())


def test_a_pool_that_is_left_beside_the_berths_is_unplanned(lab):
    lab.apps["chat@pool"] = app("chat@pool", Replica("old", "RUNNING", "node-a-1", 77))
    assert lab.one("app_unplanned").object == "chat@pool"
