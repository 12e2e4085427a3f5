"""What is decided about a host's driver: installed, adopted, upgraded, refused; and doing it leaves nothing to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.codec import dump, load
from berth.host import nvidia_packages
from berth.host.nvidia_checks import KINDS, errors
from berth.host.nvidia_driver import decide
from berth.host.nvidia_types import Decision, Found, PciDevice, Service, Wanted

from .nvidia_hosts import B200, GTX1080, H200, L40S, SWITCH, SYSTEMS, V100, apply, fresh, gpu, repository, settle

ALLOWED = Wanted(allow_reboot=True)


def kinds(decision: Decision) -> list[str]:
    return [finding.kind for finding in decision.findings]


def installed(wanted: Wanted = ALLOWED, system: tuple[str, str] = ("ubuntu", "24.04"), *devices: PciDevice) -> Found:
    """A host that Berth brought up."""
    found, decisions = settle(fresh(system, *devices), wanted)
    assert not decisions[-1].steps, decisions[-1]
    return found


def adopted(version: str, **changes: object) -> Found:
    """A host with a driver of somebody else's that runs."""
    packages = {"libnvidia-compute-580-server": f"{version}-0ubuntu0.24.04.1"}
    return fresh(loaded=version, library=version, packages=packages, **changes)


def test_a_fresh_host_gets_the_newest_of_the_branch() -> None:
    first = decide(fresh(), Wanted())
    assert first.action == "install"
    assert first.target is None, "no repository was asked yet"
    assert "nvidia-dkms-580-open" in first.packages, "names are known before versions are"
    found, decisions = settle(fresh(), Wanted())
    assert decisions[1].target == "580.178.04"
    assert "libnvidia-compute-580=580.178.04-1ubuntu1" in decisions[1].packages
    assert found.loaded == "580.178.04"
    assert set(found.held) == set(nvidia_packages.core(nvidia_packages.family_of(found), 580, True))
    assert "Pin: version 580.178.04-*" in found.files[nvidia_packages.APT_PIN]
    assert found.services["nvidia-persistenced"] == Service(True, True)
    assert not errors(decisions[-1].findings)


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (("ubuntu", "24.04"), "libnvidia-compute-580=580.178.04-1ubuntu1"),
        (("debian", "12"), "nvidia-driver-cuda=580.178.04-1ubuntu1"),
        (("rocky", "9.6"), "nvidia-driver-cuda-3:580.178.04-1.el9"),
        (("rhel", "10.1"), "kmod-nvidia-open-dkms-3:580.178.04-1.el9"),
    ],
)
def test_every_family_has_its_names(system: tuple[str, str], expected: str) -> None:
    found, decisions = settle(fresh(system), Wanted())
    assert expected in decisions[1].packages
    assert not decisions[-1].steps
    assert found.module_stream == ("580-open" if system == ("rocky", "9.6") else None)


def test_an_adopted_driver_is_not_touched() -> None:
    decision = decide(adopted("575.57.08"), ALLOWED)
    assert decision == Decision("adopt")


def test_a_driver_that_is_too_old_is_told_and_not_touched() -> None:
    decision = decide(adopted("535.247.01"), ALLOWED)
    assert decision.action == "adopt"
    assert not decision.steps
    assert kinds(decision) == ["branch-too-old"]
    assert "nvidia_driver_enforce_branch" in decision.findings[0].mend


def test_a_branch_that_is_enforced_replaces_what_is_there() -> None:
    wanted = replace(ALLOWED, enforce_branch=True)
    found, decisions = settle(adopted("535.247.01"), wanted)
    assert any(decision.disruptive and decision.reboot for decision in decisions)
    assert found.loaded == "580.178.04"
    assert "libnvidia-compute-580-server" not in found.packages, "another branch's library would be a second driver"


