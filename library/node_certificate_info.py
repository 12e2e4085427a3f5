#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""When the certificates end that the host's running nodes show."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_certificate_info
short_description: Ask each running node of the host which certificate it shows
description:
  - Shakes hands with the node manager's port of every node configured on the host. A node shows the certificate that
    it started with, whatever lies on the disk since.
  - Fails when one has ended or is not the cluster's; warns when one ends soon. Changes nothing.
options:
  directory:
    description: Where the nodes' configurations lie.
    type: path
    required: true
  warn_days:
    description: Warn when less than so many days are left.
    type: int
    required: true
attributes:
  check_mode:
    support: full
    description: Only reads.
  diff_mode:
    support: none
    description: Only reads.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Say when certificates end
  node_certificate_info: {directory: /etc/berth, warn_days: 60}
"""

RETURN = r"""
ends:
  description: The day on which the certificate of each running node ends.
  type: dict
  returned: always
  sample: {gpu01-0: "2027-11-21"}
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    import datetime as dt
    from pathlib import Path

    from berth.errors import BerthError
    from berth.host.tls_seen import nodes_of, shown

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)

MEND = "mend: ansible-playbook playbooks/rotate_secrets.yml -e rotate=certificates"


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "warn_days": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"this Python has no berth ({IMPORT_ERROR}); run role berth_agent first")
    try:
        found = shown(nodes_of(Path(module.params["directory"])))
    except BerthError as error:
        module.fail_json(msg=str(error))
    ends = {item.node: f"{item.ends:%Y-%m-%d}" for item in found if item.ends}
    wrong = [f"{item.node} (port {item.port}): {item.problem}" for item in found if item.problem]
    if wrong:
        module.fail_json(msg=f"{'; '.join(wrong)}; {MEND}", ends=ends)
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=module.params["warn_days"])
    late = [f"{item.node} until {item.ends:%Y-%m-%d}" for item in found if item.ends and item.ends < soon]
    if late:
        module.warn(f"nodes run with a certificate that ends soon: {', '.join(late)}; {MEND}")
    module.exit_json(changed=False, ends=ends)


if __name__ == "__main__":
    main()
