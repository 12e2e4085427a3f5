"""Seeded fleets and app mixes: the same seed gives the same case. All memory is in MiB."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from berth.codec import replace
from berth.plan.types import Deployment, Slot

GIB = 1024
RESERVE_MIB = 512
"""Left unpromised on each GPU, as the planner's inventory does by default."""


@dataclass(frozen=True)
class Product:
    """A GPU product: what its driver shows in MiB, its compute capability, and a price relative to an L40S."""

    name: str
    total_mib: int
    compute_capability: str
    nvlink: bool
    cost: float


L40S = Product("NVIDIA L40S", 45_488, "8.9", False, 1.0)
A100 = Product("NVIDIA A100-SXM4-80GB", 81_154, "8.0", True, 1.7)
H100 = Product("NVIDIA H100 80GB HBM3", 81_079, "9.0", True, 2.9)
H200 = Product("NVIDIA H200", 143_771, "9.0", True, 4.1)
PRODUCTS = (L40S, A100, H100, H200)
"""Totals are what drivers show (`nvidia-smi`), below the figure on the label; prices are only there to differ."""

FLEET_WEIGHTS = (40, 25, 22, 13)


@dataclass(frozen=True)
class Size:
    """A class of models: how common it is, and the range of one replica's footprint per GPU in MiB."""

    weight: int
    low_mib: int
    high_mib: int


SIZES = (
    Size(26, 2 * GIB, 4 * GIB),  # embeddings
    Size(20, 3 * GIB, 7 * GIB),  # rerankers, small classifiers
    Size(26, 10 * GIB, 24 * GIB),  # 7-8B, quantized and not
    Size(13, 24 * GIB, 39 * GIB),  # 13-14B, 32B quantized
    Size(9, 39 * GIB, 60 * GIB),  # 32B FP8, 70B at 4 bits
    Size(6, 60 * GIB, 75 * GIB),  # 70B FP8
)


@dataclass(frozen=True)
class Case:
    """One input of the planner: slots of one GPU each, and what is wanted on them."""

    name: str
    slots: tuple[Slot, ...]
    deployments: tuple[Deployment, ...]

    @property
    def priced(self) -> bool:
        """Whether GPUs differ in cost, so that the cheapest set counts and not the smallest."""
        return len({slot.cost for slot in self.slots}) > 1

    @property
    def replicas(self) -> int:
        """How many replicas are wanted in all."""
        return sum(deployment.replicas for deployment in self.deployments)


def footprint_on(deployment: Deployment, slot: Slot) -> int | None:
    """MiB that a replica takes on each GPU of ``slot``, None where the deployment's own rules keep it away."""
    if deployment.products and slot.product not in deployment.products:
        return None
    if _version(slot.compute_capability) < _version(deployment.min_compute_capability):
        return None
    return deployment.vram_mib.get(slot.product, deployment.vram_mib.get("default"))


@functools.cache
def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")) if text else ()


# --- Fleets -----------------------------------------------------------------------------------------------------------


