"""GPU products: one meaning per name."""

from __future__ import annotations

import pytest

from berth.errors import BerthError
from berth.footprint.products import PRODUCTS, product


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("L40S", "NVIDIA L40S"),
        ("nvidia l40s", "NVIDIA L40S"),
        ("NVIDIA L40S (48GB)", "NVIDIA L40S"),
        ("H100", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB"),
        ("A100 40GB", "NVIDIA A100-SXM4-40GB"),
        ("A100", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB PCIe"),
        ("T4", "Tesla T4"),
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-16GB"),
        ("GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4080 16 GiB (WSL2)", "NVIDIA GeForce RTX 4080"),
        ("DGX Spark", "NVIDIA GB10"),
        ("8x H200", "NVIDIA H200"),
    ],
)
def test_names_people_use(name: str, found: str) -> None:
    assert product(name).name == found


def test_every_name_and_alias_leads_to_its_own_product() -> None:
    names = [(name, item) for item in PRODUCTS for name in (item.name, *item.aliases)]
    assert [(name, product(name).name) for name, _ in names] == [(name, item.name) for name, item in names]


@pytest.mark.parametrize("name", ["", "L9", "H1000", "A100 20GB", "GPU"])
def test_an_unknown_product_lists_the_known(name: str) -> None:
    with pytest.raises(BerthError, match="NVIDIA L40S"):
        product(name)


def test_totals_are_below_the_label() -> None:
    assert product("H100").total_mib < 80 * 1024
    assert product("L40S").total_mib < 48 * 1024
    assert all(item.total_mib > 8000 for item in PRODUCTS)