def test_a_newer_release_comes_only_when_asked() -> None:
    older = replace(ALLOWED, version="580.159.04")
    found = installed(older)
    assert found.loaded == "580.159.04"
    assert not decide(found, ALLOWED).steps, "without a version what is installed stays"
    newest = decide(found, replace(ALLOWED, version="latest"))
    assert newest.target == "580.178.04"
    assert newest.disruptive
    assert decide(found, replace(ALLOWED, version="580.178.04")).packages == newest.packages


def test_a_driver_in_use_is_not_replaced_without_the_reboot() -> None:
    found = installed(replace(ALLOWED, version="580.159.04"))
    decision = decide(found, Wanted(version="latest"))
    assert kinds(decision) == ["reboot-not-allowed"]
    assert "580.159.04" in decision.findings[0].found


def test_a_driver_in_use_is_not_replaced_under_replicas() -> None:
    found = installed(replace(ALLOWED, version="580.159.04"))
    newest = replace(ALLOWED, version="latest")
    decision = decide(found, replace(newest, berths=("chat@gpu01-0",)))
    assert kinds(decision) == ["replicas-on-host"]
    assert "chat@gpu01-0" in decision.findings[0].found
    assert "drain.yml -e target=gpu01" in decision.findings[0].mend
    assert not kinds(decide(found, newest)), "a drained host has none"
    assert not decide(found, replace(ALLOWED, berths=("chat@gpu01-0",))).steps, "nothing asked for, nothing refused"
    mismatch = replace(found, library="580.178.04")
    assert "replicas-on-host" not in kinds(decide(mismatch, replace(newest, berths=("chat@gpu01-0",))))


def test_a_branch_change_takes_the_old_names_away() -> None:
    wanted = replace(ALLOWED, branch=590)
    found, decisions = settle(replace(installed(), available=repository(fresh(), wanted)), wanted)
    assert "libnvidia-compute-580" in decisions[0].remove
    assert found.loaded == "590.48.01"
    assert not [name for name in found.packages if name.endswith(("-580", "-580-open"))]
    assert not decisions[-1].steps


def test_a_mismatch_is_explained_and_mended_by_a_boot() -> None:
    broken = replace(adopted("580.159.04"), library="580.178.04")
    told = decide(broken, Wanted())
    assert kinds(told) == ["driver-library-mismatch"]
    assert "Driver/library version mismatch" in told.findings[0].what
    assert errors(told.findings)
    allowed = decide(broken, ALLOWED)
    assert allowed.reboot
    assert not errors(allowed.findings)
    assert not decide(apply(broken, ALLOWED, allowed), ALLOWED).reboot


def test_a_mismatch_of_our_own_driver_is_told_as_well() -> None:
    found = installed()
    newer = {name: version.replace("178", "190") for name, version in found.packages.items()}
    decision = decide(replace(found, packages=newer, library="580.190.04"), Wanted())
    assert kinds(decision) == ["driver-library-mismatch"]


@pytest.mark.parametrize(
    ("devices", "service"), [((gpu(L40S),), False), ((gpu(H200), PciDevice("0000:05:00.0", 0x22A3, SWITCH)), True)]
)
def test_fabric_manager_is_of_the_very_version(devices: tuple[PciDevice, ...], service: bool) -> None:
    found = installed(replace(ALLOWED, version="580.159.04"), ("ubuntu", "24.04"), *devices)
    assert found.packages.get("nvidia-fabricmanager") == ("580.159.04-1ubuntu1" if service else None)
    assert ("nvidia-fabricmanager" in found.services) == service


def test_no_driver_without_its_fabric_manager() -> None:
    found = fresh(("ubuntu", "24.04"), gpu(H200), PciDevice("0000:05:00.0", 0x22A3, SWITCH))
    offered = {n: v for n, v in repository(found, Wanted()).items() if n != "nvidia-fabricmanager"}
    source = decide(found, Wanted()).repository
    assert source
    decision = decide(replace(found, files={source.path: source.content}, available=offered), Wanted())
    assert kinds(decision) == ["fabric-manager-missing"]


