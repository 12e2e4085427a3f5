"""Draw docs/images/map.svg from a verification of a running cluster; run at the root of the checkout:

berth verify --json | .venv/bin/python docs/images/draw_map.py docs/images/map.svg
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from berth.codec import load, write_text
from berth.report.map import svg_map
from berth.verify.compare import Report


def main() -> None:
    answer = json.load(sys.stdin)
    report = load(Report, {key: answer[key] for key in ("ok", "findings", "rows")}, "report")
    svg = svg_map(report, title="berth verify")
    # An image in a page must not fetch fonts from elsewhere; the next monospace font does.
    write_text(Path(sys.argv[1]), re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    main()
