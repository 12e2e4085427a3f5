"""docs/driver.md has a section for every finding of role nvidia_driver, and names its variables."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from berth.host import nvidia_checks

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/driver.md").read_text(encoding="utf-8")
DEFAULTS = yaml.safe_load((ROOT / "roles/nvidia_driver/defaults/main.yml").read_text(encoding="utf-8"))


def test_every_kind_has_its_section() -> None:
    sections = re.findall(r"^### (\S+)$", TEXT, flags=re.MULTILINE)
    assert sections == list(nvidia_checks.KINDS)


def test_variables_that_are_named_exist() -> None:
    named = set(re.findall(r"`(nvidia_driver_\w+)", TEXT))
    assert named
    assert named <= set(DEFAULTS)