def test_an_adopted_hgx_without_fabric_manager_is_told() -> None:
    devices = (gpu(H200), PciDevice("0000:05:00.0", 0x22A3, SWITCH))
    bare = adopted("580.159.04", devices=devices)
    assert kinds(decide(bare, ALLOWED)) == ["fabric-manager-missing"]
    other = {**bare.packages, "nvidia-fabricmanager": "580.95.05-1"}
    assert kinds(decide(replace(bare, packages=other), ALLOWED)) == ["fabric-manager-mismatch"]
    right = {**bare.packages, "nvidia-fabricmanager": "580.159.04-1"}
    running = replace(bare, packages=right, services={"nvidia-fabricmanager": Service(True, True)})
    assert not decide(running, ALLOWED).findings


def test_an_hgx_blackwell_board_needs_the_subnet_manager() -> None:
    found = installed(ALLOWED, ("ubuntu", "24.04"), gpu(B200))
    assert {"nvlsm", "nvidia-fabricmanager"} <= set(found.packages)


@pytest.mark.parametrize(
    ("devices", "modules", "expected"),
    [
        ((L40S,), "auto", True),
        ((L40S,), "proprietary", False),
        ((V100,), "auto", False),
        ((V100, L40S), "auto", False),
        ((B200,), "auto", True),
    ],
)
def test_kernel_modules_follow_the_gpus(devices: tuple[int, ...], modules: str, expected: bool) -> None:
    found = fresh(("ubuntu", "24.04"), *(gpu(device, f"0000:{n:02x}:00.0") for n, device in enumerate(devices)))
    decision = decide(found, Wanted(modules=modules))  # type: ignore[arg-type]
    assert decision.open_modules is expected
    assert not errors(decision.findings)


@pytest.mark.parametrize(
    ("devices", "wanted", "kind"),
    [
        ((V100,), Wanted(modules="open"), "kernel-modules"),
        ((B200,), Wanted(modules="proprietary"), "kernel-modules"),
        ((V100, B200), Wanted(), "kernel-modules"),
        ((L40S,), Wanted(branch=620, modules="proprietary"), "kernel-modules"),
        ((GTX1080,), Wanted(branch=590), "branch-too-new"),
        ((L40S,), Wanted(version="570.211.01"), "version-not-of-branch"),
    ],
)
def test_what_cannot_work_is_refused_before_anything(devices: tuple[int, ...], wanted: Wanted, kind: str) -> None:
    found = fresh(("ubuntu", "24.04"), *(gpu(device, f"0000:{n:02x}:00.0") for n, device in enumerate(devices)))
    decision = decide(found, wanted)
    assert kinds(decision) == [kind]
    assert not decision.steps


def test_grace_hopper_is_told_by_its_processor() -> None:
    found = replace(fresh(("ubuntu", "24.04"), gpu(0x2330)), arch="aarch64")
    assert kinds(decide(found, Wanted(modules="proprietary"))) == ["kernel-modules"]
    assert "sbsa" in str(decide(found, Wanted()).repository)


@pytest.mark.parametrize(
    ("found", "allowed"),
    [
        (fresh(("rocky", "8.10")), "8 has no Python"),
        (fresh(("ubuntu", "20.04")), "ubuntu 20.04"),
        (fresh(("arch", "")), "arch"),
    ],
)
def test_other_distributions_are_refused_by_name(found: Found, allowed: str) -> None:
    decision = decide(found, Wanted())
    assert kinds(decision) == ["distribution"]
    assert allowed in str(decision.findings[0])


def test_a_loaded_driver_is_adopted_on_any_distribution() -> None:
    assert decide(fresh(("arch", ""), loaded="595.71.05", library="595.71.05"), Wanted()) == Decision("adopt")


