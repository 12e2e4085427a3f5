"""Models fetched ahead: which files, whether there is room, and the download itself with the real huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from berth.errors import BerthError
from berth.host.hub import Need, abandoned, needed_files, progress_lines, room
from tests.unit.host.fake_hub import FakeHub

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = bytes(range(256)) * 4096
REPO = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}" * 100,
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "pytorch_model.bin": WEIGHTS * 2,
    "original/consolidated.00.pth": WEIGHTS * 2,
}
WANTED = [name for name in REPO if name not in ("pytorch_model.bin", "original/consolidated.00.pth")]
OFFLINE = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("acme/tiny", cache_dir=sys.argv[1], local_files_only=True))
"""


def test_one_form_of_the_weights_is_fetched() -> None:
    assert needed_files(REPO) == tuple(sorted(WANTED))


def test_without_safetensors_the_bin_files_are() -> None:
    names = ["config.json", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "sparse_linear.pt"]
    assert needed_files(names) == ("config.json", "pytorch_model.bin", "sparse_linear.pt")


def test_consolidated_weights_count_where_there_are_no_others() -> None:
    assert needed_files(["consolidated.safetensors", "params.json"]) == ("consolidated.safetensors", "params.json")
    mistral = ["consolidated.safetensors", "model.safetensors", "params.json"]
    assert needed_files(mistral) == ("model.safetensors", "params.json")


def test_a_repository_without_known_weights_comes_whole() -> None:
    assert needed_files(["README.md", "weights.gguf"]) == ("README.md", "weights.gguf")


def need(missing_mib: int) -> Need:
    return Need("acme/tiny", "main", "c", (), 10 * 2**30, missing_mib * 2**20)


def test_the_disk_is_refused_before_it_is_full() -> None:
    room([need(600), need(400)], 1100 * 2**20, 100, "/cache")
    with pytest.raises(BerthError) as caught:
        room([need(600), need(401)], 1100 * 2**20, 100, "/cache")
    assert "found: 1100 MiB free; allowed: >= 1101 MiB" in str(caught.value)
    assert "acme/tiny 600 MiB, acme/tiny 401 MiB" in str(caught.value)


def test_a_line_of_progress() -> None:
    models = [
        {"repo": "a/b", "state": "running", "done": 512 * 2**20, "total": 1024 * 2**20},
        {"repo": "c/d", "state": "done", "done": 1, "total": 1},
    ]
    assert progress_lines(models, {"a/b": 64 * 2**20}) == ["a/b: 512 of 1024 MiB (50 %), 64.0 MiB/s, 8 s left"]
    assert progress_lines(models, {}) == ["a/b: 512 of 1024 MiB (50 %)"]


def test_a_download_that_nobody_asks_about_is_abandoned(tmp_path: Path) -> None:
    heartbeat = tmp_path / "heartbeat"
    assert abandoned(heartbeat)
    heartbeat.touch()
    assert not abandoned(heartbeat)
    os.utime(heartbeat, (time.time() - 100, time.time() - 100))
    assert abandoned(heartbeat)


