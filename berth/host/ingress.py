"""The ingress: what nginx is told about keys, limits, proxies and errors, computed before a host is touched.

nginx has no hash that is fit for keys, so it compares the keys themselves; no message of this module holds one.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from berth.codec import STRICT, load
from berth.errors import BerthError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
KEY = re.compile(r"[a-z0-9_-]{32,128}")
"""Lower case only: nginx's map, which looks keys up, does not tell the cases apart."""
MOST_CONNECTIONS = 65535
"""nginx's own limit of limit_conn."""
ANY_ADDRESS = ("0.0.0.0", "::", "")
"""A proxy that listens here is reached by its host's address."""
PATH = re.compile(r"/[A-Za-z0-9._~/-]*")


@dataclass(frozen=True)
class Limits:
    """What one key may do; beyond it the answer is 429."""

    requests_per_minute: int
    burst: int
    connections: int


@dataclass(frozen=True)
class Key:
    """An entry of ``ingress_keys``; what is None follows the role's options, a key of "" is made by Berth."""

    __pydantic_config__ = STRICT

    name: str
    key: str = ""
    requests_per_minute: int | None = None
    burst: int | None = None
    connections: int | None = None

    def limits(self, default: Limits) -> Limits:
        return Limits(
            default.requests_per_minute if self.requests_per_minute is None else self.requests_per_minute,
            default.burst if self.burst is None else self.burst,
            default.connections if self.connections is None else self.connections,
        )


@dataclass(frozen=True)
class LimitClass:
    """Keys with the same limits: they share the definition, each has its own count."""

    number: int
    requests_per_minute: int
    burst: int
    connections: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Upstream:
    """A host whose Serve proxies answer; ``backup`` is asked when no other does."""

    host: str
    address: str
    backup: bool


def read_keys(entries: Iterable[Mapping[str, Any]]) -> tuple[Key, ...]:
    """``ingress_keys``, by name.

    Raises:
        BerthError: there is none, or a name or key cannot be used, or is there twice. It never shows a key.
    """
    keys = [_key(entry) for entry in entries]
    if not keys:
        raise BerthError(
            "an ingress without keys would let nobody in", found="ingress_keys: []", mend="ingress_keys: [{name: me}]"
        )
    for name, times in sorted(Counter(key.name for key in keys).items()):
        if times > 1:
            raise BerthError("ingress_keys has a name twice", found=name, mend="a name of its own for each key")
    _distinct({key.name: key.key for key in keys})
    return tuple(sorted(keys, key=lambda key: key.name))


def _key(entry: Mapping[str, Any]) -> Key:
    # The key's text stays out of the parser, whose messages show what they found.
    shown = {name: value for name, value in entry.items() if name != "key"}
    text = entry.get("key", "")
    key = Key(**{**vars(load(Key, shown, "ingress_keys")), "key": "" if text is None else str(text)})
    if not NAME.fullmatch(key.name):
        raise BerthError(
            "a key's name stands in the log and in nginx's configuration",
            found=key.name,
            allowed="lower-case letters, digits, _ and -, 63 at most",
            mend="rename it in ingress_keys",
        )
    if key.key:
        _check_text(key.name, key.key)
    return key


def _check_text(name: str, text: str) -> None:
    if not KEY.fullmatch(text):
        raise BerthError(
            f"the key of {name} cannot be used",
            found=f"{len(text)} characters (not shown)",
            allowed="32 to 128 of lower-case letters, digits, _ and -",
            mend="openssl rand -hex 32; or leave `key` out, and Berth makes one",
        )


def _distinct(texts: Mapping[str, str]) -> None:
    names: dict[str, list[str]] = {}
    for name, text in sorted(texts.items()):
        names.setdefault(text, []).append(name)
    for text, shared in names.items():
        if text and len(shared) > 1:
            raise BerthError("several names have the same key", found=", ".join(shared), mend="a key for each")


def limit_classes(keys: Iterable[Key], default: Limits) -> tuple[LimitClass, ...]:
    """The keys grouped by their limits, the least first.

    Raises:
        BerthError: a limit is none that nginx can keep.
    """
    groups: dict[tuple[int, int, int], list[str]] = {}
    for key in keys:
        found = key.limits(default)
        _check_limits(key.name, found)
        groups.setdefault((found.requests_per_minute, found.burst, found.connections), []).append(key.name)
    return tuple(
        LimitClass(number, *limits, tuple(sorted(names)))
        for number, (limits, names) in enumerate(sorted(groups.items()), 1)
    )


def _check_limits(name: str, limits: Limits) -> None:
    for field, most in (("requests_per_minute", 10**6), ("burst", 10**6), ("connections", MOST_CONNECTIONS)):
        value = getattr(limits, field)
        if not 1 <= value <= most:
            raise BerthError(
                f"{field} of the key {name} is no limit that can be kept",
                found=value,
                allowed=f"1 to {most}",
                mend=f"correct it in ingress_keys, or ingress_{field}",
            )


