"""What sets one architecture's decoder layer apart from another's: norms, biases, gating, defaults.

Read off the modules of vLLM 0.29 (model_executor/models/); a string names the config key that decides.
"""

from __future__ import annotations

from dataclasses import dataclass

Flag = bool | str


@dataclass(frozen=True)
class Traits:
    """The switches of a decoder layer. The defaults are Llama's."""

    norms: int = 2
    layer_norm: bool = False
    norm_bias: bool = True
    final_norm: bool = True
    qk_norm: str = ""
    qkv_bias: Flag = "attention_bias"
    out_bias: Flag = "attention_bias"
    mlp_bias: Flag = "mlp_bias"
    gated: bool = True
    gate: bool = False
    head_bias: Flag = False
    router_bias: Flag = False
    router_width: int | None = None
    correction: Flag = False
    expert_bias: bool = False
    sinks: bool = False
    tied: bool = False
    shared_gate: bool = False
    positions: int | None = None
    window: str = "all"


LLAMA = Traits()
QWEN2 = Traits(qkv_bias=True, out_bias=False, mlp_bias=False)
QWEN3 = Traits(qk_norm="head", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=False)
GPT = Traits(layer_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False)
DEEPSEEK = Traits(mlp_bias=False, out_bias=False, qkv_bias=False, correction="noaux_tc")
GEMMA = Traits(tied=True)
QWEN_HYBRID = Traits(qk_norm="head", gate=True, shared_gate=True, qkv_bias=False, out_bias=False, mlp_bias=False)