def make_fleet(
    rng: random.Random,
    gpus: int,
    products: Sequence[Product] = PRODUCTS,
    *,
    per_host: int = 8,
    strangers: float = 0.05,
    priced: bool = False,
) -> tuple[Slot, ...]:
    """``gpus`` one-GPU slots on hosts of ``per_host`` equal GPUs, 16 hosts in a rack, 16 racks in a zone.

    ``strangers`` is the share of GPUs that somebody else partly uses, ``priced`` gives each product its own cost.
    """
    weights = [FLEET_WEIGHTS[PRODUCTS.index(product)] for product in products]
    slots: list[Slot] = []
    for number in range(-(-gpus // per_host)):
        product = rng.choices(products, weights)[0]
        for index in range(min(per_host, gpus - len(slots))):
            foreign = 256 * rng.randint(4, 120) if rng.random() < strangers else 0
            slots.append(_slot(number, index, product, foreign, priced))
    return tuple(slots)


def _slot(number: int, index: int, product: Product, foreign_mib: int, priced: bool) -> Slot:
    host = f"host{number:04}"
    return Slot(
        name=f"{host}-{index}",
        host=host,
        gpu_uuids=(f"GPU-{number:04}-{index}",),
        gpu_indices=(index,),
        product=product.name,
        vram_mib=product.total_mib - RESERVE_MIB,
        total_mib=product.total_mib,
        foreign_mib=foreign_mib,
        rack=f"rack{number // 16 % 16}",
        zone=f"zone{number // 256}",
        compute_capability=product.compute_capability,
        nvlink_group="nvlink0" if product.nvlink else "",
        cost=product.cost if priced else 1.0,
    )


# --- App mixes --------------------------------------------------------------------------------------------------------


def large_case(gpus: int, seed: int = 1) -> Case:
    """A whole fleet's day: 2.5 replicas per GPU of one deployment per 20 GPUs, some restricted, some TP 2, 4 or 8.

    8,000 GPUs are 1,000 hosts with 20,000 replicas of 400 deployments.
    """
    rng = random.Random(f"large {gpus} {seed}")
    slots = make_fleet(rng, gpus)
    tensor_parallel = _tensor_parallel_mix(rng, gpus // 10)
    left = gpus * 5 // 2 - sum(item.replicas for item in tensor_parallel)
    count = max(12, gpus // 20 - len(tensor_parallel))
    # A few apps are large, but none is a third of a small fleet, and every size of model has its share of the apps:
    # so fleets of all sizes are about equally full.
    shares = [min(6.0, rng.paretovariate(1.3)) for _ in range(count)]
    every = [size for size in SIZES for _ in range(size.weight)]
    classes = [every[number * len(every) // count] for number in range(count)]
    single = tuple(
        _some_rules(rng, _model(rng, f"app{number:03}", replicas, [classes[number]]), 0.15)
        for number, replicas in enumerate(_split(left, shares))
    )
    return Case(f"large-{gpus}-{seed}", slots, single + tensor_parallel)


def _model(rng: random.Random, name: str, replicas: int, sizes: Sequence[Size] = SIZES) -> Deployment:
    size = rng.choices(sizes, [item.weight for item in sizes])[0]
    return Deployment(name, replicas, {"default": rng.randint(size.low_mib, size.high_mib)})


def _some_rules(rng: random.Random, model: Deployment, share: float) -> Deployment:
    """``model``, with a probability of ``share`` restricted to some products or smaller on those that know FP8."""
    if rng.random() >= share:
        return model
    footprint = model.vram_mib["default"]
    rule = rng.randrange(3)
    if rule == 0:
        return replace(model, min_compute_capability="8.9")
    if rule == 1:
        fits = [product.name for product in PRODUCTS if product.total_mib - RESERVE_MIB >= footprint]
        return replace(model, products=tuple(sorted(rng.sample(fits, max(1, len(fits) - 1)))))
    fp8 = footprint * 6 // 10
    return replace(model, vram_mib={"default": footprint, H100.name: fp8, H200.name: fp8})


def _tensor_parallel_mix(rng: random.Random, gpus: int) -> tuple[Deployment, ...]:
    """Deployments of 2, 4 and 8 GPUs per replica that take at most ``gpus`` GPUs together."""
    found: list[Deployment] = []
    while gpus >= 2:
        width = rng.choice([size for size in (2, 2, 2, 4, 4, 8) if size <= gpus])
        replicas = rng.randint(1, max(1, min(gpus // width, 12)))
        footprint = rng.randint(30 * GIB, 74 * GIB)
        found.append(Deployment(f"tp{len(found):03}", replicas, {"default": footprint}, gpus_per_replica=width))
        gpus -= width * replicas
    return tuple(found)


def _split(total: int, shares: Sequence[float]) -> list[int]:
    """``total`` cut into whole parts of at least one, in proportion to ``shares``."""
    left = total - len(shares)
    whole = sum(shares)
    parts = [1 + int(left * share / whole) for share in shares]
    for index in range(total - sum(parts)):
        parts[index % len(parts)] += 1
    return parts


# --- Small cases ------------------------------------------------------------------------------------------------------

KINDS = (
    "one-product",
    "tight",
    "mixed-products",
    "restricted",
    "tensor-parallel",
    "priced",
    "strangers",
    "many-small",
    "overfull",
    "everything",
)


def small_cases(count: int = 100) -> tuple[Case, ...]:
    """``count`` cases of at most 64 GPUs, of every kind in turn."""
    return tuple(small_case(KINDS[number % len(KINDS)], number // len(KINDS)) for number in range(count))


def small_case(kind: str, seed: int) -> Case:
    """A case of 4 to 64 GPUs that is hard in the way ``kind`` names (one of KINDS)."""
    rng = random.Random(f"small {kind} {seed}")
    name = f"{kind}-{seed}"
    per_host = rng.choice((2, 4, 8))
    gpus = rng.choice((4, 8, 12, 16, 24, 32, 48, 64))
    if kind == "tight":
        return Case(name, *_tight(rng, gpus, per_host))
    mixed = kind not in ("one-product", "many-small")
    products = rng.sample(PRODUCTS, rng.randint(2, 4)) if mixed else [rng.choice(PRODUCTS)]
    slots = make_fleet(
        rng,
        gpus,
        sorted(products, key=lambda item: item.name),
        per_host=per_host,
        strangers=0.4 if kind in ("strangers", "everything") else 0.0,
        priced=kind in ("priced", "everything"),
    )
    parallel = _small_parallel(rng, slots, per_host) if kind in ("tensor-parallel", "everything") else ()
    rules = 0.5 if kind in ("restricted", "everything") else 0.0
    sizes = SIZES[:3] if kind == "many-small" else SIZES
    fill = rng.uniform(1.0, 1.3) if kind == "overfull" else rng.uniform(0.35, 0.75)
    return Case(name, slots, parallel + _fill(rng, slots, fill, sizes, rules))


def _small_parallel(rng: random.Random, slots: Sequence[Slot], per_host: int) -> tuple[Deployment, ...]:
    """A few deployments of several GPUs that the largest product of the fleet can hold."""
    largest = max(slot.free_mib for slot in slots)
    found: list[Deployment] = []
    budget = len(slots) // 3
    for number in range(rng.randint(1, 3)):
        width = rng.choice([size for size in (2, 4, 8) if size <= per_host])
        if width <= budget:
            footprint = rng.randint(largest // 4, largest * 9 // 10)
            found.append(Deployment(f"tp{number}", 1, {"default": footprint}, gpus_per_replica=width))
            budget -= width
    return tuple(found)


def _fill(
    rng: random.Random, slots: Sequence[Slot], fill: float, sizes: Sequence[Size], rules: float
) -> tuple[Deployment, ...]:
    """Deployments of one GPU per replica until ``fill`` of the fleet's memory is asked for."""
    left = int(sum(slot.free_mib for slot in slots) * fill)
    largest = max(slot.free_mib for slot in slots)
    found: list[Deployment] = []
    while left > 0 and len(found) < 40:
        model = _some_rules(rng, _model(rng, f"app{len(found):02}", rng.randint(1, 8), sizes), rules)
        footprint = model.vram_mib["default"]
        if footprint <= largest:
            found.append(model)
            left -= footprint * model.replicas
    return tuple(found)


def _tight(rng: random.Random, gpus: int, per_host: int) -> tuple[tuple[Slot, ...], tuple[Deployment, ...]]:
    """Every second GPU cut into pieces without a remainder: a perfect packing exists, on half of the fleet."""
    slots = make_fleet(rng, gpus, [rng.choice(PRODUCTS)], per_host=per_host, strangers=0.0)
    patterns = [_pieces(rng, slots[0].vram_mib) for _ in range(rng.randint(2, 4))]
    counts: dict[int, int] = {}
    for number in range(gpus // 2):
        for piece in patterns[number % len(patterns)]:
            counts[piece] = counts.get(piece, 0) + 1
    models = (Deployment(f"app{number:02}", counts[size], {"default": size}) for number, size in enumerate(counts))
    return slots, tuple(models)


def _pieces(rng: random.Random, whole: int) -> list[int]:
    """``whole`` cut into two to five pieces of at least 2 GiB."""
    cuts = sorted(rng.sample(range(2, whole // (2 * GIB) - 1), rng.randint(1, 4)))
    edges = [0, *(cut * 2 * GIB + rng.randint(0, GIB) for cut in cuts), whole]
    return [high - low for low, high in itertools.pairwise(edges)]
