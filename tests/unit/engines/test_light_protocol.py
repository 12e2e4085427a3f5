"""The gateway without an inference engine: ray.serve.llm's own ingress over the models that stand in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMPORT = """
import json, pickle, sys
from importlib.util import find_spec
from berth.engines import app, gateway, light, light_protocol
import berth.ray.launch
from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest
body = ChatCompletionRequest(model="chat", messages=[{"role": "user", "content": "hi"}], temperature=0.5)
print(json.dumps({
    "engine": find_spec("vllm") is not None,
    "stands_in": light_protocol.stand_in(),
    "engines_imported": sorted({name.split(".")[0] for name in sys.modules} & {"vllm", "torch", "transformers"}),
    "kept": pickle.loads(pickle.dumps(body)).model_dump()["temperature"],
}))
"""


@pytest.mark.runtime
def test_the_gateway_is_the_same_class_with_and_without_an_engine(runtime_python: str) -> None:
    done = subprocess.run(
        [runtime_python, "-c", IMPORT],
        env={"PYTHONPATH": str(ROOT), "VLLM_CONFIGURE_LOGGING": "0", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["stands_in"] is not answer["engine"]
    assert answer["kept"] == 0.5
    if not answer["engine"]:
        assert answer["engines_imported"] == []
