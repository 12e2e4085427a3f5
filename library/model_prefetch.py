#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Module model_prefetch: a thin shim over berth.host.hub, which runs in the runtime environment."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: model_prefetch
short_description: Download models into the hub cache of a host
description:
  - Asks the hub what the models take, checks the disk, and downloads what is missing in a process of its own; an action
    plugin of this name asks how far it is and shows that. Directories of the host are only looked for.
  - A download that was interrupted goes on with the files that are missing. It ends by itself when nobody asks about it
    for a minute.
options:
  python:
    description: The interpreter of the runtime environment, which has huggingface_hub.
    type: path
    required: true
  cache_dir:
    description: The hub cache, which replicas know as HF_HOME/hub.
    type: path
    required: true
  models:
    description: What is needed, each with C(path), or with C(repo) and C(revision).
    type: list
    elements: dict
    required: true
  endpoint:
    description: The hub, or a mirror of it; empty is the hub itself.
    type: str
    default: ""
  token:
    description: Token for gated and private repositories; the download has it in its environment, no file has it.
    type: str
    default: ""
  owner:
    description: User whom the files shall belong to; empty is whoever runs the module.
    type: str
    default: ""
  reserve_mib:
    description: MiB that must stay free on the file system of the cache.
    type: int
    default: 0
  phase:
    description: Set by the action plugin.
    choices:
      - first
      - next
    default: first
    type: str
attributes:
  check_mode:
    support: full
    description: Asks the hub and says what it would download.
  diff_mode:
    support: full
    description: The models that are missing, with their size.
requirements: [berth]
author: The Berth authors
"""

EXAMPLES = r"""
- name: Fetch the models of this host
  model_prefetch:
    python: /var/lib/berth/runtime/current/bin/python
    cache_dir: /var/lib/berth/cache/huggingface/hub
    models:
      - {repo: Qwen/Qwen3-8B, revision: main}
      - {path: /srv/models/bge-m3}
"""

RETURN = r"""
state:
  description: running, done.
  returned: success
  type: str
  sample: done
models:
  description: Each model with its state and bytes.
  returned: success
  type: list
  elements: dict
  sample: [{repo: Qwen/Qwen3-8B, state: done, done: 16397461266, total: 16397461266}]
attached:
  description: Another download into this cache runs; it is waited for, then asked again.
  returned: when that is so
  type: bool
  sample: true
missing_bytes:
  description: What was missing before.
  returned: in phase first
  type: int
  sample: 0
"""

import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from berth.codec import write_json

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def environment(params: dict) -> dict:
    """The worker's: nothing of ours decides where the cache is, and replicas' offline mode does not count here."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(home(params).parent)}
    env |= {"HF_ENDPOINT": params["endpoint"]} if params["endpoint"] else {}
    return env | ({"HF_TOKEN": params["token"]} if params["token"] else {})


def home(params: dict) -> Path:
    """Where the job and its progress lie: beside the hub cache."""
    return Path(params["cache_dir"]).parent / "prefetch"


def as_owner(params: dict) -> dict:
    """How the worker becomes the cache's owner."""
    if not params["owner"] or os.geteuid() != 0:
        return {}
    return {"user": params["owner"], "group": params["owner"], "extra_groups": []}


def prepare(params: dict, directory: Path) -> None:
    """The directories of cache and job; both belong to the worker, who writes there how far it is."""
    for path in (directory, Path(params["cache_dir"])):
        path.mkdir(parents=True, exist_ok=True)
    if as_owner(params):
        for path in (directory.parent, directory, Path(params["cache_dir"])):
            shutil.chown(path, params["owner"], params["owner"])


def write_job(params: dict, directory: Path) -> Path:
    repos = [item for item in params["models"] if item.get("repo")]
    hub = [{"repo": item["repo"], "revision": item.get("revision") or "main"} for item in repos]
    job = directory / "job.json"
    write_json(job, {"cache_dir": params["cache_dir"], "models": hub, "reserve_mib": params["reserve_mib"]})
    return job


