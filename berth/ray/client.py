"""Ray's dashboard over REST: the one door through which Berth reads and changes Serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from berth.errors import BerthError, CouldNotTell

APPLICATIONS = "/api/serve/applications/"


class Refused(CouldNotTell):
    """Nobody listens at the dashboard's address: the head is down."""


class TokenRefused(CouldNotTell):
    """The cluster runs with another token: waiting does not help."""


@dataclass(frozen=True)
class RayClient:
    """``address`` is ``http://host:port`` of the dashboard; ``token`` Ray's cluster token ("" where it has none)."""

    address: str
    token: str = ""
    timeout_s: float = 30.0

    def serve(self) -> dict[str, Any]:
        """Serve's details: ``applications`` by name, each with status, deployed config, deployments, replicas."""
        answer = self._call("GET", APPLICATIONS)
        try:
            return dict(answer.json())
        except (ValueError, TypeError):
            raise _strange(answer) from None

    def put_serve(self, config: dict[str, Any]) -> None:
        """Set the whole declarative state of Serve. Apps that are absent from ``config`` are deleted by Serve."""
        self._call("PUT", APPLICATIONS, json=config)

    def nodes(self) -> list[dict[str, Any]]:
        """Every node the cluster knows, dead ones included, with labels and resources."""
        answer = self._call("GET", "/api/v0/nodes", params={"detail": "1", "limit": "10000"})
        try:
            return list(answer.json()["data"]["result"]["result"])
        except (ValueError, TypeError, KeyError):
            raise _strange(answer) from None

    def log_tail(self, node_id: str, filename: str, lines: int = 40) -> str:
        """The last ``lines`` of a log of a node, "" when Ray does not give it."""
        params = {"node_id": node_id, "filename": filename.lstrip("/"), "lines": str(lines)}
        try:
            return str(self._call("GET", "/api/v0/logs/file", params=params).text)
        except BerthError:
            return ""

    def _call(self, method: str, path: str, **options: Any) -> requests.Response:
        url = self.address.rstrip("/") + path
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            with requests.Session() as session:
                # The dashboard is inside the cluster: no proxy of the environment, no password of a ~/.netrc.
                session.trust_env = False
                answer = session.request(method, url, headers=headers, timeout=self.timeout_s, **options)
        except requests.Timeout:
            raise CouldNotTell(
                f"Ray's dashboard at {self.address} did not answer within {self.timeout_s:g} s"
            ) from None
        except requests.RequestException as error:
            kind = Refused if _refused(error) else CouldNotTell
            raise kind(
                f"Ray's dashboard does not answer at {self.address} ({type(error).__name__})",
                mend="look at the unit berth-ray-head, then: ansible-playbook site.yml",
            ) from None
        if answer.status_code in (401, 403):
            raise TokenRefused(
                f"Ray's dashboard at {self.address} refuses our token",
                found=f"HTTP {answer.status_code}",
                mend="the cluster runs with another token: restart it with playbooks/teardown.yml and site.yml",
            )
        if not answer.ok:
            failure = CouldNotTell if answer.status_code >= 500 else BerthError
            raise failure(
                f"Ray's dashboard refused {method} {path}", found=f"HTTP {answer.status_code}: {answer.text[:2000]}"
            )
        return answer


def _refused(error: BaseException | None) -> bool:
    """Whether nobody listened; an unknown host or a broken connection says nothing about that."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _strange(answer: requests.Response) -> CouldNotTell:
    return CouldNotTell(
        "Ray's dashboard gave an answer that is not Ray's",
        found=f"{answer.url}: {answer.text[:200]}",
        mend="look whether something else listens at that address",
    )


def read_token(path: str) -> str:
    """The token file's content.

    Raises:
        BerthError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BerthError(
            f"Ray's token cannot be read from {path}", found=error.strerror, mend="ansible-playbook site.yml"
        ) from None
