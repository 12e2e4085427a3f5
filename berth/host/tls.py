"""The cluster's own certificate authority and the certificate of each host, made on the controller.

Files below one directory: ``ca.crt``, ``ca.key``, and ``<host>.crt``, ``<host>.key`` of every host. Ray takes one
certificate per process for both ends of a connection and demands that its peers' is signed by the same authority.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from berth.codec import write_text
from berth.errors import BerthError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""In every certificate: Ray's processes of one host also reach each other there."""
CLOCK_SKEW = dt.timedelta(hours=1)
"""A certificate is good from this long before it was made: hosts' clocks differ."""
AUTHORITY = "ca"
"""The authority's name in findings, and the stem of its two files."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    certificate: str
    key: str


@dataclass(frozen=True)
class Terms:
    """How long certificates hold. A host's is made anew when less than ``renew_before`` of it is left."""

    authority: dt.timedelta
    host: dt.timedelta
    renew_before: dt.timedelta

    def __post_init__(self) -> None:
        if not dt.timedelta(0) < self.renew_before < self.host < self.authority:
            raise BerthError(
                "certificates must be renewed before they end, and end before their authority",
                found=f"renewed {self.renew_before.days}, host {self.host.days}, authority {self.authority.days} days",
                allowed="0 < ray_head_tls_renew_days < ray_head_tls_days < ray_head_tls_authority_days",
            )


@dataclass(frozen=True)
class Change:
    """A pair that is made, and why it had to be."""

    name: str
    reason: str
    pair: Pair


def new_authority(cluster: str, now: dt.datetime, lifetime: dt.timedelta) -> Pair:
    """A self-signed authority of ``cluster``; it signs hosts' certificates and no other authority's."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The number keeps two authorities of one cluster apart: a chain is found by the issuer's name.
    serial = x509.random_serial_number()
    name = _name(f"Berth {cluster}", f"{serial:x}"[:16])
    built = (
        _builder(name, name, key.public_key(), now, lifetime, serial)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pair(built, key)


def issue(authority: Pair, host: str, addresses: Iterable[str], now: dt.datetime, lifetime: dt.timedelta) -> Pair:
    """A certificate of ``host``, good for ``addresses`` (IP addresses or names), as server and as client."""
    parent, parent_key = _load(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    built = (
        _builder(_name(host), parent.subject, key.public_key(), now, lifetime, x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(_alternatives(addresses)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(parent_key.public_key()),
            critical=False,
        )
        .sign(parent_key, hashes.SHA256())
    )
    return _pair(built, key)


def reason_to_renew(
    pair: Pair | None, authority: Pair, addresses: Iterable[str], now: dt.datetime, renew_before: dt.timedelta
) -> str:
    """Why a host's certificate must be made anew; "" when it is good."""
    if pair is None:
        return "there is none"
    try:
        found, key = _load(pair)
    except ValueError:
        return "it cannot be read"
    parent, _ = _load(authority)
    if key.public_key() != found.public_key():
        return "the key is another certificate's"
    try:
        found.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature):
        return "another authority signed it"
    lacking = sorted(set(map(_canonical, [*LOOPBACK, *addresses])) - _names(found))
    if lacking:
        return f"it is not good for {', '.join(lacking)}"
    if now >= found.not_valid_after_utc:
        return f"it ended on {found.not_valid_after_utc:%Y-%m-%d}"
    if now >= found.not_valid_after_utc - renew_before:
        return f"it ends on {found.not_valid_after_utc:%Y-%m-%d}"
    return ""


def plan(
    directory: Path,
    cluster: str,
    hosts: Mapping[str, Sequence[str]],
    terms: Terms,
    now: dt.datetime,
    renew: Iterable[str] = (),
) -> list[Change]:
    """What must be made for ``hosts`` (name -> addresses) to have good certificates; writes nothing.

    ``renew`` names hosts whose certificate is made anew although it is good, or AUTHORITY, which takes all hosts
    along: what the old one signed is not believed by who knows the new one alone.

    Raises:
        BerthError: the authority is unreadable, half lost or ends too soon to sign. It is never replaced unasked:
            hosts that run would refuse each other.
    """
    wanted = set(renew)
    changes: list[Change] = []
    authority = None if AUTHORITY in wanted else _authority(directory, hosts)
    if authority is not None:
        _check_authority(directory, authority, terms, now)
    else:
        reason = "asked for" if AUTHORITY in wanted else "there is none"
        authority = new_authority(cluster, now, terms.authority)
        changes.append(Change(AUTHORITY, reason, authority))
    for host, addresses in sorted(hosts.items()):
        reason = reason_to_renew(read(directory, host), authority, addresses, now, terms.renew_before)
        if not reason and host in wanted:
            reason = "asked for"
        if reason:
            changes.append(Change(host, reason, issue(authority, host, addresses, now, terms.host)))
    return changes


