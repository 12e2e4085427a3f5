"""Fills in every host's options and has berth.preflight look at them: the part that needs Ansible's own templating."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.utils.vars import load_extra_vars

from berth.codec import dump
from berth.preflight import inventory as checks
from berth.preflight.ask import ask, expectation
from berth.preflight.checkout import stale_wheel
from berth.preflight.options import Role, read_roles

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("berth_cluster_id", "berth_plan_path", "berth_agent_mark")
"""Derived variables that the checks use beside the options."""


class ActionModule(ActionBase):
    """See library/preflight_inventory.py for what it returns."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: Any = None, task_vars: Any = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        roles = read_roles(ROOT)
        groups = {name: tuple(map(str, hosts)) for name, hosts in task_vars["groups"].items()}
        names = groups.get(str(self._task.args.get("group", "berth")), ())
        hosts = tuple(self._host(name, roles, task_vars) for name in names)
        options = frozenset(option.name for role in roles for option in role.options)
        # A registered result is nobody's variable; what roles set is theirs, whatever its name.
        made = frozenset(name for role in roles for name in role.made) - options
        sources = sorted({source for host in hosts if (source := host.text("ray_head_token_source"))})
        found = checks.Inventory(
            hosts=hosts,
            groups=groups,
            roles=tuple(role.name for role in roles),
            options=options,
            derived=frozenset(name for role in roles for name in role.derived),
            made=made,
            secrets=tuple(checks.read_secret(source) for source in sources),
        )
        return result | {
            "changed": False,
            "problems": [dump(problem) for problem in (*stale_wheel(ROOT), *checks.check_inventory(found))],
            "ask": {host.name: dump(ask(found, host)) for host in hosts},
            "wanted": {host.name: dump(expectation(found, host)) for host in hosts},
            "accept": sorted(checks.accepted(found)),
            "plan_path": hosts[0].text("berth_plan_path") if hosts else "",
        }

    def _host(self, name: str, roles: tuple[Role, ...], task_vars: Mapping[str, Any]) -> checks.InventoryHost:
        """The host's options as its roles will see them: defaults < inventory < roles' derived < command line."""
        own = task_vars["hostvars"].raw_get(name)
        variables = {
            **self._of_roles("defaults", roles),
            **own,
            **self._of_roles("vars", roles),
            **load_extra_vars(self._loader),
            "hostvars": task_vars["hostvars"],
        }
        templar = self._templar.copy_with_new_env(available_variables=variables)
        values: dict[str, Any] = {"ansible_port": own.get("ansible_port")}
        unresolved = []
        for option in [*(option.name for role in roles for option in role.options), *NEEDED]:
            try:
                values[option] = _plain(templar.template(variables[option]))
            except AnsibleError as error:
                unresolved.append((option, " ".join(str(error).split())))
        wrong = [
            message
            for role in roles
            for message in ArgumentSpecValidator(role.spec)
            .validate({key: value for key, value in values.items() if key in role.spec})
            .error_messages
        ]
        return checks.InventoryHost(name, values, frozenset(map(str, own)), tuple(wrong), tuple(unresolved))

    def _of_roles(self, kind: str, roles: tuple[Role, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for role in roles:
            path = ROOT / "roles" / role.name / kind / "main.yml"
            if path.is_file():
                found |= self._loader.load_from_file(str(path), trusted_as_template=True) or {}
        return found


def _plain(value: Any) -> Any:
    """Without Ansible's tags: plain data, as everything in berth takes it."""
    return json.loads(json.dumps(value, default=str))
