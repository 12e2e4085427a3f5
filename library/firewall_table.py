#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Have one nftables table as a file says."""

from __future__ import annotations

DOCUMENTATION = r"""
module: firewall_table
short_description: Have one nftables table in force exactly as a file of rules says
description:
  - Loads the file into an empty network namespace, lists the table there and in the host's own, and loads it into the
    host's own where they differ. So a table that was flushed or changed by hand is mended.
  - Other tables are neither read nor changed. Needs root.
options:
  path:
    description: The file of rules; it replaces the table in one transaction.
    type: path
    required: true
  table:
    description: Name of the table, of the family inet.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: Compares and loads nothing.
  diff_mode:
    support: full
    description: Shows the table in force and the table wanted, as nft lists them.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Have Berth's rules in force
  firewall_table: {path: /etc/nftables.d/berth.nft, table: berth}
"""

RETURN = r"""
compared:
  description: Whether the file could be tried in a network namespace; if not, it is loaded every time.
  type: bool
  returned: always
  sample: true
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    from pathlib import Path

    from berth.errors import BerthError
    from berth.host import firewall

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "table": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    path, table = Path(module.params["path"]), module.params["table"]
    if module.check_mode and not path.exists():
        # Nothing was written yet; nft itself may not be there.
        module.exit_json(changed=True, compared=False, diff={"before": "", "after": f"{path}\n"})
    try:
        before = firewall.compare(path, table)
        after = before.wanted
        if before.differ and not module.check_mode:
            firewall.load(path)
            after = firewall.compare(path, table).found
    except BerthError as error:
        module.fail_json(msg=str(error))
    changed = before.differ if after is None else before.found != after
    module.exit_json(
        changed=changed,
        compared=before.wanted is not None,
        diff={"before": before.found, "after": before.found if after is None else after},
    )


if __name__ == "__main__":
    main()
