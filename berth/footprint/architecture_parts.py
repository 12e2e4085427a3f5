"""The parts models are built of, as vLLM 0.29 fuses them: attention, MLP, mixture of experts, recurrent mixers.

Every function returns weights at tensor parallel size 1; names follow vLLM's modules, because quantisation configs
name the modules they leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from berth.footprint.architecture_types import Cache, State, Weight


def vector(name: str, size: int, count: int = 1, width: int | None = None) -> Weight:
    """A small parameter that every rank holds whole: a norm, a bias, a scale."""
    return Weight(name, ((1, size),), count=count, width=width)


def norm(name: str, size: int, bias: bool = False) -> Weight:
    """A normalisation weight, with its bias for a LayerNorm."""
    return vector(name, size, count=2 if bias else 1)


def linear(
    name: str, inputs: int, outputs: int, *, split: str = "whole", bias: bool = False, quantisable: bool = True
) -> Weight:
    """One projection: ``split`` "outputs" is vLLM's column parallel, "inputs" its row parallel, "whole" replicated."""
    units = ((outputs, 1),) if split == "outputs" else ((1, outputs),)
    return Weight(name, units, inputs, split, linear=quantisable, bias=bias)  # type: ignore[arg-type]


def embedding(name: str, vocab: int, hidden: int, bias: bool = False) -> Weight:
    """A vocabulary table, padded to 64 rows and divided by rows (VocabParallelEmbedding, ParallelLMHead)."""
    return Weight(name, ((vocab, 1),), hidden, "vocab", bias=bias)


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention block."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int = 0

    @property
    def value_dim(self) -> int:
        return self.head_dim_v or self.head_dim


def attention(
    at: str,
    heads: Heads,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    gate: bool = False,
    qk_norm: str = "",
    shared: bool = False,
) -> tuple[Weight, ...]:
    """Multi-head, grouped or multi-query attention: QKVParallelLinear and RowParallelLinear.

    ``gate`` doubles the queries (output gate), ``qk_norm`` is "head" (one vector per head size), "full" (one over all
    heads) or empty; ``shared`` layers read another layer's keys and values and have queries only.
    """
    queries = ((heads.heads * (2 if gate else 1), heads.head_dim),)
    keys = () if shared else ((heads.kv_heads, heads.head_dim), (heads.kv_heads, heads.value_dim))
    out = heads.heads * (heads.value_dim if not shared else heads.head_dim)
    parts = [
        Weight(f"{at}.qkv_proj", queries + keys, heads.hidden, "outputs", linear=True, bias=qkv_bias),
        linear(f"{at}.o_proj", out, heads.hidden, split="inputs", bias=out_bias),
    ]
    if qk_norm == "head":
        parts.append(vector(f"{at}.qk_norm", heads.head_dim, count=1 if shared else 2))
    elif qk_norm == "full":
        parts.append(vector(f"{at}.q_norm", heads.heads * heads.head_dim))
        parts.append(vector(f"{at}.k_norm", heads.kv_heads * heads.head_dim))
    elif qk_norm == "each":
        parts.append(vector(f"{at}.qk_norm", (heads.heads + heads.kv_heads) * heads.head_dim))
    return tuple(parts)


def mlp(at: str, hidden: int, inner: int, *, gated: bool = True, bias: bool = False) -> tuple[Weight, ...]:
    """A feed-forward block: gate and up fused where gated, then down."""
    if gated:
        up = Weight(f"{at}.gate_up_proj", ((inner, 1), (inner, 1)), hidden, "outputs", linear=True, bias=bias)
    else:
        up = linear(f"{at}.up_proj", hidden, inner, split="outputs", bias=bias)
    return (up, linear(f"{at}.down_proj", inner, hidden, split="inputs", bias=bias))


