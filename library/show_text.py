#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of the action plugin of this name; nothing runs on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: show_text
short_description: Print text for people as it is
description:
  - Lines keep their columns, so that maps and tables can be read. Changes nothing.
options:
  text:
    description: A string, or a list of lines.
    type: raw
    required: true
attributes:
  check_mode:
    support: full
    description: Prints all the same.
  diff_mode:
    support: none
    description: Changes nothing.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Show the map
  show_text: {text: "{{ report.map }}"}
"""

RETURN = r"""
# Nothing beyond changed.
"""
