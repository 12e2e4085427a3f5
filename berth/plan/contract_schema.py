"""The JSON Schemas of ``berth plan``'s files, made from what reads and writes them.

``python -m berth.plan.contract_schema docs/schemas`` writes them; a test compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from berth.codec import write_json
from berth.plan.contract import AppsFile, GpusFile
from berth.plan.types import PLAN_VERSION, STRATEGIES, Summary

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TEXT = {"type": "string"}
_MIB = {"type": "integer", "minimum": 0}
_GPUS = {"type": "array", "items": _TEXT, "minItems": 1, "description": "UUIDs"}


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> schema."""
    return {
        "gpus.schema.json": _input(GpusFile, "The file of berth plan --gpus (JSON or YAML)"),
        "apps.schema.json": _input(AppsFile, "The file of berth plan --apps (JSON or YAML)"),
        "plan.schema.json": _answer(),
    }


def _input(kind: Any, title: str) -> dict[str, Any]:
    return {"$schema": DIALECT, **TypeAdapter(kind).json_schema(), "title": title}


def _object(title: str, required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    told = {"description": title} if title else {}
    return {**told, "type": "object", "properties": {**required, **optional}, "required": sorted(required)}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def _answer() -> dict[str, Any]:
    where = {"deployment": _TEXT, "host": _TEXT, "gpus": _GPUS, "vram_mib": _MIB, "reason": _TEXT}
    number = {"type": "integer", "minimum": 0}
    strategy = {"enum": list(STRATEGIES)}
    slot = dict.fromkeys(("memory_mib", "usable_mib", "foreign_mib", "promised_mib", "reserved_mib", "free_mib"), _MIB)
    words = ("name", "host", "product", "rack", "zone", "compute_capability", "nvlink_group")
    unplaced = _object(
        "One replica without a place; with room true a place that is promised beyond the replicas",
        {"deployment": _TEXT, "replica": number, "reason": _TEXT},
        shortage_mib={
            **_MIB,
            "description": "missing on the GPU nearest to holding it, when memory is what is missing",
        },
        room={"const": True},
    )
    failure = _object("Bad input (exit code 2)", {"ok": {"const": False}, "error": _TEXT}, what=_TEXT, mend=_TEXT)
    plan = _object(
        "A plan (exit code 0 when ok, else 1)",
        {
            "version": {"const": PLAN_VERSION},
            "strategy": strategy,
            "ok": {"type": "boolean", "description": "every replica is placed"},
            "assignments": _list(_object("One replica", {**where, "replica": number})),
            "reservations": _list(_object("Room kept for growth (headroom, pools)", {**where, "replicas": number})),
            "unplaced": _list(unplaced),
            "slots": _list(
                _object(
                    "One GPU, or several of one host that one replica takes; memory is MiB on each",
                    {
                        **dict.fromkeys(words, _TEXT),
                        **slot,
                        "gpus": _GPUS,
                        "indices": _list(number),
                        "cost": {"type": "number"},
                        "cordoned": {"type": "boolean"},
                    },
                )
            ),
            "deployments": _list(_object("", {"name": _TEXT, "replicas": number, "strategy": strategy})),
            "summary": _summary(number),
        },
        notes=_list(_TEXT),
        diff=_object(
            "What moves against the previous plan (--diff)",
            {
                "cost": {"type": "object"},
                "elapsed_s": {"type": "number"},
                "ok": {"type": "boolean"},
                "refused": _list(_TEXT),
            },
        ),
        steps=_list(_object("One step of the migration, in order (--diff)", {"kind": {"enum": ["make", "break"]}})),
    )
    return {"$schema": DIALECT, "title": "What berth plan --format json prints", "oneOf": [plan, failure]}


def _summary(number: dict[str, Any]) -> dict[str, Any]:
    told = TypeAdapter(Summary).json_schema()
    counts = {"replicas": number, "placed": number, "unplaced": number}
    required = sorted({*counts, *told["required"]})
    return {"type": "object", "properties": {**counts, **told["properties"]}, "required": required}


if __name__ == "__main__":
    for name, schema in schemas().items():
        write_json(Path(sys.argv[1]) / name, schema)
