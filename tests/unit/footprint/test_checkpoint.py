"""Checkpoints: safetensors written byte by byte, indexes, hub cache entries, and files that are torn."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.footprint.checkpoint import read_checkpoint

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}


def write(path: Path, tensors: dict[str, tuple[str, list[int]]], cut: int = 0) -> int:
    """A safetensors file with zeros for data; ``cut`` bytes are missing at its end. Returns the data's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype]
        for item in shape:
            size *= item
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack("<Q", len(text)) + text + bytes(offset)
    path.write_bytes(data[: len(data) - cut])
    return offset


def index(path: Path, names: dict[str, str], total: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}), encoding="utf-8")


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(SIZES)), st.lists(st.integers(0, 7), max_size=4)),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_headers_tell_every_tensor(tmp_path_factory: pytest.TempPathFactory, tensors: Any) -> None:
    file = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    total = write(file, tensors)
    read = read_checkpoint(file.parent)
    assert read.total_bytes == total
    assert {name: (t.dtype, list(t.shape)) for name, t in read.tensors.items()} == tensors


def test_an_index_names_the_files_and_strangers_beside_them_are_left_alone(tmp_path: Path) -> None:
    one = write(tmp_path / "model-00001-of-00002.safetensors", {"a": ("BF16", [3, 4])})
    two = write(tmp_path / "model-00002-of-00002.safetensors", {"b": ("F32", [5])})
    write(tmp_path / "consolidated.safetensors", {"c": ("F32", [50])})
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index(tmp_path / "model.safetensors.index.json", names, one + two)
    read = read_checkpoint(tmp_path)
    assert read.total_bytes == one + two
    assert sorted(read.tensors) == ["a", "b"]


def test_an_index_alone_gives_its_total(tmp_path: Path) -> None:
    index(tmp_path / "model.safetensors.index.json", {"a": "model-00001-of-00002.safetensors"}, 16060522496.0)
    assert read_checkpoint(tmp_path).total_bytes == 16060522496
    assert read_checkpoint(tmp_path / "model.safetensors.index.json").tensors == {}


def test_a_hub_cache_entry_is_followed_to_its_main_snapshot(tmp_path: Path) -> None:
    entry = tmp_path / "models--org--name"
    blob = entry / "blobs" / "abc"
    total = write(blob, {"a": ("BF16", [8])})
    wanted, other = entry / "snapshots" / "111", entry / "snapshots" / "222"
    wanted.mkdir(parents=True)
    (wanted / "model.safetensors").symlink_to(blob)
    write(other / "model.safetensors", {"a": ("BF16", [99])})
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("111", encoding="utf-8")
    assert read_checkpoint(entry).total_bytes == total


@pytest.mark.parametrize("cut", [1, 12, 40])
def test_a_torn_file_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "model.safetensors", {"a": ("BF16", [4, 4])}, cut=cut)
    with pytest.raises(BerthError, match=r"model\.safetensors is torn"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x01", b"\xff" * 8, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]", b"<!DOCTYPE html>" * 9],
)
def test_what_is_not_safetensors_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(BerthError, match="torn or not a safetensors"):
        read_checkpoint(tmp_path)


def test_sizes_that_do_not_fit_their_dtype_are_refused(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(BerthError, match="torn"):
        read_checkpoint(tmp_path)


def test_no_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BerthError, match=r"no safetensors checkpoint.*config\.json"):
        read_checkpoint(tmp_path)


def test_an_index_without_a_total_and_without_files_is_refused(tmp_path: Path) -> None:
    index(tmp_path / "model.safetensors.index.json", {"a": "gone.safetensors"}, None)
    with pytest.raises(BerthError, match="no total_size"):
        read_checkpoint(tmp_path)
