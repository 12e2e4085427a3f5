"""Profiles: what is wrong is named with its place; what is right compiles to what the library reads back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.gpu.sim import build
from berth.gpu.sim.profile import SimGpu, compile_text, expand, kernel_log, parse, read_yaml, shipped, to_yaml

GOOD: dict[str, Any] = {
    "driver_version": "580.95.05",
    "gpus": [
        {"product": "NVIDIA H100 80GB HBM3", "memory_mib": 81559, "compute_capability": "9.0", "nvlink": [1]},
        {"product": "NVIDIA H100 80GB HBM3", "memory_mib": 81559, "compute_capability": "9.0", "nvlink": [0]},
    ],
}
UUID = "GPU-6f1d7c3e-43a5-5b0e-9c55-0d6a54f6b5a1"
MIG = {"profile": "3g.40gb", "memory_mib": 40192}


def card(**changes: Any) -> dict[str, Any]:
    return {"product": "NVIDIA L4", "memory_mib": 23034, "compute_capability": "8.9", **changes}


def with_cards(*cards: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"driver_version": "580.95.05", "gpus": list(cards), **top}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("text", ["file.yml", "mapping", "str", "driver_version"]),
        (None, ["file.yml", "mapping"]),
        ({"gpus": []}, ["driver_version"]),
        (with_cards(card(), vram_scael=3), ["vram_scael", "unknown key", "vram_scale"]),
        (with_cards(card(memory_mib="23034")), ["gpus.0.memory_mib", "'23034'"]),
        (with_cards(card(), card(memory_mib=0)), ["gpus.1.memory_mib", "greater than 0", "found 0"]),
        (with_cards(card(memory_mib=2**40)), ["gpus.0.memory_mib", "less than or equal"]),
        (with_cards(card(leak_mib=-1)), ["gpus.0.leak_mib", "found -1"]),
        (with_cards(card(lost="yes")), ["gpus.0.lost", "'yes'"]),
        (with_cards(card(xid=0)), ["gpus.0.xid", "found 0"]),
        (with_cards(card(uuid="GPU-1")), ["gpus.0.uuid", "'GPU-1'"]),
        (with_cards(card(pci_bus_id=780.0)), ["gpus.0.pci_bus_id", "780.0"]),
        (with_cards(card(product="NVIDIA\nL4")), ["gpus.0.product"]),
        (with_cards(card(compute_capability=8.9)), ["gpus.0.compute_capability", "8.9"]),
        (with_cards(card(), vram_scale=0), ["vram_scale", "greater than 0"]),
        (with_cards(card(), vram_scale=float("nan")), ["vram_scale", "nan"]),
        (with_cards(card(), driver_version="580"), ["driver_version", "'580'"]),
        (with_cards(card(reserved_mib=23000, leak_mib=35)), ["gpus.0", "reserved_mib + leak_mib", "23034"]),
        (with_cards(card(repeat=33)), ["gpus.0.repeat", "33"]),
        (with_cards(card(repeat=20), card(repeat=20)), ["too many cards", "40", "32"]),
        (with_cards(card(repeat=2, uuid=UUID)), ["uuid", "twice", UUID]),
        (with_cards(card(pci_bus_id="0000:3b:00.0"), card(pci_bus_id="00000000:3B:00.0")), ["pci_bus_id", "3B"]),
        (with_cards(card(), card(), order=[0, 0]), ["order", "[0, 0]", "0 to 1"]),
        (with_cards(card(), order=[]), ["order"]),
        (with_cards(card(nvlink=[1])), ["gpus.0.nvlink", "no such peer"]),
        (with_cards(card(nvlink=[0])), ["gpus.0.nvlink", "no such peer"]),
        (with_cards(card(nvlink=[1]), card()), ["gpus.0.nvlink", "card 1 does not name 0"]),
        (with_cards(card(mig=[MIG])), ["gpus.0.mig", "no MIG", "8.9"]),
        (with_cards(card(compute_capability="8.0", mig=[MIG])), ["gpus.0.mig", "40192", "at most 23034"]),
        (with_cards(card(compute_capability="8.0", memory_mib=10**6, mig=[MIG] * 3)), ["slices", "9", "at most 7"]),
        (with_cards(card(compute_capability="8.0", mig=[{**MIG, "profile": "3g"}])), ["gpus.0.mig", "profile", "'3g'"]),
        (with_cards(card(compute_capability="8.0", leak_mib=1, mig=[])), ["gpus.0", "MIG mode", "leak_mib"]),
    ],
)
def test_malformed_profiles_are_named(data: object, named: list[str]) -> None:
    with pytest.raises(BerthError) as raised:
        expand(parse(data, "file.yml"), "host", "file.yml")
    for part in ["file.yml", *named]:
        assert part in str(raised.value)


@pytest.mark.parametrize("text", ["gpus: [", "\x00", "a: b: c"])
def test_a_file_that_is_not_yaml_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yml"
    path.write_text(text)
    with pytest.raises(BerthError, match=r"broken\.yml"):
        read_yaml(path)
    with pytest.raises(BerthError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = [("driver_version",), ("gpus",), ("order",), ("vram_scale",), ("context_mib",), ("show_processes",), ("new",)]
PLACES += [("gpus", 0, key) for key in [*SimGpu.__dataclass_fields__, "new"]]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), JSON)
def test_any_value_anywhere_is_either_refused_by_name_or_compiles(place: tuple[Any, ...], value: Any) -> None:
    data: Any = copy.deepcopy(GOOD)
    at = data
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    try:
        whole = expand(parse(data, "file.yml"), "host", "file.yml")
    except BerthError as error:
        told = str(error)
    else:
        told = ""
    if told:
        assert "file.yml" in told
        return
    lines = compile_text(whole).splitlines()
    assert (lines[0], lines[-1]) == ("berth-gpu-sim 1", "end")
    # What the library's line reader needs: every line in between is a key and a value, and none is too long for it.
    assert all(" " in line and line.isprintable() and len(line) < 500 for line in lines[1:-1])


@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_profile_written_for_people_says_the_same(name: str) -> None:
    whole = expand(parse(read_yaml(shipped()[name]), name), "host", name)
    again = expand(parse(yaml.safe_load(to_yaml(whole)), name), "another", name)
    assert compile_text(again) == compile_text(whole)


def test_a_lost_gpu_logs_xid_79_and_another_its_own() -> None:
    cards = (card(lost=True, pci_bus_id="0000:3b:00.0"), card(xid=31, pci_bus_id="0000:d8:00.0"), card())
    log = kernel_log(expand(parse(with_cards(*cards), "p"), "h", "p"))
    assert log.splitlines() == [
        "kernel: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.",
        "kernel: NVRM: Xid (PCI:0000:d8:00): 31, pid='<unknown>', name=<unknown>",
    ]


def test_injected_faults_survive_the_same_profile_and_not_another(simulate: Any) -> None:
    sim = simulate()
    data = yaml.safe_load((sim.dir / build.WANTED).read_text())["profile"]
    build.inject_card(sim.dir, "1", lost=True)
    assert build.install(sim.dir, data, "host1").reasons == ()
    assert build.read_profile(sim.dir).gpus[1].lost
    assert build.install(sim.dir, {**data, "context_mib": 7}, "host1").reasons == ("profile or seed",)
    assert not build.read_profile(sim.dir).gpus[1].lost


def test_inject_finds_a_card_by_index_uuid_or_address_and_refuses_others(simulate: Any) -> None:
    sim = simulate()
    gpus = build.read_profile(sim.dir).gpus
    build.inject(sim.dir, order=(2, 0, 1))
    assert build.inject_card(sim.dir, "0", xid=1).uuid == gpus[2].uuid
    assert build.inject_card(sim.dir, str(gpus[1].uuid)[:12], xid=2).uuid == gpus[1].uuid
    assert build.inject_card(sim.dir, "0000:0b:00.0", xid=3).uuid == gpus[0].uuid
    for wrong in ("3", "GPU-", "GPU-0000", "-1", ""):
        with pytest.raises(BerthError, match="no such simulated GPU"):
            build.inject_card(sim.dir, wrong, xid=4)
    with pytest.raises(BerthError, match="leak_mib"):
        build.inject_card(sim.dir, "0", leak_mib=10**6)
    build.restore(sim.dir)
    assert all(gpu.xid is None for gpu in build.read_profile(sim.dir).gpus)


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "lib").mkdir()
    with pytest.raises(BerthError, match=r"no C compiler.*apt-get install gcc"):
        build.build_library(tmp_path)


def test_remove_takes_its_own_files_only(simulate: Any, tmp_path: Path) -> None:
    sim = simulate()
    (sim.dir / "mine.txt").write_text("kept")
    assert build.remove(sim.dir)
    assert [path.name for path in sim.dir.iterdir()] == ["mine.txt"]
    with pytest.raises(BerthError, match="no GPU simulation"):
        build.remove(sim.dir)
    assert not build.remove(tmp_path / "never")
