#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The cluster's certificate authority and every host's certificate, on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_certificates
short_description: Make the cluster's certificate authority and the certificate of each host
description:
  - Run it on the controller. A certificate that is there and good stays; one that is missing, ends soon, lacks an
    address or is another authority's is made anew.
  - An authority that is there is never replaced unasked. One of which only a part is left is refused.
options:
  directory:
    description: "Where they lie: C(ca.crt), C(ca.key), C(<host>.crt), C(<host>.key); keys for their owner alone."
    type: path
    required: true
  cluster:
    description: The cluster's id, in the authority's name.
    type: str
    required: true
  hosts:
    description: Host to the addresses that its certificate must be good for; loopback is added.
    type: dict
    required: true
  authority_days:
    description: Days that the authority's certificate holds.
    type: int
    default: 3650
  days:
    description: Days that a host's certificate holds.
    type: int
    default: 365
  renew_days:
    description: Days before its end that a host's certificate is made anew.
    type: int
    default: 60
  renew:
    description: Hosts whose certificate is made anew although it is good, or V(ca) for the authority and all hosts.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    support: full
    description: Says what it would make.
  diff_mode:
    support: full
    description: Shows whose certificate is made and why, never a key.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Certificates of two hosts
  node_certificates:
    directory: .berth/secrets/tls
    cluster: onprem-1a2b
    hosts: {gpu01: [192.0.2.21], gpu02: [192.0.2.22]}
"""

RETURN = r"""
made:
  description: Whose certificate was made, and why.
  type: dict
  returned: always
  sample: {gpu02: it ends on 2027-01-31}
ends:
  description: The day on which each certificate ends.
  type: dict
  returned: always
  sample: {ca: "2036-11-18", gpu01: "2027-11-21", gpu02: "2027-11-21"}
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

try:
    import datetime as dt
    from pathlib import Path

    from berth.errors import BerthError
    from berth.host import tls

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = str(error)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "cluster": {"type": "str", "required": True},
            "hosts": {"type": "dict", "required": True},
            "authority_days": {"type": "int", "default": 3650},
            "days": {"type": "int", "default": 365},
            "renew_days": {"type": "int", "default": 60},
            "renew": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    if IMPORT_ERROR:
        module.fail_json(msg=f"the controller's Python lacks what makes certificates ({IMPORT_ERROR}); run: make setup")
    options, directory = module.params, Path(module.params["directory"])
    days = [dt.timedelta(days=options[name]) for name in ("authority_days", "days", "renew_days")]
    try:
        changes = tls.plan(
            directory,
            options["cluster"],
            options["hosts"],
            tls.Terms(*days),
            dt.datetime.now(dt.UTC),
            options["renew"],
        )
        before = tls.ends(directory, [tls.AUTHORITY, *options["hosts"]])
        if not module.check_mode:
            tls.write(directory, changes)
    except BerthError as error:
        module.fail_json(msg=str(error))
    after = {**before, **{change.name: f"{tls.end(change.pair.certificate):%Y-%m-%d}" for change in changes}}
    made = {change.name: change.reason for change in changes}
    told = "".join(f"{name}: {reason}\n" for name, reason in made.items())
    module.exit_json(
        changed=bool(changes), made=made, ends=after, diff={"before": "", "after": told, "after_header": "made"}
    )


if __name__ == "__main__":
    main()
