"""The files of ``berth plan``: what is read is what was meant, what is wrong is named, what is written reads back."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.codec import replace
from berth.errors import BerthError
from berth.plan.contract import known_capability, load_deployments, load_gpus, same_product
from berth.plan.contract_answer import answer, as_previous, gpus_of, load_previous, number_replicas, to_json
from berth.plan.contract_files import read_data
from berth.plan.contract_schema import schemas
from berth.plan.planner import Options, solve
from berth.plan.simulate import load_fleet
from berth.plan.types import Affinity, Plan, Solution
from tests.unit.plan.helpers import L40S, grid, model

ROOT = Path(__file__).parents[3]
SCHEMAS = ROOT / "docs" / "schemas"
EXAMPLES = ROOT / "examples"


def gpu(**changes: Any) -> dict[str, Any]:
    return {"uuid": "GPU-a", "index": 0, "product": L40S, "memory_mib": 45_488, **changes}


def fleet(*gpus: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"hosts": [{"name": "gpu01", "gpus": list(gpus) or [gpu()], **changes}]}


def app(**changes: Any) -> dict[str, Any]:
    return {"name": "chat", "replicas": 1, "footprint_mib": 1000, **changes}


def read_one(**changes: Any) -> Any:
    return load_deployments({"deployments": [app(**changes)]}, load_gpus(fleet())).deployments[0]


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_a_gpu_with_everything():
    item = gpu(used_mib=512, nvlink_group=1, compute_capability=8.9, cordoned=True, cost=2.5)
    slot = load_gpus(fleet(item, domain={"rack": 7, "zone": "east"}), reserve_mib=488)[0]
    assert (slot.name, slot.host, slot.gpu_uuids, slot.gpu_indices) == ("gpu01-0", "gpu01", ("GPU-a",), (0,))
    assert (slot.vram_mib, slot.total_mib, slot.foreign_mib, slot.free_mib) == (45_000, 45_488, 512, 44_488)
    assert (slot.rack, slot.zone, slot.nvlink_group, slot.compute_capability) == ("7", "east", "1", "8.9")
    assert (slot.cordoned, slot.cost) == (True, 2.5)


@pytest.mark.parametrize(
    ("given", "told"), [(9, "9.0"), (8.9, "8.9"), ("8.9", "8.9"), (">= 10.0", "10.0"), (None, "8.9")]
)
def test_compute_capability_is_a_number_or_text_or_the_products(given: object, told: str):
    assert load_gpus(fleet(gpu(compute_capability=given)))[0].compute_capability == told


def test_the_capability_of_a_mig_instance_is_its_cards():
    assert known_capability("NVIDIA A100-SXM4-80GB MIG 2g.20gb") == "8.0"
    assert known_capability("a product of 2031") == ""


def test_mig_instances_share_an_index_and_have_names_of_their_own():
    twins = [gpu(uuid=f"MIG-{name}", product="NVIDIA A100-SXM4-80GB MIG 2g.20gb", memory_mib=19_968) for name in "ba"]
    slots = load_gpus(fleet(*twins))
    assert [(slot.name, slot.gpu_uuids[0]) for slot in slots] == [("gpu01-0.0", "MIG-a"), ("gpu01-0.1", "MIG-b")]


def test_a_deployment_with_everything():
    data = {
        "deployments": [
            app(
                replicas={"min": 0, "max": 3},
                footprint_mib={"L40S": 900.0, "default": 1000},
                gpus_per_replica=1,
                strategy="spread",
                require={"product": "l40s", "compute_capability": 8.9, "nvlink": False},
                spread_over="rack",
                pin="gpu01/0",
                priority=-3,
                affinity="embed",
                anti_affinity=[{"deployment": "embed", "domain": "gpu"}],
                headroom="shared",
                placement="pool",
                load=0.5,
                min_available=0,
            ),
            app(name="embed", footprint_mib=100.2),
        ]
    }
    chat, embed = load_deployments(data, load_gpus(fleet())).deployments
    assert (chat.replicas, chat.max_replicas, chat.strategy, chat.spread_over) == (0, 3, "spread", "rack")
    assert (chat.footprint_mib(L40S), chat.products, chat.pins) == (900, (L40S,), ("GPU-a",))
    assert (chat.affinity, chat.anti_affinity) == ((Affinity("embed"),), (Affinity("embed", "gpu"),))
    assert (chat.headroom, chat.placement, chat.priority, chat.load) == ("shared", "pool", -3, 0.5)
    assert (chat.min_compute_capability, chat.min_available) == ("8.9", 0)
    # Rounded up: a started MiB is nobody else's.
    assert embed.vram_mib == {"default": 101}


def test_product_names_with_and_without_the_maker():
    assert same_product("L40S", "NVIDIA L40S")
    assert same_product("some NPU", "Some NPU")
    assert not same_product("L40", "NVIDIA L40S")
    assert not same_product("A100 40GB", "NVIDIA A100-SXM4-80GB")


def test_what_is_not_here_stays_asked_for():
    assert read_one(require={"product": ["NVIDIA H200"]}).products == ("NVIDIA H200",)


def test_a_pin_may_name_a_gpu_that_is_gone_and_none_that_never_was():
    slots = load_gpus(fleet())
    data = {"deployments": [app(pin=["GPU-gone"])]}
    assert load_deployments(data, slots, gone={"GPU-gone"}).deployments[0].pins == ("GPU-gone",)
    with pytest.raises(
        BerthError, match=r"chat: pin names a GPU that is not there; found: GPU-gone; allowed: .*gpu01/0"
    ):
        load_deployments(data, slots)


# --- What is wrong is named -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"GPUs: not an object; found: a list; allowed: \{hosts: \[…\]\}"),
        ({}, "GPUs: hosts: "),
        ({"hosts": [{"gpus": []}]}, "host number 1: name: "),
        ({"hosts": [{"name": "a", "gpus": [], "rack": "r"}]}, "host a: rack: unknown key"),
        (fleet(gpu(memory_mib="48 GB")), r"GPU GPU-a of host gpu01: memory_mib: .*\(found '48 GB'\)"),
        (fleet(gpu(memory_mib=True)), "GPU GPU-a of host gpu01: memory_mib: .*number"),
        (fleet(gpu(memory_mib=0)), r"greater than or equal to 1 \(found 0\)"),
        (fleet(gpu(memory_gib=44)), "GPU GPU-a of host gpu01: memory_gib: unknown key"),
        (fleet({"uuid": "GPU-a", "index": 0, "product": L40S}), "GPU GPU-a of host gpu01: memory_mib: "),
        (
            fleet(gpu(used_mib=50_000)),
            "used_mib is more than the GPU has; found: 50000; allowed: 0 to memory_mib, 45488",
        ),
        (fleet(gpu(compute_capability="ada")), "GPU GPU-a of host gpu01: compute_capability: "),
        (fleet(gpu(cost=0)), "GPU GPU-a of host gpu01: cost: "),
        (fleet(gpu(cordoned="no")), "GPU GPU-a of host gpu01: cordoned: "),
        (fleet(gpu(), gpu(index=1)), "GPU GPU-a is listed twice, on gpu01 and gpu01"),
        (fleet(gpu(), gpu(uuid="GPU-b")), "host gpu01: two GPUs have the index 0; found: GPU-a, GPU-b"),
        ({"hosts": [{"name": "a", "gpus": []}] * 2}, "two hosts have the same name; found: a"),
    ],
)
def test_wrong_gpus(data: object, message: str):
    with pytest.raises(BerthError, match=message) as caught:
        load_gpus(data)
    assert caught.value.mend


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": -1}, "deployment chat: replicas"),
        ({"replicas": "2"}, "deployment chat: replicas"),
        ({"replicas": {"min": 2, "max": 1}}, "replicas.max is less than replicas.min; found: 1; allowed: >= 2"),
        ({"footprint_mib": 0}, "deployment chat: footprint_mib"),
        ({"footprint_mib": {}}, "footprint_mib names no GPU product"),
        ({"footprint_mib": {"L40S": -5}}, "deployment chat: footprint_mib"),
        ({"footprint_mib": None}, "neither footprint_mib nor model"),
        ({"model": {"config": {}}}, "found: footprint_mib and model"),
        ({"strategy": "binpack"}, "strategy is unknown; found: binpack; allowed: pack, spread"),
        ({"spread_over": "row"}, "deployment chat: spread_over"),
        ({"gpus_per_replica": 0}, "deployment chat: gpus_per_replica"),
        ({"require": {"compute_capability": "new"}}, "deployment chat: require.compute_capability"),
        ({"require": {"gpu": "L40S"}}, "deployment chat: require.gpu: unknown key"),
        ({"affinity": "nobody"}, "affinity names no deployment; found: nobody; allowed: chat"),
        ({"anti_affinity": "chat"}, "anti_affinity names itself"),
        ({"replica": 1}, "deployment chat: replica: unknown key"),
        ({"priority": 1.5}, "deployment chat: priority"),
        ({"load": float("nan")}, "deployment chat: load"),
    ],
)
def test_wrong_deployments(changes: dict[str, Any], message: str):
    with pytest.raises(BerthError, match=message):
        read_one(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "neither JSON nor YAML; found: Expecting property name"),
        ("a: [1", "neither JSON nor YAML"),
        ('{"hosts": [], "hosts": []}', "a key stands twice: hosts"),
        ("hosts: []\nhosts: []\n", "a key stands twice: hosts"),
        ("[" * 100_000, "nested too deep"),
        ("a: " + "[" * 100_000, "nested too deep"),
        ("- " * 100_000, "nested too deep"),
        ("a: !!python/object/apply:os.system [true]", "neither"),
    ],
)
def test_files_that_are_neither(tmp_path: Path, text: str, message: str):
    (tmp_path / "f").write_text(text)
    with pytest.raises(BerthError, match=message):
        read_data(tmp_path / "f", "--gpus")


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "f", "is not text"),
    ):
        with pytest.raises(BerthError, match=message):
            read_data(path, "--gpus")


def test_json_and_yaml_are_told_apart_by_content(tmp_path: Path):
    for text in (json.dumps(fleet()), yaml.safe_dump(fleet()), "\ufeff" + json.dumps(fleet())):
        (tmp_path / "f.txt").write_text(text, encoding="utf-8")
        assert read_data(tmp_path / "f.txt", "--gpus") == fleet()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*gpu(), *app(), "hosts", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(anything, st.sampled_from([*gpu()]), st.sampled_from([*app(), "require", "pin", "affinity", "model"]))
def test_whatever_stands_there_it_is_read_or_refused_in_words(value: object, gpu_key: str, app_key: str):
    slots = load_gpus(fleet())
    for read in (
        lambda: load_fleet(value),
        lambda: load_fleet(
            {"hosts": [{"name": "a", "count": 1, "gpus": 1, "product": "L40S", gpu_key: value}], "deployments": value}
        ),
        lambda: load_gpus(value),
        lambda: load_gpus({"hosts": value}),
        lambda: load_gpus(fleet(gpu(**{gpu_key: value}))),
        lambda: load_deployments(value, slots),
        lambda: load_deployments({"deployments": [app(**{app_key: value})]}, slots),
        lambda: load_previous(value, "previous"),
    ):
        # Any other exception is a traceback for whoever wrote the file.
        with contextlib.suppress(BerthError):
            read()


# --- Models -----------------------------------------------------------------------------------------------------------

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "model_type": "llama",
}
"""The shape of an 8B model: some 15 GiB of weights."""


def read_model(engine: dict[str, Any], *gpus: dict[str, Any], **changes: Any) -> Any:
    slots = load_gpus(fleet(*gpus))
    entry = {"name": "chat", "replicas": 1, "model": {"config": LLAMA, "engine": engine}, **changes}
    return load_deployments({"deployments": [entry]}, slots), slots


def test_a_model_is_predicted_for_each_product():
    t4 = gpu(uuid="GPU-b", index=1, product="Tesla T4", memory_mib=15_360)
    apps, slots = read_model({"max_model_len": 8192}, gpu(), t4)
    sizes = apps.deployments[0].vram_mib
    assert set(sizes) == {L40S}
    assert 15_300 < sizes[L40S] < 25_000
    assert any("not on Tesla T4" in note for note in apps.notes)
    assert solve(slots, apps.deployments, "pack").plan.berths[0].slot == "gpu01-0"


def test_a_model_too_large_for_all_is_unplaced_and_told_what_would_fit():
    apps, slots = read_model({"max_model_len": 131072, "concurrency": 4})
    assert "set max_model_len to" in apps.shortfalls["chat"]
    unplaced = solve(slots, apps.deployments, "pack").plan.unplaced
    assert unplaced[0].shortage_mib is not None
    assert unplaced[0].shortage_mib > 0


def test_the_engines_parallelism_is_the_gpus_of_a_replica():
    both = [gpu(), gpu(uuid="GPU-b", index=1)]
    one = read_model({"max_model_len": 4096}, *both)[0].deployments[0]
    two = read_model({"max_model_len": 4096, "tensor-parallel-size": 2}, *both)[0].deployments[0]
    same = read_model({"max_model_len": 4096}, *both, gpus_per_replica=2)[0].deployments[0]
    assert (one.gpus_per_replica, two.gpus_per_replica) == (1, 2)
    assert two == same
    assert two.vram_mib[L40S] < one.vram_mib[L40S]
    with pytest.raises(BerthError, match="gpus_per_replica is not what the engine spreads over; found: 4; allowed: 2"):
        read_model({"tensor_parallel_size": 2}, *both, gpus_per_replica=4)


def test_an_fp8_cache_keeps_away_from_gpus_without_fp8():
    engine = {"max_model_len": 4096, "kv_cache_dtype": "fp8"}
    a100 = gpu(uuid="GPU-b", index=1, product="NVIDIA A100-SXM4-80GB", memory_mib=81_154)
    apps, _ = read_model(engine, gpu(), a100)
    assert set(apps.deployments[0].vram_mib) == {L40S}
    only, slots = read_model(engine, a100)
    assert only.deployments[0].min_compute_capability == "8.9"
    assert solve(slots, only.deployments, "pack").plan.unplaced


def test_fp8_weights_run_weight_only_where_there_is_no_fp8():
    quantised = {**LLAMA, "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    for product, mib, fits in (("NVIDIA A100-SXM4-80GB", 81_154, True), ("Tesla V100-SXM2-32GB", 32_480, False)):
        slots = load_gpus(fleet(gpu(product=product, memory_mib=mib)))
        entry = {"name": "chat", "replicas": 1, "model": {"config": quantised, "engine": {"max_model_len": 4096}}}
        apps = load_deployments({"deployments": [entry]}, slots)
        assert bool(solve(slots, apps.deployments, "pack").plan.berths) is fits


def test_model_files_are_found_beside_the_apps_file(tmp_path: Path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "engine.yml").write_text("max_model_len: 4096\n")
    data = {"deployments": [{"name": "chat", "replicas": 1, "model": {"config": "m", "engine": "engine.yml"}}]}
    assert load_deployments(data, load_gpus(fleet()), tmp_path).deployments[0].vram_mib[L40S] > 15_000
    with pytest.raises(BerthError, match=r"deployment chat: model.config .*m cannot be read|model.config"):
        load_deployments(data, load_gpus(fleet()), tmp_path / "elsewhere")


# --- The answer and back ----------------------------------------------------------------------------------------------


def solved(replicas: int = 5, previous: Plan | None = None, hosts: int = 2) -> Solution:
    apps = [model("chat", replicas, 20_000), model("wide", 1, 30_000, gpus=2)]
    return solve(grid(hosts, 4), apps, "pack", previous, options=Options(regroup=True))


def test_one_entry_per_replica_and_the_schema_holds():
    data = json.loads(to_json(answer(solved(17))))
    jsonschema.validate(data, json.loads((SCHEMAS / "plan.schema.json").read_text()))
    assert data["ok"] is False
    placed = [(item["deployment"], item["replica"]) for item in data["assignments"]]
    assert placed == sorted(set(placed))
    every = placed + [(item["deployment"], item["replica"]) for item in data["unplaced"]]
    assert sorted(every) == [("chat", n) for n in range(17)] + [("wide", 0)]
    assert data["summary"]["placed"] + data["summary"]["unplaced"] == data["summary"]["replicas"] == 18


def test_promised_room_that_is_missing_is_unplaced_under_the_numbers_it_would_have():
    growing = replace(model("chat", 1, 30_000), max_replicas=3)
    data = answer(solve(grid(1, 2), [growing], "pack"))
    assert [(item["replica"], item.get("room")) for item in data["unplaced"]] == [(2, True)]
    assert [item["replicas"] for item in data["reservations"]] == [1]
    assert not data["ok"]


def test_an_answer_reads_back_as_the_plan_it_was_made_from():
    solution = solved()
    raw = load_previous(json.loads(to_json(answer(solution))), "previous")
    previous = as_previous(raw, grid(2, 4), [])
    assert set(previous.plan.berths) == set(solution.plan.berths)
    assert set(previous.plan.slots) == set(solution.plan.slots)
    assert previous.plan.strategies == solution.plan.strategies
    again = solved(previous=previous.plan)
    assert again.summary.moves == 0
    assert answer(again, previous.numbers)["assignments"] == answer(solution)["assignments"]


def test_a_plan_json_is_a_previous_plan_too(tmp_path: Path):
    from berth.plan.store import write_plan

    solution = solved()
    write_plan(tmp_path / "plan.json", solution.plan)
    raw = load_previous(read_data(tmp_path / "plan.json", "previous"), "previous")
    assert as_previous(raw, grid(2, 4), []).plan == solution.plan
    assert gpus_of(raw) == {uuid for slot in grid(2, 4) for uuid in slot.gpu_uuids}


def test_the_least_that_an_answer_may_say():
    data = {
        "version": 1,
        "strategy": "pack",
        "assignments": [
            {"deployment": "chat", "replica": 7, "host": "gpu00", "gpus": ["GPU-gpu00-1-0"], "later": True}
        ],
    }
    previous = as_previous(load_previous(data, "p"), grid(1, 2), [model("chat", 9, 20_000)])
    assert [(item.slot, item.vram_mib) for item in previous.plan.berths] == [("gpu00-1", 20_000)]
    plan = solve(grid(1, 2), [model("chat", 9, 20_000)], "pack", previous.plan).plan
    numbers, _ = number_replicas(plan, previous.numbers)
    assert 7 in numbers[[berth.slot for berth in plan.berths].index("gpu00-1")]


def test_a_gpu_is_known_by_its_uuid_whatever_it_is_called_now():
    before = json.loads(to_json(answer(solve(grid(1, 2), [model("chat", 1, 20_000)], "pack"))))
    uuid = before["assignments"][0]["gpus"][0]
    swapped = [
        replace(slot, name=f"gpu00-{1 - slot.gpu_indices[0]}", gpu_indices=(1 - slot.gpu_indices[0],))
        for slot in grid(1, 2)
    ]
    previous = as_previous(load_previous(before, "p"), swapped, [])
    after = answer(solve(swapped, [model("chat", 1, 20_000)], "pack", previous.plan), previous.numbers)
    assert after["assignments"][0]["gpus"] == [uuid]
    assert after["summary"]["moves"] == 0


def test_a_new_card_in_an_old_place_is_not_the_old_card():
    before = json.loads(to_json(answer(solve(grid(1, 1), [model("chat", 1, 20_000)], "pack"))))
    other = [replace(slot, gpu_uuids=("GPU-new",)) for slot in grid(1, 1)]
    previous = as_previous(load_previous(before, "p"), other, [])
    assert {slot.gpu_uuids[0] for slot in previous.plan.slots} == {"GPU-gpu00-0-0"}
    assert not {slot.name for slot in previous.plan.slots} & {"gpu00-0"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "previous is no plan"),
        ({"version": 9}, "unknown version; found: 9; allowed: 1"),
        ({"version": 1, "strategy": "pack"}, "assignments: "),
        ({"version": 1, "strategy": "pack", "assignments": [{"deployment": "a", "gpus": 3}]}, "assignments.0.gpus"),
    ],
)
def test_a_previous_plan_that_is_none(data: object, message: str):
    with pytest.raises(BerthError, match=message):
        load_previous(data, "previous")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.sets(st.integers(0, 3), max_size=3))
def test_who_stands_keeps_his_number(before: int, after: int, lost: set[int]):
    slots = grid(4, 1)
    one = solve(slots, [model("chat", before, 20_000)], "spread")
    old = answer(one)
    left = [slot for number, slot in enumerate(slots) if number not in lost]
    previous = as_previous(load_previous(json.loads(to_json(old)), "p"), left, [])
    new = answer(solve(left, [model("chat", after, 20_000)], "spread", previous.plan), previous.numbers)
    numbers = [item["replica"] for item in new["assignments"] + new["unplaced"]]
    assert sorted(numbers) == list(range(after))
    was = {item["replica"]: item["gpus"] for item in old["assignments"]}
    now = {item["replica"]: item["gpus"] for item in new["assignments"]}
    here = {uuid for slot in left for uuid in slot.gpu_uuids}
    if after == before:
        assert all(now[number] == gpus for number, gpus in was.items() if here.issuperset(gpus))


# --- Schemas and examples ---------------------------------------------------------------------------------------------


def test_published_schemas_are_those_of_the_code():
    for name, schema in schemas().items():
        published = json.loads((SCHEMAS / name).read_text())
        assert published == schema, f"python -m berth.plan.contract_schema docs/schemas ({name})"
        jsonschema.Draft202012Validator.check_schema(published)


def test_the_examples_hold_to_the_schemas_and_are_placed():
    gpus, apps = (yaml.safe_load((EXAMPLES / f"{name}.yml").read_text()) for name in ("gpus", "apps"))
    jsonschema.validate(gpus, json.loads((SCHEMAS / "gpus.schema.json").read_text()))
    jsonschema.validate(apps, json.loads((SCHEMAS / "apps.schema.json").read_text()))
    slots = load_gpus(gpus)
    assert not solve(
        slots, load_deployments(apps, slots).deployments, "pack", options=Options(regroup=True)
    ).plan.unplaced
