"""The one exception people see: what is wrong, what was found, what is allowed, how to mend it."""

from __future__ import annotations


class BerthError(Exception):
    """A problem a person can act on.

    Args:
        what: the object and what is wrong with it, one sentence.
        found: the value that was found, if one value is to blame.
        allowed: the values that would be right.
        mend: the variable to set or the command to run.
    """

    def __init__(self, what: str, *, found: object = None, allowed: object = None, mend: str | None = None) -> None:
        self.what, self.found, self.allowed, self.mend = what, found, allowed, mend
        parts = [what]
        if found is not None:
            parts.append(f"found: {found}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if mend:
            parts.append(f"mend: {mend}")
        super().__init__("; ".join(parts))


class CouldNotTell(BerthError):
    """A witness could not be heard: neither right nor wrong is known (exit code 2)."""