def missing(keys: Iterable[Key], directory: Path) -> list[str]:
    """Names whose key is to be made, and is not in ``directory`` yet (a file each)."""
    return [key.name for key in keys if not key.key and not (directory / key.name).is_file()]


def lost(names: Iterable[str], text: str) -> list[str]:
    """Of ``names``, those that ``text`` (a host's keys.conf) lets in: clients have these keys."""
    return [name for name in names if f'" "{name}";' in text]


def key_table(keys: Iterable[Key], directory: Path) -> dict[str, str]:
    """The key of every name: its own, or what was made for it in ``directory``. One not made yet is left out.

    Raises:
        BerthError: a key cannot be used, or is two names'.
    """
    keys = list(keys)
    absent = missing(keys, directory)
    known = [key for key in keys if key.name not in absent]
    table = {key.name: key.key or (directory / key.name).read_text(encoding="utf-8").strip() for key in known}
    for name, text in table.items():
        _check_text(name, text)
    _distinct(table)
    return table


# --- Proxies ----------------------------------------------------------------------------------------------------------


def upstreams(
    me: str, heads: Sequence[str], slots: Sequence[str], variables: Mapping[str, Mapping[str, Any]], http_host: str
) -> tuple[Upstream, ...]:
    """The hosts whose proxies the ingress ``me`` asks, by name; ``variables`` is hostvars.

    The head is a backup, unless it has slots: its proxy goes down with it, and what it was doing at that moment is
    lost; the proxies of the GPU hosts do not need it.

    Raises:
        BerthError: the proxies listen where this host cannot reach them.
    """
    hosts = sorted({*heads, *slots})
    if _loopback(http_host):
        others = [host for host in hosts if host != me]
        if others:
            raise BerthError(
                "Serve's proxies listen on loopback, where no other host reaches them",
                found=f"serve_apps_http_host: {http_host}; the ingress {me} must reach {', '.join(others)}",
                mend="serve_apps_http_host: 0.0.0.0, with firewall_enabled, which lets the ingress in and nobody else",
            )
        return tuple(Upstream(host, _bracketed(http_host), backup=False) for host in hosts)
    return tuple(Upstream(host, _address(host, host in slots, variables[host]), host not in slots) for host in hosts)


def _address(host: str, slot: bool, variables: Mapping[str, Any]) -> str:
    own = variables.get("ray_slot_node_ip" if slot else "ray_head_node_ip")
    return _bracketed(str(own or variables.get("ansible_host") or host))


def _bracketed(address: str) -> str:
    try:
        return f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    except ValueError:
        return address


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def long_paths(paths: Iterable[str]) -> list[str]:
    """The paths that may take long, each once.

    Raises:
        BerthError: one is no path.
    """
    found = sorted(set(map(str, paths)))
    for path in found:
        if not PATH.fullmatch(path) or path == "/" or path.startswith("/-/"):
            raise BerthError(
                "ingress_long_paths names what is no path of the API",
                found=path,
                allowed="the beginning of a path, as /v1/jobs/",
                mend="correct it",
            )
    return found


# --- Errors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What nginx itself answers: the status that the client gets, nginx's own numbers for it, and the body."""

    status: int
    numbers: tuple[int, ...]
    body: str


_INVALID, _SERVER = "invalid_request_error", "server_error"
_ANSWERS: tuple[tuple[int, tuple[int, ...], str, str, str], ...] = (
    # 494: a header too large; 497: HTTP to the port of HTTPS.
    (400, (400, 494, 497), _INVALID, "bad_request", "The request could not be read (or: http:// instead of https://)."),
    (401, (401,), _INVALID, "invalid_api_key", "No valid key: send it as `Authorization: Bearer KEY`."),
    (403, (403,), _INVALID, "forbidden", "This is not allowed."),
    (404, (404,), _INVALID, "not_found", "There is nothing at this address."),
    (405, (405,), _INVALID, "method_not_allowed", "This method is not allowed here."),
    (413, (413,), _INVALID, "request_too_large", "The body is larger than {max_body_mib} MiB."),
    (414, (414,), _INVALID, "address_too_long", "The address is too long."),
    (429, (429,), "rate_limit_error", "rate_limit_exceeded", "Too many requests with this key."),
    (500, (500,), _SERVER, "internal_error", "The ingress failed."),
    (502, (502,), _SERVER, "bad_gateway", "The server broke off; what it did with the request is not known."),
    (503, (503,), _SERVER, "overloaded", "No server can take the request now; it was not begun."),
    (504, (504,), _SERVER, "timeout", "The server did not answer in time."),
)


def answers(max_body_mib: int) -> tuple[Answer, ...]:
    """Every answer that nginx makes without a server, in the shape of OpenAI's errors."""
    return tuple(
        Answer(status, numbers, _body(kind, code, message.format(max_body_mib=max_body_mib)))
        for status, numbers, kind, code, message in _ANSWERS
    )


def _body(kind: str, code: str, message: str) -> str:
    # nginx puts it between apostrophes, and takes a dollar for a variable.
    text = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    assert not set("'$\\") & set(text)
    return text