@pytest.fixture
def runtime(runtime_python: str, tmp_path: Path) -> str:
    """The runtime's interpreter with this checkout's berth: what a rolled out host has."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {runtime_python} "$@"\n')
    python.chmod(0o755)
    return str(python)


def module(runtime: str, hub: FakeHub, cache: Path, **options: Any) -> dict[str, Any]:
    """One call of the module as Ansible makes it."""
    arguments = {
        "python": runtime,
        "cache_dir": str(cache),
        "models": [{"repo": "acme/tiny", "revision": "main"}],
        "endpoint": hub.url,
        **options,
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "library/model_prefetch.py")],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def until_done(runtime: str, hub: FakeHub, cache: Path) -> list[dict[str, Any]]:
    """Every answer until the download is through."""
    answers = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        answers.append(module(runtime, hub, cache, phase="next"))
        if answers[-1].get("failed") or answers[-1]["state"] == "done":
            return answers
        time.sleep(0.3)
    raise AssertionError(answers[-1])


@pytest.mark.runtime
def test_a_model_is_fetched_once_and_serves_an_offline_engine(
    runtime: str, runtime_python: str, tmp_path: Path
) -> None:
    cache = tmp_path / "huggingface/hub"
    with FakeHub({"acme/tiny": REPO}, pause_s=0.15) as hub:
        checked = module(runtime, hub, cache, _ansible_check_mode=True)
        assert checked["changed"]
        assert checked["missing_bytes"] == sum(len(REPO[name]) for name in WANTED)
        assert not cache.exists()
        begun = module(runtime, hub, cache)
        assert (begun["state"], begun["changed"]) == ("running", True)
        assert module(runtime, hub, cache)["attached"], "a second operator waits for the first one's"
        assert not list(cache.glob("*/refs/*")), "engines that start now would look for what is not there yet"
        answers = until_done(runtime, hub, cache)
        seen = [item["done"] for answer in answers for item in answer["models"]]
        assert answers[-1]["state"] == "done", answers[-1]
        assert seen == sorted(seen)
        assert any(0 < done < begun["missing_bytes"] for done in seen), "no progress could be seen"
        assert sorted(hub.asked) == sorted(WANTED)
        again = module(runtime, hub, cache)
        assert (again["state"], again["changed"], again["missing_bytes"]) == ("done", False, 0)
    # The hub is gone; what vLLM does offline is to ask for the whole snapshot.
    done = subprocess.run(
        [runtime_python, "-c", OFFLINE, str(cache)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.strip().splitlines()[-1])
    assert (snapshot / "model-00001-of-00002.safetensors").read_bytes() == WEIGHTS


@pytest.mark.runtime
def test_an_interrupted_download_goes_on_with_what_is_missing(runtime: str, tmp_path: Path) -> None:
    cache = tmp_path / "huggingface/hub"
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS * 8}
    with FakeHub({"acme/tiny": files}, pause_s=0.1) as hub:
        module(runtime, hub, cache)
        pid = int((cache.parent / "prefetch/pid").read_text())
        deadline = time.monotonic() + 60
        while not list(cache.glob("*/snapshots/*/config.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(pid, 9)
        ended = until_done(runtime, hub, cache)[-1]
        assert ended["failed"]
        assert "ended without a word; mend: run it again, it goes on" in ended["msg"]
        hub.pause_s, hub.asked = 0.0, []
        assert module(runtime, hub, cache)["missing_bytes"] == len(WEIGHTS) * 8
        assert until_done(runtime, hub, cache)[-1]["state"] == "done"
        assert hub.asked == ["model.safetensors"]
    assert not list(cache.glob("*/blobs/*.incomplete"))


@pytest.mark.runtime
def test_what_cannot_be_had_is_said_with_what_mends_it(runtime: str, tmp_path: Path) -> None:
    cache = tmp_path / "huggingface/hub"
    with FakeHub({"acme/tiny": REPO}, token="secret") as hub:
        gated = module(runtime, hub, cache)
        assert "set ray_slot_hub_token to a token that may read it" in gated["msg"]
        let_in = module(runtime, hub, cache, token="secret", _ansible_check_mode=True)
        assert let_in["missing_bytes"] > 0
        assert "secret" not in json.dumps(let_in)
        full = module(runtime, hub, cache, token="secret", reserve_mib=10**9)
        assert "MiB free; allowed: >= " in full["msg"]
        hub.token = ""
        unknown = module(runtime, hub, cache, models=[{"repo": "acme/none"}])
        assert "acme/none at main cannot be fetched" in unknown["msg"]
        assert "correct the name in serve_apps_list" in unknown["msg"]
    away = module(runtime, hub, cache)
    assert "let the host reach the hub" in away["msg"]
    assert "secret" not in "".join(path.read_text() for path in cache.parent.rglob("*") if path.is_file())


def test_a_directory_is_looked_for_only(tmp_path: Path) -> None:
    cache, here = tmp_path / "cache", tmp_path / "model"
    here.mkdir()
    with FakeHub({}) as hub:
        found = module("/none", hub, cache, models=[{"path": str(here)}])
        assert (found["state"], found["changed"]) == ("done", False)
        gone = module("/none", hub, cache, models=[{"path": str(here)}, {"path": "/no/such"}])
    assert gone["msg"].startswith("model directories are not on this host: /no/such; mend:")
