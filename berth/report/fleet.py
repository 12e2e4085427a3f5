"""A plan for people: a table for the terminal, a picture, a page. Which of them, the one who asks decides."""

from __future__ import annotations

from berth.report.fleet_page import fleet_html as fleet_html
from berth.report.fleet_picture import fleet_svg as fleet_svg
from berth.report.fleet_text import fleet_table as fleet_table