def experts(
    at: str, hidden: int, inner: int, count: int, *, gated: bool = True, bias: bool = False
) -> tuple[Weight, ...]:
    """The experts of one layer, fused as FusedMoE holds them: w13 and w2."""
    fused = ((inner, 1), (inner, 1)) if gated else ((inner, 1),)
    return (
        Weight(f"{at}.experts.w13", fused, hidden, "outputs", experts=count, linear=True, bias=bias),
        Weight(f"{at}.experts.w2", ((1, hidden),), inner, "inputs", experts=count, linear=True, bias=bias),
    )


def router(at: str, hidden: int, count: int, *, bias: bool = False, width: int | None = None) -> Weight:
    """The gate of a mixture of experts: replicated, never quantised."""
    return Weight(f"{at}.gate", ((1, count),), hidden, bias=bias, width=width)


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention (MLA)."""

    hidden: int
    heads: int
    kv_rank: int
    q_rank: int
    rope: int
    nope: int
    value: int


def latent_attention(at: str, sizes: Latent, bias: bool = False) -> tuple[Weight, ...]:
    """MLA's projections (DeepSeek-V2): down projections are replicated, up projections divided by heads."""
    query = sizes.rope + sizes.nope
    if sizes.q_rank:
        first = [
            Weight(
                f"{at}.fused_qkv_a_proj",
                ((1, sizes.q_rank), (1, sizes.kv_rank + sizes.rope)),
                sizes.hidden,
                linear=True,
                bias=bias,
            ),
            vector(f"{at}.q_a_layernorm", sizes.q_rank),
            Weight(f"{at}.q_b_proj", ((sizes.heads, query),), sizes.q_rank, "outputs", linear=True),
        ]
    else:
        first = [
            Weight(f"{at}.q_proj", ((sizes.heads, query),), sizes.hidden, "outputs", linear=True),
            linear(f"{at}.kv_a_proj_with_mqa", sizes.hidden, sizes.kv_rank + sizes.rope, bias=bias),
        ]
    return (
        *first,
        vector(f"{at}.kv_a_layernorm", sizes.kv_rank),
        Weight(f"{at}.kv_b_proj", ((sizes.heads, sizes.nope + sizes.value),), sizes.kv_rank, "outputs", linear=True),
        linear(f"{at}.o_proj", sizes.heads * sizes.value, sizes.hidden, split="inputs", bias=bias),
    )


def latent_cache(sizes: Latent) -> Cache:
    """One latent vector per token, held whole by every tensor parallel rank."""
    return Cache("mla", 1, sizes.kv_rank + sizes.rope)


@dataclass(frozen=True)
class Mamba:
    """Sizes of a Mamba-1 or Mamba-2 mixer."""

    hidden: int
    inner: int
    state: int
    kernel: int
    heads: int = 0
    head_dim: int = 0
    groups: int = 1
    dt_rank: int = 0
    conv_bias: bool = True
    proj_bias: bool = False


def mamba1(at: str, sizes: Mamba, norms: bool) -> tuple[tuple[Weight, ...], Cache]:
    """Mamba-1 (mamba_mixer.py): A and D in float32."""
    weights = [
        Weight(f"{at}.conv1d", ((sizes.inner, 1),), sizes.kernel, "outputs", bias=sizes.conv_bias),
        Weight(
            f"{at}.in_proj",
            ((sizes.inner, 1), (sizes.inner, 1)),
            sizes.hidden,
            "outputs",
            linear=True,
            bias=sizes.proj_bias,
        ),
        linear(f"{at}.x_proj", sizes.inner, sizes.dt_rank + 2 * sizes.state, split="inputs"),
        Weight(f"{at}.dt_proj", ((sizes.inner, 1),), sizes.dt_rank, "outputs", linear=True, bias=True),
        Weight(f"{at}.A", ((sizes.inner, 1),), sizes.state, "outputs", width=4),
        Weight(f"{at}.D", ((sizes.inner, 1),), 1, "outputs"),
        linear(f"{at}.out_proj", sizes.inner, sizes.hidden, split="inputs", bias=sizes.proj_bias),
    ]
    if norms:
        weights += [vector(f"{at}.dt_layernorm", sizes.dt_rank), vector(f"{at}.bc_layernorm", sizes.state, count=2)]
    return tuple(weights), Cache("state", state=State("mamba1", sizes.inner, sizes.kernel, size=sizes.state))