def test_missing_headers_are_explained() -> None:
    offered = {n: v for n, v in repository(fresh(), Wanted()).items() if not n.startswith("linux-headers")}
    source = decide(fresh(), Wanted()).repository
    assert source
    asked = fresh(files={source.path: source.content}, available=offered)
    decision = decide(asked, Wanted())
    assert kinds(decision) == ["kernel-headers-missing"]
    assert "linux-headers-6.8.0-90-generic" in decision.findings[0].found
    assert not decide(replace(asked, headers=True), Wanted()).findings
    named = Wanted(kernel_headers="linux-headers-own")
    assert "linux-headers-own" in str(decide(asked, named).findings[0])


def test_secure_boot_is_explained_until_the_key_is_enrolled() -> None:
    _, decisions = settle(fresh(secure_boot=True), Wanted())
    assert kinds(decisions[-1]) == ["secure-boot"]
    for ready in (fresh(secure_boot=True, key_enrolled=True), fresh(secure_boot=False)):
        assert not settle(ready, Wanted())[1][-1].findings
    assert not settle(fresh(secure_boot=True), Wanted(secure_boot_signed=True))[1][-1].findings


def test_nouveau_needs_a_boot() -> None:
    found, decisions = settle(fresh(nouveau=True), Wanted())
    assert kinds(decisions[-1]) == ["reboot-needed"]
    assert nvidia_packages.NOUVEAU in found.files
    assert found.library == "580.178.04", "everything but the boot is done"
    assert not settle(fresh(nouveau=True), ALLOWED)[1][-1].findings


def test_a_driver_that_does_not_load_is_explained_not_installed_over() -> None:
    found = fresh(packages={"nvidia-dkms-535": "535.247.01-0ubuntu1"}, nouveau=True)
    decision = decide(found, Wanted())
    assert kinds(decision) == ["driver-not-loaded"]
    assert "nouveau" in decision.findings[0].what
    assert not decision.steps


def test_a_run_file_driver_is_not_mixed_with_packages() -> None:
    found = fresh(loaded="550.90.07", library="550.90.07")
    assert kinds(decide(found, replace(ALLOWED, enforce_branch=True))) == ["runfile"]


def test_no_gpu_is_a_fault_only_where_one_is_asked_for() -> None:
    found = replace(fresh(), devices=())
    assert decide(found, Wanted()) == Decision("nothing")
    assert kinds(decide(found, Wanted(install="true"))) == ["no-gpu"]


def test_an_ordinary_user_is_told_only_when_there_is_something_to_do() -> None:
    assert kinds(decide(replace(fresh(), root=False), Wanted())) == ["not-root"]
    assert not decide(replace(installed(), root=False), ALLOWED).findings


def test_install_false_reads_only() -> None:
    assert decide(fresh(), Wanted(install="false")) == Decision("nothing")
    assert decide(replace(installed(), held=()), Wanted(install="false")).action == "adopt"


def test_extras_come_from_our_source_only() -> None:
    wanted = replace(ALLOWED, dcgm=True, container_toolkit=True)
    found = installed(wanted)
    assert {"datacenter-gpu-manager-4-cuda13", "nvidia-container-toolkit"} <= set(found.packages)
    assert found.services["nvidia-dcgm"].active
    assert kinds(decide(adopted("580.159.04"), wanted)) == ["adopted-without", "adopted-without"]


def test_packages_that_are_not_the_drivers_stay() -> None:
    beside = {
        "libnvidia-container1": "1.18.0-1",
        "nvidia-fs": "2.26.6-1",
        "libnvidia-compute-570": "570.211.01-0ubuntu1",
    }
    found = replace(adopted("570.211.01"), packages=beside)
    decision = settle(found, replace(ALLOWED, enforce_branch=True))[1][1]
    assert decision.remove == ("libnvidia-compute-570",)