FAMILIES: dict[str, Traits] = {
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2Model": QWEN2,
    "DotsOCRForCausalLM": QWEN2,
    "Qwen2VLForConditionalGeneration": QWEN2,
    "Qwen2_5_VLForConditionalGeneration": QWEN2,
    "Qwen2AudioForConditionalGeneration": QWEN2,
    "Qwen2MoeForCausalLM": Traits(qkv_bias=True, out_bias=False, mlp_bias=False, shared_gate=True),
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3,
    "Qwen3VLForConditionalGeneration": QWEN3,
    "Qwen3VLMoeForConditionalGeneration": QWEN3,
    "Qwen3NextForCausalLM": QWEN_HYBRID,
    "Qwen3_5ForCausalLM": QWEN_HYBRID,
    "Qwen3_5MoeForCausalLM": QWEN_HYBRID,
    "Qwen3_5ForConditionalGeneration": QWEN_HYBRID,
    "Qwen3_5MoeForConditionalGeneration": QWEN_HYBRID,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": Traits(norms=4, tied=True, window="even"),
    "Gemma2Model": Traits(norms=4, tied=True, window="even"),
    "Gemma3ForCausalLM": Traits(norms=4, qk_norm="head", tied=True, window="pattern"),
    "Gemma3TextModel": Traits(norms=4, qk_norm="head", tied=True, window="pattern"),
    "Gemma3ForConditionalGeneration": Traits(norms=4, qk_norm="head", tied=True, window="pattern"),
    "Gemma3nForCausalLM": Traits(norms=4, qk_norm="head", tied=True, window="pattern"),
    "Gemma4ForCausalLM": Traits(norms=4, qk_norm="head", tied=True, window="pattern"),
    "PhiForCausalLM": Traits(
        norms=1, layer_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, head_bias=True
    ),
    "Phi3ForCausalLM": Traits(qkv_bias=False, out_bias=False, mlp_bias=False),
    "PhiMoEForCausalLM": Traits(layer_norm=True, head_bias="lm_head_bias"),
    "GPT2LMHeadModel": Traits(
        layer_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, tied=True, positions=0
    ),
    "GPTBigCodeForCausalLM": Traits(
        layer_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, tied=True, positions=0
    ),
    "GPTNeoXForCausalLM": GPT,
    "GPTJForCausalLM": Traits(
        norms=1, layer_norm=True, qkv_bias=False, out_bias=False, mlp_bias=True, gated=False, head_bias=True
    ),
    "BloomForCausalLM": Traits(layer_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, tied=True),
    "OPTForCausalLM": Traits(
        layer_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, tied=True, positions=2
    ),
    "FalconForCausalLM": Traits(
        norms=1, layer_norm=True, qkv_bias="bias", out_bias="bias", mlp_bias="bias", gated=False, tied=True
    ),
    "Starcoder2ForCausalLM": Traits(
        layer_norm=True, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", gated=False, tied=True
    ),
    "GlmForCausalLM": Traits(out_bias=False),
    "Glm4ForCausalLM": Traits(norms=4, out_bias=False),
    "Glm4MoeForCausalLM": Traits(
        qk_norm="use_qk_norm", out_bias=False, mlp_bias=False, router_width=4, correction=True
    ),
    "GraniteForCausalLM": Traits(tied=True),
    "GraniteMoeForCausalLM": Traits(tied=True),
    "GraniteMoeSharedForCausalLM": Traits(tied=True),
    "GraniteMoeHybridForCausalLM": Traits(tied=True),
    "OlmoForCausalLM": Traits(norms=0, final_norm=False),
    "Olmo2ForCausalLM": Traits(qk_norm="full"),
    "Olmo3ForCausalLM": Traits(qk_norm="full", window="pattern"),
    "OlmoeForCausalLM": Traits(qk_norm="full"),
    "CohereForCausalLM": Traits(norms=1, layer_norm=True, norm_bias=False, qk_norm="cohere", tied=True),
    "Cohere2ForCausalLM": Traits(norms=1, layer_norm=True, norm_bias=False, tied=True, window="pattern"),
    "InternLM2ForCausalLM": Traits(qkv_bias="bias", out_bias="bias", mlp_bias=False),
    "InternLM3ForCausalLM": Traits(qkv_bias="qkv_bias", out_bias="bias", mlp_bias="bias"),
    "StableLmForCausalLM": Traits(layer_norm=True, qkv_bias="use_qkv_bias", out_bias=False, mlp_bias=False),
    "Exaone4ForCausalLM": Traits(qk_norm="head", window="pattern"),
    "SeedOssForCausalLM": Traits(out_bias="attention_out_bias"),
    "NemotronForCausalLM": Traits(layer_norm=True, gated=False),
    "SmolLM3ForCausalLM": Traits(tied=True),
    "DeepseekV2ForCausalLM": DEEPSEEK,
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "DeepseekV32ForCausalLM": DEEPSEEK,
    "GlmMoeDsaForCausalLM": Traits(mlp_bias=False, out_bias=False, qkv_bias=False, correction=True),
    "Glm4MoeLiteForCausalLM": Traits(mlp_bias=False, out_bias=False, qkv_bias=False, correction=True),
    "Llama4ForCausalLM": Traits(window="chunked"),
    "Llama4ForConditionalGeneration": Traits(window="chunked"),
    "GptOssForCausalLM": Traits(
        qkv_bias=True, out_bias=True, router_bias=True, expert_bias=True, sinks=True, window="even"
    ),
    "MiniMaxM2ForCausalLM": Traits(qk_norm="full", router_width=4, correction="use_routing_bias"),
    "Ernie4_5ForCausalLM": Traits(qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", tied=True),
    "Ernie4_5_MoeForCausalLM": Traits(
        qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", router_width=4, correction=True, tied=True
    ),
    "HunYuanMoEV1ForCausalLM": Traits(qk_norm="use_qk_norm", tied=True),
    "HunYuanDenseV1ForCausalLM": Traits(qk_norm="head", tied=True),
    "NemotronHForCausalLM": Traits(norms=1, gated=False),
    "JambaForCausalLM": Traits(qkv_bias=False, out_bias=False, mlp_bias=False),
    "Lfm2ForCausalLM": Traits(qk_norm="head", qkv_bias=False, out_bias=False, mlp_bias=False, tied=True),
    "Lfm2MoeForCausalLM": Traits(
        qk_norm="head", qkv_bias=False, out_bias=False, mlp_bias=False, tied=True, correction="use_expert_bias"
    ),
    "BambaForCausalLM": Traits(),
    "FalconH1ForCausalLM": Traits(),
    "MiniCPMForCausalLM": Traits(qkv_bias=False, out_bias=False, mlp_bias=False, tied=True),
    "LlamaForCausalLM": LLAMA,
    "LlamaModel": LLAMA,
    "LLaMAForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MistralModel": LLAMA,
    "Ministral3ForCausalLM": LLAMA,
    "MixtralForCausalLM": LLAMA,
    "ArceeForCausalLM": Traits(gated=False),
    "ApertusForCausalLM": Traits(gated=False, qk_norm="head"),
    "CwmForCausalLM": LLAMA,
    "SolarForCausalLM": LLAMA,
    "MambaForCausalLM": Traits(norms=1),
    "Mamba2ForCausalLM": Traits(norms=1),
    "FalconMambaForCausalLM": Traits(norms=1),
}

BY_MODEL_TYPE: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "MistralForCausalLM",
    "mistral4": "DeepseekV3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phi": "PhiForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "opt": "OPTForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""The decoder of a multimodal model is known by its text config's model_type."""

ENCODERS: dict[str, str] = {
    "BertModel": "bert",
    "BertForMaskedLM": "bert",
    "BertForSequenceClassification": "bert",
    "BertForTokenClassification": "bert",
    "RobertaModel": "bert",
    "RobertaForMaskedLM": "bert",
    "RobertaForSequenceClassification": "bert",
    "XLMRobertaModel": "bert",
    "XLMRobertaForSequenceClassification": "bert",
    "BgeM3EmbeddingModel": "bert",
    "BertSpladeSparseEmbeddingModel": "bert",
    "ModernBertModel": "modernbert",
    "ModernBertForSequenceClassification": "modernbert",
    "ModernBertForTokenClassification": "modernbert",
    "NomicBertModel": "rope_bert",
    "GteModel": "rope_bert",
    "GteNewModel": "rope_bert",
    "NewModel": "rope_bert",
}
"""Encoder-only models: no KV cache. The value names how their layers are built."""


def model_type_of(architecture: str) -> str:
    """The model_type of a config that leaves it out, by its architecture; empty where it is not known."""
    return next((kind for kind, name in BY_MODEL_TYPE.items() if name == architecture), "")


def traits_of(architecture: str, model_type: str) -> tuple[Traits, str, bool]:
    """(traits, the name they are known by, whether it is a known one)."""
    if architecture in FAMILIES:
        return FAMILIES[architecture], architecture, True
    if model_type in BY_MODEL_TYPE:
        name = BY_MODEL_TYPE[model_type]
        return FAMILIES[name], name, True
    return LLAMA, architecture, False