def write(directory: Path, changes: Iterable[Change]) -> None:
    """Write ``changes``; each file at once, the key before its certificate, keys for their owner alone."""
    for change in changes:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(directory / f"{change.name}.key", change.pair.key, 0o600)
        write_text(directory / f"{change.name}.crt", change.pair.certificate, 0o644)


def read(directory: Path, name: str) -> Pair | None:
    """The pair of ``name`` (a host, or AUTHORITY); None when either file is not there."""
    try:
        return Pair(
            (directory / f"{name}.crt").read_text(encoding="utf-8"),
            (directory / f"{name}.key").read_text(encoding="utf-8"),
        )
    except FileNotFoundError:
        return None


def end(certificate: str) -> dt.datetime:
    """When a certificate (PEM) ends, in UTC."""
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc


def ends(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The day (ISO) on which each certificate of ``names`` that is there ends."""
    found = {name: read(directory, name) for name in names}
    return {name: f"{end(pair.certificate):%Y-%m-%d}" for name, pair in found.items() if pair and _readable(pair)}


def _readable(pair: Pair) -> bool:
    try:
        _load(pair)
    except ValueError:
        return False
    return True


def _authority(directory: Path, hosts: Mapping[str, Sequence[str]]) -> Pair | None:
    found = read(directory, AUTHORITY)
    left = [f"{name}.crt" for name in (AUTHORITY, *sorted(hosts)) if (directory / f"{name}.crt").exists()]
    if found is None and left:
        raise BerthError(
            f"the certificate authority in {directory} is lost in part; nothing new can be signed by it",
            found=f"{', '.join(left)} without ca.crt and ca.key together",
            mend="bring both files back from your backup, or start anew, which restarts every node: "
            "ansible-playbook playbooks/rotate_secrets.yml -e rotate=authority",
        )
    return found


def _check_authority(directory: Path, authority: Pair, terms: Terms, now: dt.datetime) -> None:
    mend = "ansible-playbook playbooks/rotate_secrets.yml -e rotate=authority (it restarts every node)"
    try:
        found, key = _load(authority)
    except ValueError as error:
        raise BerthError(f"{directory / 'ca.crt'} or its key cannot be read: {error}", mend=mend) from None
    if key.public_key() != found.public_key():
        raise BerthError(f"{directory / 'ca.key'} is not the key of {directory / 'ca.crt'}", mend=mend)
    if found.not_valid_after_utc - terms.host <= now:
        raise BerthError(
            f"the certificate authority {directory / 'ca.crt'} ends before a certificate it would sign now",
            found=f"it ends on {found.not_valid_after_utc:%Y-%m-%d}",
            allowed=f"at least {terms.host.days} days from now (ray_head_tls_days)",
            mend=mend,
        )


def _load(pair: Pair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Raises ValueError: not a certificate, or not a key of the kind that is made here."""
    certificate = x509.load_pem_x509_certificate(pair.certificate.encode())
    key = serialization.load_pem_private_key(pair.key.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"the key is a {type(key).__name__}, not an elliptic curve's")
    return certificate, key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: dt.datetime,
    lifetime: dt.timedelta,
    serial: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _name(common: str, unit: str = "") -> x509.Name:
    # RFC 5280: a common name has at most 64 characters.
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common[:64])]
    return x509.Name([*parts, x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)] if unit else parts)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(addresses: Iterable[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for address in dict.fromkeys(map(_canonical, [*LOOPBACK, *addresses])):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            found.append(x509.DNSName(address))
    return found


def _canonical(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        return address.lower()


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {*map(str, names.get_values_for_type(x509.IPAddress)), *names.get_values_for_type(x509.DNSName)}


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM).decode(),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
    )
