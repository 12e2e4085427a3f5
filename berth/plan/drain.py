"""Slots emptied for maintenance: what stands there is planned elsewhere, and nothing new goes there until undrained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from berth.codec import replace
from berth.errors import BerthError
from berth.plan.types import Plan, Slot

EVERYTHING = "all"


def drained_slots(slots: Sequence[Slot], before: Plan | None, drain: Iterable[str], undrain: Iterable[str]) -> set[str]:
    """Names of the slots that are drained now: those of the plan before, plus ``drain``, less ``undrain``.

    Both take names of slots and of hosts (all their slots); ``undrain`` takes ``all`` as well.

    Raises:
        BerthError: a name is neither a slot nor a host of the plan.
    """
    names = set(before.drained) if before else set()
    names |= _slots_of(slots, drain, "drain")
    undrain = tuple(undrain)
    if EVERYTHING in undrain:
        return _slots_of(slots, drain, "drain")
    return (names & {slot.name for slot in slots}) - _slots_of(slots, undrain, "undrain")


def _slots_of(slots: Sequence[Slot], asked: Iterable[str], verb: str) -> set[str]:
    found: set[str] = set()
    for name in asked:
        those = {slot.name for slot in slots if name in (slot.name, slot.host)}
        if not those:
            raise BerthError(
                f"there is no host or slot to {verb}",
                found=name,
                allowed=", ".join(sorted({slot.host for slot in slots} | {slot.name for slot in slots})),
                mend=f"-e placement_{verb}='[\"gpu01\"]' with a name of these",
            )
        found |= those
    return found


def cordon(slots: Sequence[Slot], drained: set[str]) -> tuple[Slot, ...]:
    """The slots, the drained ones cordoned."""
    return tuple(replace(slot, cordoned=True) if slot.name in drained else slot for slot in slots)


def plan_drained(
    slots: Sequence[Slot],
    before: Plan | None,
    drained: set[str],
    partly: bool,
    plan: Callable[[Sequence[Slot], Plan | None], Plan],
) -> Plan:
    """``plan(slots, before)`` with the ``drained`` slots empty.

    ``partly``: where not every replica finds another place, deployments that do not stay where they are, and the
    others move. Otherwise the plan has them as unplaced.
    """
    if not drained:
        return replace(plan(slots, before), drained=())
    closed = cordon(slots, drained)
    kept: set[str] = set()
    while True:
        made = plan(closed, _released(before, drained, kept))
        short = {item.deployment for item in made.unplaced} & _standing(before, drained)
        if not partly or short <= kept:
            return replace(made, drained=tuple(sorted(drained)))
        kept |= short


def _standing(before: Plan | None, drained: set[str]) -> set[str]:
    return {berth.deployment for berth in before.berths if berth.slot in drained} if before else set()


def _released(before: Plan | None, drained: set[str], kept: set[str]) -> Plan | None:
    if before is None:
        return None
    stay = tuple(item for item in before.berths if item.slot not in drained or item.deployment in kept)
    return replace(before, berths=stay)
