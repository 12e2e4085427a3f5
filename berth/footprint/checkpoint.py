"""What a checkpoint holds: names, dtypes and sizes of its tensors, read off headers and indexes, never the weights."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from berth.errors import BerthError

HEADER_LIMIT = 100_000_000
"""Largest safetensors header, in bytes (the format's own limit)."""

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: dtype as safetensors spells it, shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, their bytes together, and the files they come from.

    ``tensors`` is empty where only an index without its files was found; ``total_bytes`` is then the index's total.
    """

    total_bytes: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of the safetensors files under ``path``: a file, a model's directory, or a hub cache entry.

    A directory with an index but without (all of) its files gives the index's ``total_size`` alone.

    Raises:
        BerthError: no checkpoint there, or a file that is torn: the header does not fit the file.
    """
    if path.is_file():
        return _index_only(path) if path.name.endswith(".index.json") else _from_files([path])
    root = _snapshot(path)
    index = next((item for item in sorted(root.glob("*.safetensors.index.json"))), None)
    wanted = _indexed_files(index) if index else []
    if index is not None and not all((root / name).exists() for name in wanted):
        return _index_only(index)
    files = [root / name for name in wanted] or _plain_files(root)
    if not files:
        raise BerthError(
            f"no safetensors checkpoint in {path}",
            found=", ".join(sorted(item.name for item in root.iterdir())[:10])
            if root.is_dir()
            else "no such directory",
            allowed="*.safetensors, *.safetensors.index.json, or a hub cache entry with snapshots/",
            mend="download the model there, or leave the checkpoint out to predict from config.json alone",
        )
    return _from_files(files)


def _plain_files(root: Path) -> list[Path]:
    """The safetensors files of a model without an index; Mistral's consolidated copy only where it is alone."""
    files = sorted(root.glob("*.safetensors")) if root.is_dir() else []
    rest = [item for item in files if not item.name.startswith("consolidated")]
    return [item for item in rest or files if not item.name.startswith("adapter_")]


def _snapshot(path: Path) -> Path:
    """The directory with the files: a hub cache entry keeps them under snapshots/REVISION."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text(encoding="utf-8").strip()).is_dir():
        return named
    found = sorted(snapshots.iterdir(), key=lambda item: (item.stat().st_mtime, item.name))
    return found[-1] if found else path


def _load_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError("no weight_map")
    except ValueError as error:
        raise BerthError(
            f"the checkpoint index {path.name} cannot be read", found=str(error), mend=f"download {path} again"
        ) from None
    return index


def _indexed_files(path: Path) -> list[str]:
    return sorted({str(name) for name in _load_index(path)["weight_map"].values()})


def _index_only(path: Path) -> Checkpoint:
    total = (_load_index(path).get("metadata") or {}).get("total_size")
    try:
        size = int(float(str(total)))
    except (TypeError, ValueError):
        raise BerthError(
            f"the checkpoint index {path.name} has no total_size and its files are not there",
            found=total,
            mend=f"download the model's files to {path.parent}",
        ) from None
    return Checkpoint(size, files=(path.name,))


def _from_files(files: list[Path]) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_header(file))
    total = sum(tensor.bytes for tensor in tensors.values())
    return Checkpoint(total, tensors, tuple(item.name for item in files))


def _header(path: Path) -> dict[str, Tensor]:
    """The header of one safetensors file: 8 bytes of length, then JSON, then the data its offsets speak of."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(HEADER_LIMIT, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        tensors = {str(n): _tensor(v) for n, v in header.items() if n != "__metadata__"}
        end = max((int(v["data_offsets"][1]) for n, v in header.items() if n != "__metadata__"), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, its header speaks of {8 + length + end}")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BerthError(
            f"the checkpoint file {path.name} is torn or not a safetensors file",
            found=str(error) or type(error).__name__,
            mend=f"download {path} again",
        ) from None
    return tensors


def _tensor(entry: dict[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(item) for item in entry["shape"])
    values = 1
    for item in shape:
        values *= item
    dtype = str(entry["dtype"])
    if dtype in BITS and values * BITS[dtype] // 8 != int(end) - int(begin):
        raise ValueError(f"a tensor of {values} {dtype} in {int(end) - int(begin)} bytes")
    return Tensor(dtype, shape, int(end) - int(begin))
