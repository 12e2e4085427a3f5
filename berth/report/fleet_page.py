"""A plan as one HTML file without anything from elsewhere: what is missing, the picture, every reason with a filter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from berth.plan.contract_answer import number_replicas
from berth.plan.reasons import gib
from berth.plan.types import Plan, Solution
from berth.report.fleet_picture import fleet_svg
from berth.report.fleet_view import fleet_view, headline, missing_of

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", "Liberation Sans", sans-serif; color: #1f2328; background: #fff;
  max-width: 1328px; margin: 0 auto; padding: 0 24px 48px; }
h1 { font-size: 24px; margin: 24px 0 4px; } h2 { font-size: 18px; margin: 32px 0 8px; }
.told { color: #59636e; margin: 0 0 16px; }
.bad { border: 2px solid #b3261e; border-radius: 6px; background: #fdeceb; padding: 8px 20px; margin: 16px 0; }
.bad h2 { color: #b3261e; margin: 8px 0; } .bad dt { font-weight: 600; } .bad dd { margin: 0 0 8px 16px; }
.good { color: #116329; font-weight: 600; }
svg { width: calc(100% + 48px); height: auto; margin: 0 -24px; }
label { display: block; margin: 8px 0; } input { font: inherit; padding: 6px 10px; width: 360px; max-width: 100%; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; color: #59636e; padding: 4px 0; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; border-bottom: 1px solid #d8dee4; }
th { position: sticky; top: 0; background: #fff; } td.n, th.n { text-align: right; white-space: nowrap; }
td:first-child, td:nth-child(3) { white-space: nowrap; }
code { font-size: 12px; color: #59636e; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: 12px; }
"""

_SCRIPT = """
const box = document.getElementById('filter'), rows = [...document.querySelectorAll('#reasons tbody tr')];
const shown = document.getElementById('shown'), texts = rows.map(row => row.textContent.toLowerCase());
function filter() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  rows.forEach((row, i) => { const yes = words.every(word => texts[i].includes(word));
    row.hidden = !yes; count += yes; });
  shown.textContent = count + ' of ' + rows.length + ' shown';
}
box.addEventListener('input', filter); filter();
"""


def fleet_html(
    solution: Solution, title: str = "Berth plan", notes: Sequence[str] = (), changes: Sequence[str] = ()
) -> str:
    """The plan as a page; ``changes`` are lines about what moves."""
    plan = solution.plan
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="told">{escape(headline(solution))}</p>',
        unplaced_section(plan),
        f"<section>{fleet_svg(solution, title, alone=False)}</section>",
    ]
    if changes:
        body.append(f"<h2>What changes</h2><pre>{escape(chr(10).join(changes))}</pre>")
    if notes:
        body.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    body.append(reasons_section(plan))
    return page(title, body)


def page(title: str, body: Iterable[str]) -> str:
    """A whole document."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{chr(10).join(body)}\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def unplaced_section(plan: Plan) -> str:
    """What is not placed and the way out; first, and red."""
    items = fleet_view(plan).unplaced
    if not items:
        return '<p class="good">✓ every replica is placed</p>'
    rows = "".join(
        f"<dt>{escape(item.deployment)}: {missing_of(item.replicas, item.room)}"
        + (f", {gib(item.shortage_mib)} GiB short" if item.shortage_mib else "")
        + f"</dt><dd>{escape(item.reason)}</dd>"
        for item in items
    )
    missing = sum(item.replicas + item.room for item in items)
    return f'<section class="bad" role="alert"><h2>✗ Not placed: {missing}</h2><dl>{rows}</dl></section>'


def reasons_section(plan: Plan) -> str:
    """Every berth with its replicas, its GPUs and its reason, and a box to filter them."""
    slots = {slot.name: slot for slot in plan.slots}
    given, _ = number_replicas(plan, {})
    rows = []
    for berth, numbers in zip(plan.berths, given, strict=True):
        slot = slots[berth.slot]
        room = f" + room for {berth.reserved}" if berth.reserved else ""
        rows.append(
            f'<tr><td>{escape(berth.deployment)}</td><td class="n">{len(numbers)}{room}</td>'
            f"<td>{escape(slot.name)}</td>"
            f"<td><code>{escape(', '.join(slot.gpu_uuids))}</code></td>"
            f'<td class="n">{gib(berth.vram_mib)}</td><td>{escape(berth.reason)}</td></tr>'
        )
    return (
        '<h2>Why each is where it is</h2><label>Filter <input id="filter" type="search" '
        'placeholder="deployment, host, GPU, word of a reason"></label>'
        '<table id="reasons"><caption id="shown" aria-live="polite"></caption><thead><tr><th>deployment</th>'
        '<th class="n">replicas</th><th>slot</th><th>GPUs</th><th class="n">GiB each</th><th>reason</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
