#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Several directories in one round trip; standard library only, since nothing of Berth is on a fresh host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: directories
short_description: Have directories, with their modes and owners
description:
  - What M(ansible.builtin.file) does with C(state=directory), for a list in one call, in its order. A loop over the
    directories of a host costs a round trip each, on every run.
options:
  directories:
    description: The directories; parents that are not there are made with the system's default mode.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where.
        type: path
        required: true
      mode:
        description: Octal mode, as text.
        type: str
        required: true
      owner:
        description: Name of the owner; left as it is where not given.
        type: str
attributes:
  check_mode:
    support: full
    description: Says what would be made or changed.
  diff_mode:
    support: full
    description: Lists what is missing or different.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Make the directories
  directories:
    directories:
      - {path: /run/berth, mode: "0700", owner: berth}
      - {path: /etc/berth, mode: "0755"}
"""

RETURN = r"""
changes:
  description: One line per directory that was made or changed.
  type: list
  elements: str
  returned: always
  sample: ['/run/berth: made']
"""

import os  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402


def have(module: AnsibleModule, wanted: dict[str, str | None]) -> str | None:
    """Make one directory what it must be; a line when something was (or would be) done."""
    path = str(wanted["path"])
    if os.path.exists(path) and not os.path.isdir(path):
        module.fail_json(msg=f"{path} is there and is no directory; mend: move it away", path=path)
    made = not os.path.isdir(path)
    if made and module.check_mode:
        return f"{path}: made"
    if made:
        os.makedirs(path)
    changed = module.set_owner_if_different(path, wanted.get("owner"), False)
    changed = module.set_mode_if_different(path, wanted["mode"], changed)
    return f"{path}: made" if made else f"{path}: mode or owner changed" if changed else None


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directories": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "mode": {"type": "str", "required": True},
                    "owner": {"type": "str"},
                },
            }
        },
        supports_check_mode=True,
    )
    try:
        lines = [line for item in module.params["directories"] if (line := have(module, item))]
    except OSError as error:
        module.fail_json(msg=f"a directory cannot be made: {error}")
    diff = {"prepared": "".join(f"{line}\n" for line in lines)} if lines else {}
    module.exit_json(changed=bool(lines), changes=lines, diff=diff)


if __name__ == "__main__":
    main()
