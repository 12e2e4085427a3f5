"""Tiny random models from a fixed seed, for machines where no weights can be had.

They load through the same code as real ones; pointing ``model`` at a directory or a hub id is all that changes.
Run in the runtime environment: ``python -m berth.engines.tiny_models DIR [NAME ...]``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEED = 0
MODELS = ("chat", "embedding", "rerank", "old")
"""Those of the local inventory."""
MORE = ("vision",)
"""Built where it is asked for: a model that sees."""
IMAGE = "<image>"
VISION_VOCABULARY = 513
"""The tokenizer's, with IMAGE."""
_SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
_TEXT = "the quick brown fox jumps over the lazy dog. hello world, replicas and slots on gpus"
_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main(directory: Path, names: Sequence[str] = MODELS) -> bool:
    """Build whatever of ``names`` (MODELS, MORE) is missing under ``directory``; tells whether anything was built."""
    missing = [name for name in names if not (directory / name / "config.json").is_file()]
    if not missing:
        return False
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    for name in missing:
        torch.manual_seed(SEED)
        with tempfile.TemporaryDirectory(dir=directory, prefix=f".{name}.") as scratch:
            target = Path(scratch) / name
            _model(name).to(torch.bfloat16).save_pretrained(target)
            (_processor() if name == "vision" else _tokenizer()).save_pretrained(target)
            target.rename(directory / name)
    return True


def _processor() -> Any:
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    seen = BlipImageProcessorPil(size={"height": 28, "width": 28})
    return Blip2Processor(image_processor=seen, tokenizer=_tokenizer(IMAGE), num_query_tokens=4, chat_template=_CHAT)


def _tokenizer(*more: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=[*_SPECIAL, *more], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )
    fast.chat_template = _CHAT
    return fast


def _model(name: str) -> Any:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPTNeoConfig,
        GPTNeoForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    common = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    if name == "old":
        # vLLM 0.29 cannot run its architecture: what the fallback is for.
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        kind = {"attention_types": [[["global"], 2]], "num_heads": 2, "num_layers": 2, "max_position_embeddings": 512}
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
        return GPTNeoForCausalLM(GPTNeoConfig(**sizes, **kind, **special))
    if name == "vision":
        return _vision()
    if name == "rerank":
        config = BertConfig(**common, num_attention_heads=2, max_position_embeddings=512, num_labels=1)
        return BertForSequenceClassification(config)
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _vision() -> Any:
    """Sees 28 x 28 pixels, as four tokens. Of vLLM's models that see, one that does without torchvision."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = OPTConfig(
        **sizes,
        **special,
        ffn_dim=128,
        word_embed_proj_dim=64,
        vocab_size=VISION_VOCABULARY,
        max_position_embeddings=512,
    )
    asks = Blip2QFormerConfig(**sizes, intermediate_size=128, encoder_hidden_size=64, cross_attention_frequency=1)
    sees = Blip2VisionConfig(**sizes, intermediate_size=128, image_size=28, patch_size=14)
    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=sees,
            qformer_config=asks,
            text_config=text,
            num_query_tokens=4,
            image_token_index=_tokenizer(IMAGE).convert_tokens_to_ids(IMAGE),
        )
    )


if __name__ == "__main__":
    print("built" if main(Path(sys.argv[1]), sys.argv[2:] or MODELS) else "present")
