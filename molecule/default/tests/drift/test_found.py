"""The verification names both faults, each on its object, and fails."""

from __future__ import annotations

from tests.lab import Lab


def test_both_faults_are_named(lab: Lab) -> None:
    report = lab.verify()
    assert report["rc"] == 1
    assert not report["ok"]
    found = {(item["kind"], item["object"]) for item in report["failures"]}
    assert ("slot_missing", "gpu02-1") in found
    crowded = next(slot for slot in lab.slots_of("gpu01") if slot["name"] == "gpu01-0")
    assert "chat" in {berth["deployment"] for berth in lab.berths_on("gpu01-0")}
    strangers = [item for item in report["failures"] if item["kind"] == "foreign_process"]
    assert [item["gpu_uuid"] for item in strangers] == crowded["gpu_uuids"]
    for item in report["failures"]:
        assert item["mend"]
