"""Which certificate a running node shows: it keeps the one that it started with, whatever lies on the disk."""

from __future__ import annotations

import datetime as dt
import json
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from berth.codec import load
from berth.ray.start import NodeConfig, node_ports

TIMEOUT_S = 5.0
EXPIRED = 10
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED."""


@dataclass(frozen=True)
class Shown:
    """What a node's port showed. ``problem`` is "" when the certificate is good and believed; ``ends`` is in UTC."""

    node: str
    port: int
    ends: dt.datetime | None
    problem: str


def shown(nodes: list[NodeConfig]) -> list[Shown]:
    """The certificates of the ``nodes`` of this host that run with TLS; nodes that do not listen are left out."""
    found = (
        ask(node.name, node.node_ip, node_ports(node).node_manager, node.tls_dir) for node in nodes if node.tls_dir
    )
    return [item for item in found if item is not None]


def ask(node: str, address: str, port: int, tls_dir: str) -> Shown | None:
    """Shake hands at ``address``:``port``, believing the authority in ``tls_dir``; None where nobody listens."""
    try:
        context = ssl.create_default_context(cafile=f"{tls_dir}/ca.crt")
    except OSError as error:
        return Shown(node, port, None, f"{tls_dir}/ca.crt cannot be read ({error.strerror})")
    context.check_hostname = False
    try:
        # TLS 1.3: the node asks for our certificate after it has shown its own, so we need none.
        with (
            socket.create_connection((address, port), TIMEOUT_S) as plain,
            context.wrap_socket(plain) as secure,
        ):
            certificate = secure.getpeercert()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == EXPIRED:
            return Shown(node, port, None, "the certificate that it shows has ended")
        return Shown(node, port, None, f"its certificate is not believed ({error.verify_message})")
    except ConnectionRefusedError:
        return None
    except OSError as error:
        return Shown(node, port, None, f"no TLS at its node manager's port ({type(error).__name__})")
    end = str(certificate["notAfter"]) if certificate else ""
    return Shown(node, port, dt.datetime.fromtimestamp(ssl.cert_time_to_seconds(end), dt.UTC), "")


def nodes_of(directory: Path) -> list[NodeConfig]:
    """The nodes of this host, by name, from the files that the units start them with (berth.ray.launch)."""
    files = [path for path in (directory / "head.json", directory / "slot.json") if path.exists()]
    found = [
        load(NodeConfig, node, f"{path}: {name}")
        for path in files
        for name, node in json.loads(path.read_text(encoding="utf-8")).items()
    ]
    return sorted(found, key=lambda node: node.name)
