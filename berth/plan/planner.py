"""Slots and deployments -> plan. A pure function: the same input gives the same plan. All memory is in MiB.

Objectives are lexicographic: a later one is looked at only among plans that are equal in all before it. There are no
weights. In their order (docs/decisions/0013-planner-objectives.md has the why):

1. replicas left out, the highest priority first; then room promised and not found;
2. with a previous plan of the same strategy, standing replicas moved (with ``repack`` after the strategy's own);
3. what the strategies of the deployments ask for:

   spread, strict_spread
       the sum over deployments of zones touched, then racks, hosts, GPUs, as large as can be. Ties: level the share.
       strict_spread never puts two replicas into one domain of ``spread_over`` (GPU): the rest is left out.
   balanced
       the largest sum of ``load`` on any GPU. Ties, by local search: the second largest, and so on.
   pack, strict_pack
       cost of the GPUs opened, then GPUs, then hosts. Ties: MiB opened, slots that stood. With every cost 1 that is
       fewest GPUs. strict_pack puts all replicas of a deployment on one host or leaves all of them out.

Hard rules hold in every plan: never more than ``free_mib``, footprint of the product, products, compute capability,
NVLink, pins, cordons, affinity, anti-affinity, teams on one host, room that is reserved. Replicas over several slots
are planned part by part and put together afterwards (berth/plan/teams.py).

How (``berth/plan/solver``): what stands is kept; several greedy plans are made; packed deployments without rules of
their own are packed anew by column generation over patterns, whose prices prove the lower bound; fleets of at most
``Options.exact_gpus`` GPUs are then searched exactly (SCIP over patterns, CP-SAT over the whole plan), which proves
``Summary.optimal``. ``Summary.gap`` is of cost for pack, of domains not touched for spread, of the largest load for
balanced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from berth.errors import BerthError
from berth.plan.solver.limits import least_max_load, touchable
from berth.plan.solver.measure import changes, family_homes, load, share, spread_jobs
from berth.plan.solver.problem import MAX_REPLICAS_PER_SLOT as MAX_REPLICAS_PER_SLOT
from berth.plan.solver.problem import MICRO, Problem, build_problem
from berth.plan.solver.room import ways_in
from berth.plan.solver.search import Effort, Found, find
from berth.plan.solver.standing import Standing, keep
from berth.plan.solver.state import State, domains_of, open_slots
from berth.plan.solver.words import to_plan
from berth.plan.teams import solve_teams
from berth.plan.types import STRATEGIES, Deployment, Plan, Slot, Solution, StrategyName, Summary


@dataclass(frozen=True)
class Options:
    """How to plan.

    ``max_moves`` bounds the standing replicas that are moved, or left out for a higher priority, though they could stay
    (None: as many as it takes; those whose GPU is gone or too full must move and do not count). ``repack`` puts the
    strategy's objective before standing still. ``regroup`` joins empty 1-GPU slots of one host and product for replicas
    of several GPUs (the fused slot is called ``host-0+1``). Fleets of at most ``exact_gpus`` GPUs are searched exactly
    (0: none), each objective for ``effort`` units of the solver's own deterministic time (about a second each): the
    same on every machine.
    """

    max_moves: int | None = None
    repack: bool = False
    regroup: bool = False
    exact_gpus: int = 64
    effort: float = 2.5


def make_plan(
    slots: Sequence[Slot],
    deployments: Sequence[Deployment],
    strategy: str,
    previous: Plan | None = None,
    retired: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of ``solve`` without its summary."""
    return solve(slots, deployments, strategy, previous, retired).plan


def solve(
    slots: Sequence[Slot],
    deployments: Sequence[Deployment],
    strategy: str,
    previous: Plan | None = None,
    retired: Mapping[str, str] | None = None,
    *,
    options: Options | None = None,
) -> Solution:
    """The plan for ``deployments`` on ``slots``, and how good it is.

    Nothing new is promised beyond ``slot.free_mib``. What the previous plan placed under the same strategy stays while
    it fits; with an unchanged footprint it may stay on a GPU that a stranger has entered since, as long as Berth's
    promises fit ``vram_mib`` and both together fit the card's total.

    Raises:
        BerthError: for an unknown strategy, two slots or deployments of one name, or a number that means nothing.
    """
    options = options or Options()
    if any(item.slots_per_replica > 1 for item in deployments):
        return solve_teams(
            slots,
            deployments,
            previous,
            lambda parts, before: solve(slots, parts, strategy, before, retired, options=options),
        )
    problem = build_problem(slots, deployments, check_strategy(strategy), previous, options.regroup)
    found, standing = _find(problem, options)
    bounded = problem.before is not None and options.max_moves is not None
    plan = to_plan(found.state, dict(retired or {}), standing.evicted, ways_in(found.state) if bounded else {})
    return Solution(plan, _summary(found))


def _find(problem: Problem, options: Options) -> tuple[Found, Standing]:
    """Plan on from what stands; (``repack``) anew; and where that moves too many, as far as ``max_moves`` goes."""
    effort, most = Effort(options.exact_gpus, options.effort), options.max_moves
    standing = keep(problem)
    held = standing if problem.before is None or most is None else keep(problem, hold=True)
    flips = sum(held.state.placed) > sum(standing.state.placed)
    if problem.before is None or not (options.repack or flips):
        return find(standing.state, effort, most, repack=False), standing
    anew = find(State(problem) if options.repack else standing.state, effort, None, repack=False)
    if most is None or changes(anew.state).moved <= most:
        return anew, standing
    return find(held.state, effort, most, repack=True), held


def _summary(found: Found) -> Summary:
    state = found.state
    problem, used = state.problem, open_slots(state)
    gpus, cost = sum(problem.gpus[slot] for slot in used), sum(problem.costs[slot] for slot in used)
    changed = changes(state)
    return Summary(
        gpus_used=gpus,
        hosts_used=len(state.opened),
        lower_bound_gpus=min(found.gpus, gpus),
        gap=_gap(found, cost),
        moves=changed.moved,
        replaced=changed.replaced,
        max_gpu_load=round(max((share(state, slot) for slot in used), default=0.0), 6),
        cost=cost / MICRO,
        lower_bound_cost=min(found.cost, cost) / MICRO,
        optimal=found.optimal,
        method=found.method,
    )


def _gap(found: Found, cost: int) -> float:
    """(used - bound) / bound of what the cluster's strategy minimises: cost; domains not touched; the largest load."""
    state = found.state
    if not open_slots(state):
        return 0.0
    if state.problem.strategy in ("pack", "strict_pack"):
        return round(max(0.0, cost / found.cost - 1), 6) if found.cost else 1.0
    if state.problem.strategy == "balanced":
        least = least_max_load(state)
        most = max(load(state, slot) for slot in open_slots(state))
        return round(max(0.0, most / least - 1), 6) if least else 0.0
    most, reached = 0, 0
    for job in spread_jobs(state.problem):
        placed = {job.family: len(family_homes(state, job))}
        most += sum(touchable(state.problem, placed, job.family))
        reached += sum(domains_of(state.problem, family_homes(state, job), job.widest))
    return round(max(0, most - reached) / most, 6) if most else 0.0


def check_strategy(strategy: str) -> StrategyName:
    """``strategy`` as one of those there are.

    Raises:
        BerthError: naming the allowed ones.
    """
    for name in STRATEGIES:
        if name == strategy:
            return name
    raise BerthError(
        "strategy is unknown", found=repr(strategy), allowed=", ".join(STRATEGIES), mend="set strategy to one of these"
    )
