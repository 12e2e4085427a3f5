"""Model weights fetched from a hub before a replica asks for them: ``python -m berth.host.hub plan|fetch JOB``.

Runs in the runtime environment, which has huggingface_hub, so that replicas find exactly the cache they look in.
``plan`` prints what a job needs and what is missing; ``fetch`` downloads it and keeps ``status.json`` beside the job
up to date.
A download that is interrupted goes on with the files that are missing (huggingface_hub 2.4 begins a file anew).
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from berth.codec import load, write_json, write_text
from berth.errors import BerthError

MIB = 2**20
WATCH_S = 1.0
ABANDONED_S = 60.0
"""A fetch whose asker has not been heard for this long ends: Ctrl-C on the controller stops the download too."""
_ALIKE = re.compile(
    r"\.(safetensors|bin|ckpt|h5|msgpack|onnx|onnx_data|gguf|tflite|mlmodel|ot)$|(^|/)consolidated[^/]*$"
)
"""Forms of the same weights. Not ``.pt``: small heads of embedding models come so, beside the weights."""
_ELSEWHERE = ("original", "onnx", "openvino", "metal", "coreml")
"""Directories in which publishers keep other forms of the whole model."""


@dataclass(frozen=True)
class Model:
    """A repository of the hub at a revision (branch, tag or commit)."""

    repo: str
    revision: str = "main"


@dataclass(frozen=True)
class Job:
    """``cache_dir`` is the hub cache (``HF_HOME/hub``); ``reserve_mib`` is what must stay free on its file system."""

    cache_dir: str
    models: tuple[Model, ...]
    reserve_mib: int = 0


@dataclass(frozen=True)
class Need:
    """What one model takes, in bytes, and what of it is not there yet. ``files`` are the ones that are fetched."""

    repo: str
    revision: str
    commit: str
    files: tuple[str, ...]
    total: int
    missing: int


@dataclass(frozen=True)
class Progress:
    """``state`` of one model: waiting, running, done. Bytes."""

    repo: str
    state: str
    done: int
    total: int


@dataclass(frozen=True)
class Status:
    """``state`` of a fetch: running, done, failed. ``error`` is for people."""

    state: str
    models: tuple[Progress, ...] = field(default_factory=tuple)
    error: str = ""


def needed_files(names: Iterable[str]) -> tuple[str, ...]:
    """Of a repository's files those that an engine loads: all that are no weights, and one form of the weights.

    Many repositories hold the same weights several times. Safetensors are taken where there are any (vLLM's own order
    of preference), else PyTorch's ``.bin``; without either, everything. The publisher's ``consolidated*`` files count
    only where nothing else does.
    """
    every = sorted(name for name in names if name.split("/", 1)[0] not in _ELSEWHERE)
    weights = [name for name in every if _ALIKE.search(name)]
    common = [name for name in weights if "consolidated" not in name.rsplit("/", 1)[-1]]
    for suffix in (".safetensors", ".bin"):
        chosen = [name for name in common or weights if name.endswith(suffix)]
        if chosen:
            return tuple(name for name in every if name in chosen or name not in weights)
    return tuple(every)


def room(needs: Sequence[Need], free_bytes: int, reserve_mib: int, cache_dir: str) -> None:
    """Refuse a fetch that would fill the disk.

    Raises:
        BerthError: with the sum, per model.
    """
    missing = sum(need.missing for need in needs)
    if missing <= free_bytes - reserve_mib * MIB:
        return
    parts = ", ".join(f"{need.repo} {need.missing // MIB} MiB" for need in needs if need.missing)
    raise BerthError(
        f"{cache_dir} has no room for what is missing: {parts}, and {reserve_mib} MiB that must stay free",
        found=f"{free_bytes // MIB} MiB free",
        allowed=f">= {missing // MIB + reserve_mib} MiB",
        mend="make room, or set ray_slot_cache_dir to a larger disk (ray_slot_hub_reserve_mib is what stays free)",
    )


def read_job(path: Path) -> Job:
    """The job in a file."""
    return load(Job, json.loads(path.read_text(encoding="utf-8")), str(path))


def plan(job: Job) -> tuple[Need, ...]:
    """Ask the hub what every model takes; writes nothing.

    Not by huggingface_hub's own dry run: that moves the branch's reference in the cache already, and an offline engine
    that starts meanwhile would look for a snapshot that is not there.

    Raises:
        BerthError: the hub cannot be reached, or does not give the repository to us.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    needs = []
    for model in job.models:
        try:
            commit = str(api.model_info(model.repo, revision=model.revision).sha)
            listing = list(api.list_repo_tree(model.repo, recursive=True, revision=commit))
        except Exception as error:
            raise _told(model, error) from None
        sizes = {item.path: int(item.size) for item in listing if hasattr(item, "size")}
        files = needed_files(sizes)
        snapshot = _folder(job, model.repo) / "snapshots" / commit
        needs.append(
            Need(
                repo=model.repo,
                revision=model.revision,
                commit=commit,
                files=files,
                total=sum(sizes[name] for name in files),
                missing=sum(sizes[name] for name in files if not (snapshot / name).exists()),
            )
        )
    return tuple(needs)