def mamba2(at: str, sizes: Mamba, norm_weight: bool = True) -> tuple[tuple[Weight, ...], Cache]:
    """Mamba-2 (mamba_mixer2.py): one fused input projection, per-head A, D and dt bias."""
    weights = [
        Weight(
            f"{at}.conv1d",
            ((sizes.inner, 1), (sizes.groups, sizes.state), (sizes.groups, sizes.state)),
            sizes.kernel,
            "outputs",
            bias=sizes.conv_bias,
        ),
        Weight(
            f"{at}.in_proj",
            (
                (sizes.inner, 1),
                (sizes.inner, 1),
                (sizes.groups, sizes.state),
                (sizes.groups, sizes.state),
                (sizes.heads, 1),
            ),
            sizes.hidden,
            "outputs",
            linear=True,
            bias=sizes.proj_bias,
        ),
        Weight(f"{at}.A", ((sizes.heads, 1),), 1, "outputs", width=4),
        Weight(f"{at}.D_dt_bias", ((sizes.heads, 1), (sizes.heads, 1)), 1, "outputs"),
        linear(f"{at}.out_proj", sizes.inner, sizes.hidden, split="inputs", bias=sizes.proj_bias),
    ]
    if norm_weight:
        weights.append(Weight(f"{at}.norm", ((sizes.inner, 1),), 1, "outputs"))
    state = State("mamba2", sizes.inner, sizes.kernel, sizes.heads, sizes.head_dim, sizes.state, sizes.groups)
    return tuple(weights), Cache("state", state=state)


@dataclass(frozen=True)
class Delta:
    """Sizes of a gated delta net (Qwen3-Next, Qwen3.5)."""

    hidden: int
    value_heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    kernel: int


def delta_net(at: str, sizes: Delta) -> tuple[tuple[Weight, ...], Cache]:
    """Gated delta net: queries, keys, values and gate projected together, a short convolution, A and dt per head."""
    keys, values = (sizes.key_heads, sizes.key_dim), (sizes.value_heads, sizes.value_dim)
    gates = ((sizes.value_heads, 1), (sizes.value_heads, 1))
    weights = (
        Weight(f"{at}.conv1d", (keys, keys, values), sizes.kernel, "outputs"),
        Weight(f"{at}.in_proj_qkvz", (keys, keys, values, values), sizes.hidden, "outputs", linear=True),
        Weight(f"{at}.in_proj_ba", gates, sizes.hidden, "outputs", linear=True),
        Weight(f"{at}.dt_bias", ((sizes.value_heads, 1),), 1, "outputs"),
        Weight(f"{at}.A_log", ((sizes.value_heads, 1),), 1, "outputs", width=4),
        vector(f"{at}.norm", sizes.value_dim),
        linear(f"{at}.out_proj", sizes.value_heads * sizes.value_dim, sizes.hidden, split="inputs"),
    )
    state = State(
        "delta",
        kernel=sizes.kernel,
        heads=sizes.value_heads,
        head_dim=sizes.value_dim,
        key_heads=sizes.key_heads,
        key_dim=sizes.key_dim,
    )
    return weights, Cache("state", state=state)


def short_conv(at: str, hidden: int, inner: int, kernel: int, bias: bool) -> tuple[tuple[Weight, ...], Cache]:
    """A gated short convolution (LFM2): three fused inputs, one convolution, one output."""
    weights = (
        Weight(f"{at}.conv", ((inner, 1),), kernel, "outputs", bias=bias),
        Weight(f"{at}.in_proj", ((inner, 1),) * 3, hidden, "outputs", linear=True, bias=bias),
        linear(f"{at}.out_proj", inner, hidden, split="inputs", bias=bias),
    )
    return weights, Cache("state", state=State("conv", inner, kernel))
