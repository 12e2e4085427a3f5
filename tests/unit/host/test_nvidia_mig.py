"""MIG layouts: compared, carried out in the right order, refused on a GPU that is in use."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.host.nvidia_mig import MigDecision, MigGpu, MigWanted, decide, refuse
from berth.plan.store import berths_by_gpu
from berth.plan.types import Berth, Plan, Slot

ROOT = Path(__file__).resolve().parents[3]
WHOLE = MigGpu("GPU-a", 0, "NVIDIA H200", enabled=False, pending=False)
SPLIT = replace(WHOLE, enabled=True, pending=True, instances=(("3g.71gb", "MIG-1"), ("3g.71gb", "MIG-2")))
HALVES = (MigWanted("0", ("3g.71gb", "3g.71gb")),)


def carried_out(gpu: MigGpu, decision: MigDecision) -> MigGpu:
    """The GPU after nvidia-smi did what it was told."""
    for command in decision.commands:
        if "-dgi" in command:
            gpu = replace(gpu, instances=())
        elif "-cgi" in command:
            assert gpu.enabled, "instances need the mode"
            profiles = command[command.index("-cgi") + 1].split(",")
            gpu = replace(gpu, instances=tuple((profile, f"MIG-{n}") for n, profile in enumerate(profiles)))
        elif "-mig" in command:
            assert not gpu.instances, "the mode is switched on an empty GPU"
            gpu = replace(gpu, enabled=command[-1] == "1", pending=command[-1] == "1")
    return gpu


def test_a_whole_gpu_is_split() -> None:
    decision = decide([WHOLE], HALVES, {})
    assert decision.commands == (
        ("nvidia-smi", "-i", "GPU-a", "-mig", "1"),
        ("nvidia-smi", "mig", "-i", "GPU-a", "-cgi", "3g.71gb,3g.71gb", "-C"),
    )
    assert decide([carried_out(WHOLE, decision)], HALVES, {}) == MigDecision()


def test_a_split_gpu_is_made_whole_by_uuid() -> None:
    decision = decide([SPLIT], (MigWanted("GPU-a"),), {})
    assert [command[-1] for command in decision.commands] == ["-dci", "-dgi", "0"]
    assert carried_out(SPLIT, decision) == WHOLE


def test_gpus_that_are_not_named_stay() -> None:
    assert decide([WHOLE, replace(SPLIT, uuid="GPU-b", index=1)], HALVES[:0], {}) == MigDecision()


@pytest.mark.parametrize(
    ("gpu", "occupied", "named"),
    [
        (replace(WHOLE, pids=(4711,)), {}, "pid 4711"),
        (WHOLE, {"GPU-a": ["chat@gpu01-0"]}, "berth chat@gpu01-0"),
    ],
)
def test_a_gpu_in_use_is_refused_by_name(gpu: MigGpu, occupied: dict[str, list[str]], named: str) -> None:
    other = replace(WHOLE, uuid="GPU-b", index=1)
    decision = decide([gpu, other], (*HALVES, MigWanted("1", ("7g.141gb",))), occupied)
    assert decision.commands == (), "no GPU is changed while one is refused"
    with pytest.raises(BerthError, match=named):
        refuse(decision)


def test_a_berth_on_an_instance_counts() -> None:
    decision = decide([SPLIT], (MigWanted("0"),), {"MIG-2": ["embedding@gpu01-1"]})
    assert "embedding@gpu01-1" in decision.findings[0].found


@pytest.mark.parametrize(
    ("gpu", "kind"),
    [
        (replace(WHOLE, enabled=None, pending=None), "mig-not-supported"),
        (replace(WHOLE, pending=True), "mig-reset-needed"),
        (replace(WHOLE, index=5), "mig-gpu-unknown"),
    ],
)
def test_what_cannot_be_is_told(gpu: MigGpu, kind: str) -> None:
    assert [finding.kind for finding in decide([gpu], HALVES, {}).findings] == [kind]


def test_the_plan_tells_who_is_on_a_gpu() -> None:
    slot = Slot(
        name="gpu01-0",
        host="gpu01",
        gpu_uuids=("GPU-a",),
        gpu_indices=(0,),
        product="NVIDIA H200",
        vram_mib=1,
        total_mib=1,
    )
    other = dataclasses.replace(slot, name="gpu02-0", host="gpu02", gpu_uuids=("GPU-b",))
    berths = tuple(Berth("chat", name, 1, 1, "") for name in ("gpu01-0", "gpu02-0"))
    plan = Plan("pack", (slot, other), berths)
    assert berths_by_gpu(plan, "gpu01") == {"GPU-a": ["chat@gpu01-0"]}
    assert berths_by_gpu(None, "gpu01") == {}


profiles = st.lists(st.sampled_from(["1g.18gb", "2g.35gb", "3g.71gb"]), max_size=4).map(tuple)


@given(profiles, profiles)
def test_doing_it_leaves_nothing_to_do(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    instances = tuple((profile, f"MIG-{number}") for number, profile in enumerate(before))
    gpu = replace(WHOLE, enabled=bool(before), pending=bool(before), instances=instances)
    layout = (MigWanted("GPU-a", after),)
    decision = decide([gpu], layout, {})
    assert decide([carried_out(gpu, decision)], layout, {}) == MigDecision()
