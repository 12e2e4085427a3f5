#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Several small files in one round trip; standard library only, so that any host's Python will do."""

from __future__ import annotations

DOCUMENTATION = r"""
module: text_files
short_description: Have text files with exactly this content, mode and owner
description:
  - What M(ansible.builtin.copy) does with C(content), for a list in one call. A task per file costs two round trips
    each, on every run.
  - Each file is replaced by a rename, so that a reader finds the old one or the new one, never a part.
options:
  files:
    description: The files; their directories must be there.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where.
        type: path
        required: true
      content:
        description: The whole text.
        type: str
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
    description: Says which files would be written or changed.
  diff_mode:
    support: full
    description: The text before and after, of each file that differs.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Write the node and its unit
  text_files:
    files:
      - {path: /etc/berth/head.json, content: "{{ node | to_nice_json }}\n", mode: "0644"}
      - path: /etc/systemd/system/berth-ray-head.service
        content: "{{ lookup('ansible.builtin.template', 'unit.service.j2') }}"
        mode: "0644"
"""

RETURN = r"""
changes:
  description: One line per file that was written or changed.
  type: list
  elements: str
  returned: always
  sample: ['/etc/berth/head.json: written']
"""

import os  # noqa: E402
import tempfile  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402


def read(path: str) -> str | None:
    """The file's text; None when there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None


def write(module: AnsibleModule, path: str, content: str) -> None:
    """Replace the file by one rename within its directory's file system."""
    number, scratch = tempfile.mkstemp(prefix=".berth-", dir=os.path.dirname(path))
    try:
        with os.fdopen(number, "w", encoding="utf-8", newline="") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        module.atomic_move(scratch, path)
    finally:
        if os.path.exists(scratch):
            os.unlink(scratch)


def have(module: AnsibleModule, wanted: dict[str, str | None]) -> tuple[str, dict[str, str]] | None:
    """Make one file what it must be; what was (or would be) done as a line and as a diff."""
    path, content = str(wanted["path"]), str(wanted["content"])
    if os.path.isdir(path):
        module.fail_json(msg=f"{path} is a directory and must be a file; mend: move it away", path=path)
    before = read(path)
    differs = before != content
    if differs and not module.check_mode:
        write(module, path, content)
    if differs and before is None and module.check_mode:
        # Neither mode nor owner can be asked of what is not there.
        other = False
    else:
        other = module.set_owner_if_different(path, wanted.get("owner"), False)
        other = module.set_mode_if_different(path, wanted["mode"], other)
    if not (differs or other):
        return None
    diff = {"before_header": path, "after_header": path, "before": before or "", "after": content}
    return (
        f"{path}: {'written' if differs else 'mode or owner changed'}",
        diff if differs else {"prepared": f"{path}: mode or owner changed\n"},
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str", "required": True},
                    "mode": {"type": "str", "required": True},
                    "owner": {"type": "str"},
                },
            }
        },
        supports_check_mode=True,
    )
    try:
        done = [found for item in module.params["files"] if (found := have(module, item))]
    except OSError as error:
        module.fail_json(msg=f"a file cannot be written: {error}")
    module.exit_json(changed=bool(done), changes=[line for line, _diff in done], diff=[diff for _line, diff in done])


if __name__ == "__main__":
    main()