def test_a_mirror_and_its_key_take_nvidias_place() -> None:
    wanted = Wanted(repository_url="http://mirror.example/nvidia/", repository_key="files/mirror.asc")
    decision = decide(fresh(), wanted)
    assert decision.repository
    assert (
        "signed-by=/usr/share/keyrings/berth-nvidia.asc] http://mirror.example/nvidia /" in decision.repository.content
    )
    unsigned = decide(fresh(), replace(wanted, repository_unsigned=True)).repository
    assert unsigned
    assert "trusted=yes" in unsigned.content


def test_a_repository_without_the_branch_says_what_it_has() -> None:
    _, decisions = settle(fresh(), Wanted(branch=575))
    assert kinds(decisions[-1]) == ["not-in-repository"]
    _, decisions = settle(fresh(), Wanted(version="580.1.1"))
    assert kinds(decisions[-1]) == ["not-in-repository"]
    assert "580.178.04" in decisions[-1].findings[0].found


systems = st.sampled_from(SYSTEMS)
hardware = st.lists(st.sampled_from([L40S, H200, B200, V100]), min_size=1, max_size=3)
wants = st.builds(
    Wanted,
    branch=st.sampled_from([570, 580, 590]),
    version=st.sampled_from(["", "latest"]),
    enforce_branch=st.booleans(),
    modules=st.sampled_from(["auto", "open", "proprietary"]),
    allow_reboot=st.booleans(),
    persistence=st.booleans(),
    fabric_manager=st.sampled_from(["auto", "true", "false"]),
    dcgm=st.booleans(),
    mps=st.booleans(),
)


@st.composite
def hosts(draw: st.DrawFn) -> Found:
    devices = [gpu(device, f"0000:{number:02x}:00.0") for number, device in enumerate(draw(hardware))]
    if draw(st.booleans()):
        devices.append(PciDevice("0000:f0:00.0", 0x22A3, SWITCH))
    found = fresh(draw(systems), *devices, nouveau=draw(st.booleans()), secure_boot=draw(st.sampled_from([None, True])))
    release = draw(st.sampled_from([None, "535.247.01", "570.211.01", "580.95.05"]))
    if release is None:
        return found
    family = nvidia_packages.family_of(found)
    names = nvidia_packages.core(family, nvidia_packages.branch_of(release), draw(st.booleans()))
    packages = dict.fromkeys(names, f"{release}-0distro1")
    library = draw(st.sampled_from([release, "580.178.04"]))
    return replace(found, packages=packages, library=library, loaded=release, nouveau=False)


@given(hosts(), wants)
def test_doing_what_was_decided_leaves_nothing_to_do(found: Found, wanted: Wanted) -> None:
    after, decisions = settle(found, wanted)
    last = decisions[-1]
    assert errors(last.findings) or not (last.steps or last.packages or last.remove or last.reboot), last
    assert decide(after, wanted) == last, "the same input, the same decision"
    assert {finding.kind for decision in decisions for finding in decision.findings} <= set(KINDS)
    assert all(finding.mend and finding.found for decision in decisions for finding in decision.findings)


@given(hosts(), wants)
def test_a_running_driver_is_replaced_only_with_leave_to_reboot(found: Found, wanted: Wanted) -> None:
    for decision in settle(found, wanted)[1]:
        if decision.disruptive:
            assert wanted.allow_reboot or errors(decision.findings)
            assert decision.reboot


@given(hosts(), wants)
def test_adoption_changes_no_package(found: Found, wanted: Wanted) -> None:
    decision = decide(found, wanted)
    if decision.action == "adopt":
        touched = (decision.packages, decision.remove, decision.files, decision.hold, decision.lock)
        assert not any(touched)
        assert decision.repository is None


@given(hosts(), wants)
def test_data_survives_the_way_to_the_role(found: Found, wanted: Wanted) -> None:
    assert load(Found, dump(found), "found") == found
    assert load(Wanted, dump(wanted), "wanted") == wanted
    decision = decide(found, wanted)
    assert load(Decision, dump(decision), "decision") == decision
