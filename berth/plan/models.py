"""Which models a host needs, by the plan: what is fetched there before a replica asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from berth.plan.apps import AppSpec
from berth.plan.types import Plan


@dataclass(frozen=True)
class ModelSource:
    """Where weights come from: a directory of the host (``path``), or a repository of the hub at a revision."""

    app: str
    path: str = ""
    repo: str = ""
    revision: str = "main"


def sources(spec: AppSpec) -> tuple[ModelSource, ...]:
    """Everything that a replica of this app loads by name: its model, and a tokenizer or a draft model of its own."""
    if spec.engine == "light" or not spec.model:
        return ()
    args = spec.engine_args
    found = [_source(spec.name, spec.model, args.get("revision"))]
    if args.get("tokenizer"):
        found.append(_source(spec.name, str(args["tokenizer"]), args.get("tokenizer_revision")))
    draft = args.get("speculative_config")
    if isinstance(draft, dict) and draft.get("model"):
        found.append(_source(spec.name, str(draft["model"]), draft.get("revision")))
    return tuple(found)


def _source(app: str, name: str, revision: object) -> ModelSource:
    if name.startswith(("/", ".", "~")):
        return ModelSource(app, path=name)
    return ModelSource(app, repo=name, revision=str(revision or "main"))


def models_of_host(plan: Plan, specs: Iterable[AppSpec], host: str) -> tuple[ModelSource, ...]:
    """What the berths on a host's slots load, each once, ordered by app."""
    slots = {slot.name for slot in plan.slots if slot.host == host}
    wanted = {berth.deployment for berth in plan.berths if berth.slot in slots}
    found: dict[tuple[str, str, str], ModelSource] = {}
    for spec in sorted(specs, key=lambda item: item.name):
        for source in sources(spec) if spec.name in wanted else ():
            found.setdefault((source.path, source.repo, source.revision), source)
    return tuple(found.values())