def worker(params: dict, verb: str, job: Path) -> list:
    return [params["python"], "-m", "berth.host.hub", verb, str(job)]


def ask(module: AnsibleModule, job: Path) -> list:
    """What every model needs, asked of the hub by the worker."""
    done = subprocess.run(
        worker(module.params, "plan", job), env=environment(module.params), capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        module.fail_json(msg=f"{module.params['python']} -m berth.host.hub does not answer: {done.stderr[-500:]}")
    if "error" in answer:
        module.fail_json(msg=answer["error"])
    return answer["needs"]


def read_status(directory: Path) -> dict:
    try:
        return json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"state": "running", "models": [], "error": ""}


def running(directory: Path) -> bool:
    """Whether the download that was started last still runs; its pid may be somebody else's by now."""
    try:
        command = Path("/proc", (directory / "pid").read_text().strip(), "cmdline").read_bytes()
    except (OSError, ValueError):
        return False
    return b"berth.host.hub" in command


def first(module: AnsibleModule) -> None:
    """Look for directories, ask the hub, and start the download where something is missing."""
    params = module.params
    gone = [item["path"] for item in params["models"] if item.get("path") and not os.path.isdir(item["path"])]
    if gone:
        module.fail_json(
            msg=f"model directories are not on this host: {', '.join(gone)}; mend: copy them there, or correct "
            "model in serve_apps_list"
        )
    directory = home(params)
    if not any(item.get("repo") for item in params["models"]):
        module.exit_json(changed=False, state="done", models=[], missing_bytes=0)
    if module.check_mode:
        with tempfile.TemporaryDirectory() as temporary:
            needs = ask(module, write_job(params, Path(temporary)))
    elif running(directory):
        # Somebody else's, or one that was interrupted here; this job comes after it.
        module.exit_json(changed=False, state="running", attached=True, models=read_status(directory)["models"])
    else:
        prepare(params, directory)
        needs = ask(module, write_job(params, directory))
    missing = sum(need["missing"] for need in needs)
    models = [
        {
            "repo": need["repo"],
            "state": "waiting" if need["missing"] else "done",
            "done": need["total"] - need["missing"],
            "total": need["total"],
        }
        for need in needs
    ]
    lines = [f"{need['repo']}: {need['missing'] // 2**20} MiB\n" for need in needs if need["missing"]]
    answer = {
        "changed": bool(missing),
        "models": models,
        "missing_bytes": missing,
        "diff": {"before": "", "after": "".join(lines)},
    }
    if module.check_mode or not missing:
        module.exit_json(state="done", **answer)
    (directory / "status.json").unlink(missing_ok=True)
    (directory / "heartbeat").touch()
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            worker(params, "fetch", directory / "job.json"),
            env=environment(params),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **as_owner(params),
        )
    (directory / "pid").write_text(str(process.pid))
    module.exit_json(state="running", **answer)


def following(module: AnsibleModule) -> None:
    """How far the download is; fails when it failed, or ended without a word."""
    directory = home(module.params)
    (directory / "heartbeat").touch()
    alive = running(directory)
    status = read_status(directory)
    if status["state"] == "failed":
        module.fail_json(msg=status["error"], models=status["models"])
    if status["state"] == "running" and not alive:
        log = (directory / "log").read_text(errors="replace")[-500:]
        module.fail_json(msg=f"the download ended without a word; mend: run it again, it goes on; its log: {log}")
    module.exit_json(changed=False, state=status["state"], models=status["models"])


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "python": {"type": "path", "required": True},
            "cache_dir": {"type": "path", "required": True},
            "models": {"type": "list", "elements": "dict", "required": True},
            "endpoint": {"type": "str", "default": ""},
            "token": {"type": "str", "default": "", "no_log": True},
            "owner": {"type": "str", "default": ""},
            "reserve_mib": {"type": "int", "default": 0},
            "phase": {"choices": ["first", "next"], "default": "first"},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    if module.params["phase"] == "first":
        first(module)
    following(module)


if __name__ == "__main__":
    main()