def _told(model: Model, error: Exception) -> BerthError:
    """One sentence for an error of huggingface_hub, which has one class per cause."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    causes = {
        "GatedRepoError": "accept this repository's terms and set ray_slot_hub_token to a token that may read it",
        "RepositoryNotFoundError": "correct the name in serve_apps_list, or set ray_slot_hub_token if it is private",
        "RevisionNotFoundError": "correct engine_args.revision of the model in serve_apps_list",
    }
    names = [kind.__name__ for kind in type(error).__mro__]
    why = next((mend for name, mend in causes.items() if name in names), None)
    return BerthError(
        f"{model.repo} at {model.revision} cannot be fetched from {endpoint}",
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        mend=why or "let the host reach the hub, set ray_slot_hub_endpoint to a mirror, or copy the cache to the host",
    )


def fetch(job: Job, status: Path, heartbeat: Path) -> None:
    """Download what is missing and write ``status`` once a second until all is there or something is wrong."""
    progress: dict[str, Progress] = {}

    def write(state: str, error: str = "") -> None:
        write_json(status, asdict(Status(state, tuple(progress.values()), error)))

    try:
        write("running")
        needs = plan(job)
        room(needs, shutil.disk_usage(job.cache_dir).free, job.reserve_mib, job.cache_dir)
        for need in needs:
            progress[need.repo] = Progress(need.repo, "waiting", need.total - need.missing, need.total)
        for need in needs:
            with _watched(job, need, progress, write, heartbeat):
                _download(job, need)
            progress[need.repo] = Progress(need.repo, "done", need.total, need.total)
        write("done")
    except BerthError as error:
        write("failed", str(error))
    except Exception as error:
        write("failed", f"{type(error).__name__}: {error}")


def _download(job: Job, need: Need) -> None:
    from huggingface_hub import snapshot_download

    folder = _folder(job, need.repo)
    # What a killed download left: never taken up again, and as large as a shard.
    for stale in folder.glob("blobs/*.incomplete"):
        stale.unlink(missing_ok=True)
    try:
        snapshot_download(
            need.repo,
            revision=need.commit,
            cache_dir=job.cache_dir,
            allow_patterns=[glob.escape(name) for name in need.files],
        )
    except Exception as error:
        raise _told(Model(need.repo, need.revision), error) from None
    # The listing of the whole repository would make an offline engine take ours, without the files that nobody needs,
    # for an incomplete one (IncompleteSnapshotError).
    (folder / "trees" / f"{need.commit}.json").unlink(missing_ok=True)
    if need.revision != need.commit:
        # Last: until now replicas that start find what they found before.
        write_text(folder / "refs" / need.revision, need.commit)


def _folder(job: Job, repo: str) -> Path:
    return Path(job.cache_dir) / f"models--{repo.replace('/', '--')}"


class _watched:
    """While inside: what has arrived is written down, and a fetch that nobody asks about any more ends."""

    def __init__(self, job: Job, need: Need, progress: dict[str, Progress], write: Any, heartbeat: Path) -> None:
        self._job, self._need, self._progress, self._write, self._heartbeat = job, need, progress, write, heartbeat
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            need = self._need
            arrived = arrived_bytes(_folder(self._job, need.repo), need)
            self._progress[need.repo] = Progress(need.repo, "running", min(arrived, need.total), need.total)
            self._write("running")
            if self._over.wait(WATCH_S):
                return
            if abandoned(self._heartbeat):
                self._write("failed", "nobody asks about this download any more; run it again to go on")
                os._exit(3)


def abandoned(heartbeat: Path) -> bool:
    """Whether the asker was last heard too long ago."""
    try:
        return time.time() - heartbeat.stat().st_mtime > ABANDONED_S
    except OSError:
        return True


def arrived_bytes(folder: Path, need: Need) -> int:
    """Bytes of a model's files that are on the disk, finished or not."""
    snapshot = folder / "snapshots" / need.commit
    sizes = [_size(snapshot / name) for name in need.files]
    return sum(sizes) + sum(_size(path) for path in folder.glob("blobs/*.incomplete"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def progress_lines(models: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> list[str]:
    """One line per model that is on its way, for people; ``rates`` in bytes per second."""
    lines = []
    for model in models:
        if model["state"] != "running":
            continue
        done, total = int(model["done"]), max(int(model["total"]), 1)
        rate = rates.get(model["repo"], 0.0)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        speed = f", {rate / MIB:.1f} MiB/s{left}" if rate > 0 else ""
        lines.append(f"{model['repo']}: {done / MIB:.0f} of {total / MIB:.0f} MiB ({100 * done // total} %){speed}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """``plan JOB`` prints the needs as JSON; ``fetch JOB`` downloads. 0 went through, 1 an error (as JSON) was printed,
    4 another fetch into this cache runs."""
    verb, path = (argv or sys.argv[1:])[:2]
    where = Path(path)
    job = read_job(where)
    if verb == "plan":
        try:
            needs = plan(job)
            room(needs, shutil.disk_usage(_existing(Path(job.cache_dir))).free, job.reserve_mib, job.cache_dir)
        except BerthError as error:
            print(json.dumps({"error": str(error)}))
            return 1
        print(json.dumps({"needs": [asdict(need) for need in needs]}))
        return 0
    with (where.parent / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 4
        fetch(job, where.parent / "status.json", where.parent / "heartbeat")
    return 0


def _existing(path: Path) -> Path:
    """The nearest directory above that is there already."""
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


if __name__ == "__main__":
    sys.exit(main())
