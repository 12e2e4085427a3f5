"""GPU products: the memory the driver shows, the compute capability, and the names people call them by."""

from __future__ import annotations

import re
from dataclasses import dataclass

from berth.errors import BerthError

GIB = 1 << 30

SIZE_TOLERANCE = 0.12
"""How far the size in a name may be from what the driver shows: labels round up, and ECC takes a part."""


@dataclass(frozen=True)
class Product:
    """One product. ``total_mib`` is what CUDA reports to a program with ECC on; ``compute_capability`` as in "9.0".

    ``unified`` memory is the host's too, so that what the host takes for itself shows as used.
    """

    name: str
    total_mib: int
    compute_capability: str
    aliases: tuple[str, ...] = ()
    unified: bool = False

    @property
    def generation(self) -> float:
        """The compute capability as a number: 8.9 is the first with FP8 kernels. 0 for a GPU that has none."""
        return float(self.compute_capability or 0)


# Totals: start-up logs of vLLM (tests/data/vllm_memory_cases.json: A100 80GB, H200, RTX 4080, GB10, RTX PRO 6000) or
# torch.cuda.mem_get_info as published; the least of several readings, since drivers differ by up to 0.5 GiB.
PRODUCTS = (
    Product("NVIDIA H200", 143062, "9.0", ("H200 SXM", "H200 141GB", "H200 NVL")),
    Product("NVIDIA H100 80GB HBM3", 81080, "9.0", ("H100", "H100 SXM", "H100 SXM5", "H100 80GB", "H100 SXM5 80GB")),
    Product("NVIDIA H100 PCIe", 81008, "9.0", ("H100 PCIe 80GB", "H800", "H800 PCIe")),
    Product("NVIDIA H100 NVL", 95320, "9.0", ("H100 NVL 94GB", "H100 94GB", "H100 96GB")),
    Product("NVIDIA GH200 480GB", 97280, "9.0", ("GH200", "GH200 96GB")),
    Product("NVIDIA GH200 144G HBM3e", 146000, "9.0", ("GH200 144GB",)),
    Product("NVIDIA H20", 97280, "9.0", ("H20 96GB", "H20 3e")),
    Product("NVIDIA B200", 182600, "10.0", ("B200 180GB", "B200 SXM", "GB200", "GB200 NVL")),
    Product("NVIDIA B300 SXM6 AC", 274000, "10.3", ("B300", "GB300", "B300 288GB")),
    Product("NVIDIA A100-SXM4-80GB", 81042, "8.0", ("A100 80GB", "A100", "A100 SXM4 80GB", "A100 SXM 80GB")),
    Product("NVIDIA A100 80GB PCIe", 81037, "8.0", ("A100 PCIe 80GB", "A100-PCIE-80GB", "A800")),
    Product("NVIDIA A100-SXM4-40GB", 40326, "8.0", ("A100 40GB", "A100-40GB", "A100 SXM4 40GB", "A100 SXM 40GB")),
    Product("NVIDIA A100-PCIE-40GB", 40326, "8.0", ("A100 PCIe 40GB",)),
    Product("NVIDIA A30", 24060, "8.0", ("A30 24GB",)),
    Product("NVIDIA A40", 45416, "8.6", ("A40 48GB", "A40 PCIe")),
    Product("NVIDIA A10G", 22502, "8.6", ("A10G 24GB",)),
    Product("NVIDIA A10", 22502, "8.6", ("A10 24GB",)),
    Product("NVIDIA A16", 14900, "8.6", ("A16 16GB",)),
    Product("NVIDIA A2", 14900, "8.6", ("A2 16GB",)),
    Product("NVIDIA RTX A6000", 48540, "8.6", ("A6000", "RTX A6000 48GB")),
    Product("NVIDIA RTX A5000", 24100, "8.6", ("A5000",)),
    Product("NVIDIA RTX A4000", 15980, "8.6", ("A4000",)),
    Product("NVIDIA L40S", 45486, "8.9", ("L40S 48GB",)),
    Product("NVIDIA L40", 45486, "8.9", ("L40 48GB",)),
    Product("NVIDIA L4", 22563, "8.9", ("L4 24GB",)),
    Product("NVIDIA RTX 6000 Ada Generation", 48500, "8.9", ("RTX 6000 Ada", "6000 Ada")),
    Product("NVIDIA RTX 5000 Ada Generation", 32240, "8.9", ("RTX 5000 Ada",)),
    Product("NVIDIA RTX 4000 SFF Ada Generation", 20040, "8.9", ("RTX 4000 Ada", "RTX 4000 Ada Generation")),
    Product("NVIDIA GeForce RTX 4090", 24080, "8.9", ("RTX 4090", "4090")),
    Product("NVIDIA GeForce RTX 4080", 15990, "8.9", ("RTX 4080", "RTX 4080 SUPER", "GeForce RTX 4080 SUPER")),
    Product("NVIDIA GeForce RTX 4070 Ti SUPER", 15990, "8.9", ("RTX 4070 Ti SUPER",)),
    Product("NVIDIA GeForce RTX 4070", 11870, "8.9", ("RTX 4070", "RTX 4070 SUPER", "RTX 4070 Ti")),
    Product("NVIDIA GeForce RTX 4060 Ti", 15950, "8.9", ("RTX 4060 Ti 16GB", "RTX 4060 Ti")),
    Product("NVIDIA GeForce RTX 3090", 24130, "8.6", ("RTX 3090", "3090", "RTX 3090 Ti", "GeForce RTX 3090 Ti")),
    Product("NVIDIA GeForce RTX 3080", 9990, "8.6", ("RTX 3080", "RTX 3080 10GB")),
    Product("NVIDIA GeForce RTX 3060", 11910, "8.6", ("RTX 3060", "RTX 3060 12GB")),
    Product("NVIDIA GeForce RTX 5090", 32110, "12.0", ("RTX 5090", "5090", "RTX 5090 D", "GeForce RTX 5090 D")),
    Product("NVIDIA GeForce RTX 5080", 15850, "12.0", ("RTX 5080", "5080")),
    Product("NVIDIA GeForce RTX 5070 Ti", 15850, "12.0", ("RTX 5070 Ti",)),
    Product("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97240, "12.0",
            ("RTX PRO 6000", "RTX PRO 6000 Blackwell", "RTX PRO 6000 Blackwell Workstation Edition",
             "RTX PRO 6000 Blackwell Max-Q Workstation Edition")),
    Product("NVIDIA GB10", 122550, "12.1", ("DGX Spark", "GB10 (DGX Spark)"), unified=True),
    Product("NVIDIA Thor", 125700, "11.0", ("Jetson Thor", "AGX Thor"), unified=True),
    Product("Tesla V100-SXM2-32GB", 32480, "7.0", ("V100 32GB", "V100-32GB", "V100-PCIE-32GB")),
    Product("Tesla V100-SXM2-16GB", 16140, "7.0", ("V100 16GB", "V100", "V100-PCIE-16GB")),
    Product("Tesla T4", 14910, "7.5", ("T4", "NVIDIA T4", "T4 16GB")),
    Product("NVIDIA GeForce RTX 2080 Ti", 10820, "7.5", ("RTX 2080 Ti", "2080 Ti")),
    Product("AMD Instinct MI300X", 196200, "", ("MI300X", "AMD MI300X")),
    Product("AMD Instinct MI325X", 261900, "", ("MI325X",)),
    Product("AMD Instinct MI250X", 65400, "", ("MI250X", "MI250")),
    Product("AMD Radeon PRO W7900", 49100, "", ("W7900", "AMD Radeon gfx1100")),
)  # fmt: skip


