"""Every benchmark from its command line, at its smallest, against the real planner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import bench_exact, bench_peers, bench_replan, bench_scale
from bench.bench_replan import moved
from bench.bench_scale import fit_exponent
from bench.chart import Series, log_log
from bench.checker import Placement
from bench.record import Target, finish


def figures(folder: Path, name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert data["versions"]["ortools"]
    return data


def missed(data: dict[str, Any]) -> list[str]:
    return [item["what"] for item in data["targets"] if not item["met"]]


def test_peers_without_ray_says_that_ray_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = bench_peers.main(["--cases", "4", "--large", "--runtime-python", "", "--results", str(tmp_path)])
    data = figures(tmp_path, "peers")
    assert code == 1
    assert "Ray Serve's own scheduler took part" in missed(data)
    assert "Berth oversells no GPU and breaks no rule" not in missed(data)
    assert "Berth is never worse than a whole plan" not in missed(data)
    assert {item["peer"] for item in data["figures"]["scores"]} >= {"first-fit-decreasing", "least-free-memory"}
    assert "MISSED  Ray Serve's own scheduler" in capsys.readouterr().out


@pytest.mark.runtime
def test_peers_with_ray_names_its_version(tmp_path: Path, runtime_python: str) -> None:
    command = ["--cases", "2", "--large", "40", "--seeds", "1", "--runtime-python", runtime_python]
    bench_peers.main([*command, "--results", str(tmp_path)])
    data = figures(tmp_path, "peers")
    assert "Ray Serve's own scheduler took part" not in missed(data)
    ray = [item for item in data["figures"]["scores"] if item["peer"].startswith("Ray Serve")]
    assert [item["cases"] for item in ray] == [2] * 4 + [1] * 4


def test_scale_measures_each_size_and_draws_it(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    code = bench_scale.main(["--gpus", "40", "80", "--seeds", "1", "--plot", str(plot), "--results", str(tmp_path)])
    data = figures(tmp_path, "scale")
    assert code == (1 if missed(data) else 0)
    assert "nothing unplaced, oversold or broken" not in missed(data)
    for size, gpus in zip(data["figures"]["fleets"], (40, 80), strict=True):
        assert size["gpus"] == gpus
        assert 0 < size["lower_bound"] <= size["gpus_used"] <= gpus
        assert size["rss_mib"] > 20
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_exact_reports_every_case(tmp_path: Path) -> None:
    code = bench_exact.main(["--cases", "3", "--results", str(tmp_path)])
    data = figures(tmp_path, "exact")
    assert code == (1 if missed(data) else 0)
    assert "never worse than the heuristic" not in missed(data)
    assert len(data["figures"]["per_case"]) == 3
    assert data["command"] == f"python -m bench.bench_exact --cases 3 --results {tmp_path}"


def test_replan_moves_nobody_else(tmp_path: Path) -> None:
    code = bench_replan.main(["--hosts", "12", "--losses", "2", "--results", str(tmp_path)])
    data = figures(tmp_path, "replan")
    assert missed(data) == []
    assert code == 0
    assert all(item["lost"] > 0 and item["moved"] == 0 for item in data["figures"]["losses"])


def test_a_replica_that_stays_on_its_gpus_has_not_moved() -> None:
    standing = [Placement("a", ("g1",)), Placement("a", ("g1",)), Placement("tp", ("g2", "g3"))]
    assert moved(standing, [*standing, Placement("a", ("g9",))]) == 0
    assert moved(standing, [Placement("a", ("g1",)), Placement("a", ("g2",)), Placement("tp", ("g3", "g2"))]) == 1


def test_a_missed_target_is_an_exit_code(tmp_path: Path) -> None:
    assert finish("x", [], {}, [Target("a", "1", True)], tmp_path) == 0
    assert finish("x", [], {}, [Target("a", "1", True), Target("b", "2", False)], tmp_path) == 1
    assert figures(tmp_path, "x")["ok"] is False


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    assert fit_exponent([(n, 3 * n**power) for n in (80, 800, 8000)]) == pytest.approx(power, abs=0.001)
    assert fit_exponent([(80, 1.0), (80, 2.0)]) is None


def test_the_chart_is_svg_with_every_point_in_its_place() -> None:
    line = Series("seconds & more", "#000000", "", ((10, 0.1), (100, 1.0), (1000, 10.0)))
    root = ElementTree.fromstring(log_log("<title>", "x", "y", [line]))
    circles = [(float(item.get("cx", "")), float(item.get("cy", ""))) for item in root.iter() if "circle" in item.tag]
    assert len(circles) == 3
    assert circles == sorted(circles, key=lambda spot: (spot[0], -spot[1]))
    assert circles[1][0] - circles[0][0] == pytest.approx(circles[2][0] - circles[1][0], abs=0.2)
    assert any("seconds & more" in (item.text or "") for item in root.iter())
