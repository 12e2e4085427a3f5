"""One nftables table: what a file of rules makes of it, and what is in force, both as nft lists them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from berth.errors import BerthError

NFT = "/usr/sbin/nft"


@dataclass(frozen=True)
class Tables:
    """Listings by nft without counters' values; "" for a table that is not there. ``wanted`` is None where the kernel
    lets nobody make a network namespace to try the file in."""

    found: str
    wanted: str | None

    @property
    def differ(self) -> bool:
        return self.wanted is None or self.found != self.wanted


def compare(path: Path, table: str, nft: str = NFT) -> Tables:
    """The table ``inet <table>`` in force, and the one that the file ``path`` makes in an empty network namespace.

    Raises:
        BerthError: there is no nft, or it refuses the file.
    """
    listing = [nft, "--stateless", "list", "table", "inet", table]
    found = _run(listing)
    if not path.exists():
        return Tables(found.stdout if found.returncode == 0 else "", "")
    script = f'"{nft}" -f "$1" && shift && exec "$@"'
    wanted = _run(["unshare", "--net", "sh", "-c", script, "sh", str(path), *listing])
    if wanted.returncode and "unshare" in wanted.stderr:
        return Tables(found.stdout if found.returncode == 0 else "", None)
    if wanted.returncode:
        raise BerthError(f"nft refuses {path}", found=wanted.stderr.strip()[:500], mend="ansible-playbook site.yml")
    return Tables(found.stdout if found.returncode == 0 else "", wanted.stdout)


def load(path: Path, nft: str = NFT) -> None:
    """Put the file in force, in one transaction.

    Raises:
        BerthError: nft refuses it; nothing has changed then.
    """
    done = _run([nft, "-f", str(path)])
    if done.returncode:
        raise BerthError(f"nft does not load {path}; what was in force still is", found=done.stderr.strip()[:500])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        raise BerthError(
            f"{command[0]} is not installed", mend="install the packages nftables and util-linux"
        ) from None