def product(name: str) -> Product:
    """The product called ``name``: its driver name, a short name, either with or without the maker's name.

    Raises:
        BerthError: nothing is called so; the known names are listed.
    """
    wanted = _plain(name)
    table = {_plain(alias): item for item in reversed(PRODUCTS) for alias in (*item.aliases, item.name)}
    if wanted in table:
        return table[wanted]
    # "H100 80GB HBM3 (8 per host)", "1x L40S": what people add around a name.
    bare = _plain(re.sub(r"\(.*?\)|^\s*\d+\s*x\s+", " ", name, flags=re.IGNORECASE))
    if bare in table:
        return table[bare]
    sized = re.fullmatch(r"(.*?)\s*(\d+)\s*gi?b", bare)
    if sized and sized[1] in table and abs(table[sized[1]].total_mib / (int(sized[2]) * 1024) - 1) < SIZE_TOLERANCE:
        return table[sized[1]]
    raise BerthError(
        "the GPU product is not known",
        found=name,
        allowed=", ".join(sorted(item.name for item in PRODUCTS)),
        mend="name one of these, or give the memory the driver shows with --gpu-memory-mib",
    )


def _plain(name: str) -> str:
    text = re.sub(r"[\s_\-/]+", " ", name.strip().lower())
    return re.sub(r"^(nvidia|tesla|geforce)\s+", "", re.sub(r"^nvidia\s+", "", text))
