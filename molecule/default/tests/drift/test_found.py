"""The verification names both faults, each on its object, and fails."""

from __future__ import annotations

from tests.lab import Lab


def test_both_faults_are_named(lab: Lab) -> None:
    report = lab.verify()
    assert report["rc"] == 1
    assert not report["ok"]
    found = {(item["kind"], item["object"]) for item in report["failures"]}
    assert ("slot_missing", "gpu02-1") in found
    strangers = [item for item in report["failures"] if item["kind"] == "foreign_process"]
    assert len(strangers) == 1
    assert strangers[0]["gpu_uuid"] == lab.slots_of("gpu01")[1]["gpu_uuids"][0]
    for item in report["failures"]:
        assert item["mend"]
