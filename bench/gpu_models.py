"""Two models for bench_gpu without a download: config and tokenizer; vLLM makes up the weights.

Run by the runtime's interpreter: ``python -m bench.gpu_models DIR [--tiny]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from berth.engines.tiny_models import _tokenizer

SIZES = {"small": (30, 1024, 16, 8, 4096), "large": (24, 2048, 32, 8, 8192)}
"""Layers, hidden size, heads, KV heads and intermediate size: 0.5 and 1.5 thousand million parameters."""
TINY = {"small": (2, 64, 2, 1, 128), "large": (4, 128, 4, 2, 256)}


def main(directory: Path, tiny: bool) -> None:
    from transformers import LlamaConfig

    tokenizer = _tokenizer()
    for name, (layers, hidden, heads, kv_heads, intermediate) in (TINY if tiny else SIZES).items():
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=512,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            intermediate_size=intermediate,
            max_position_embeddings=2048,
            dtype="bfloat16",
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        config.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--tiny" in sys.argv[2:])
