"""Which decoder architectures tinier knows: FAMILIES, a row each.

A new architecture that is a decoder with RoPE and grouped query attention, or a mixture of experts of that
kind, is one more row, where fields say what its layers are made of.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Norms(NamedTuple):
    """The norms of a layer by what they do, under their names inside it."""

    attention_in: str | None = "input_layernorm"
    mlp_in: str | None = "post_attention_layernorm"
    attention_out: str | None = None
    """Over what attention adds to the stream, before it is added"""
    mlp_out: str | None = None


USUAL_NORMS = Norms()
_BEHIND = Norms(None, None, "post_attention_layernorm", "post_feedforward_layernorm")


class LayerKind(NamedTuple):
    """In what the layers of one model differ."""

    window: int | None = None
    """How many tokens back attention sees; None: all"""
    rope: str | None = ""
    """Which entry of config.json's `rope_parameters` turns q and k by their positions; "": there is only
    one; None: nothing does"""


class Input(NamedTuple):
    """What some linear layers of a decoder layer read."""

    name: str
    readers: tuple[str, ...]
    source: str | None
    """What stands before it, where a factor for each channel can be folded into: a norm's weight, or the
    rows of a linear layer; None: nothing does"""
    per_kv_head: bool = False
    """Whether the source's rows serve all query heads of one KV head"""
    first_row: int = 0
    """Of a linear layer that is the source: where the rows begin that make this input"""


class Multipliers(NamedTuple):
    """Numbers that a model is multiplied with on the way."""

    embedding: float = 1.0
    residual: float = 1.0
    """What attention and the MLP add to the stream"""
    logits: float = 1.0
    """What they are divided by"""
    attention: float | None = None
    """The products of queries and keys; None: 1 / sqrt(head size)"""


NO_MULTIPLIERS = Multipliers()


class Mixture(NamedTuple):
    """Experts instead of one MLP: each is an MLP, and a router chooses some for each token."""

    block: str
    """Name of all of it inside a layer; `BLOCK.gate` is the router"""
    gate: str
    up: str
    down: str
    """Names inside `BLOCK.experts.N`"""
    count_key: str
    width_key: str
    """Entries of config.json: how many experts, and how wide each is"""
    in_float32: bool
    """Whether an expert's output is multiplied with its share in float32"""
    sums_to_one: Literal["config"] | bool
    """Whether the shares of a token's experts are divided by their sum; `config`: as its
    `norm_topk_prob` says"""


Channels = Literal["q", "k", "v", "gate", "up", "hidden"]
"""What an output of a linear layer is"""
HeadNorms = Literal["none", "each", "all"]
"""RMSNorm of q and k before RoPE: none, over each head, or over all heads' channels together"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    architecture: str
    """Class name in config.json's `architectures`."""
    qkv_bias: bool | Literal["config"]
    """Whether q, k and v have a bias; `config`: as `attention_bias` says, and then o has one too."""
    mlp_bias: bool | Literal["config"]
    head_norms: HeadNorms = "none"
    windows: Literal["none", "all", "layer_types"] = "none"
    """Which layers have the `sliding_window` of config.json: none, whatever it says; all; or those that
    its `layer_types` names."""
    norms: Norms = USUAL_NORMS
    norm_offset: float = 0.0
    """Added to a stored norm weight."""
    norms_in_float32: bool = False
    """Whether norms multiply with their weight before they round to the model's type, not after."""
    rope_in_float32: bool = False
    """Whether q and k are turned in float32 and rounded once, not product by product."""
    fused: bool = False
    """Whether q, k and v are one linear layer, and gate and up another."""
    mixture: Mixture | None = None
    per_layer: tuple[str, ...] = ()
    """Entries of config.json that say something of each layer, and have a default that is written out:
    `no_rope_layers` (1: q and k are turned, 0: not), `layer_types`."""
    multipliers: Literal["none", "granite", "gemma"] = "none"
    """granite: config.json has all four; gemma: the root of the hidden size, rounded to the model's type,
    and `query_pre_attn_scalar`."""
    hidden_in_heads: bool = False
    """Whether transformers wants the hidden size to be a multiple of the number of heads, even where
    the head size is given."""


FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            architecture="LlamaForCausalLM",
            qkv_bias="config",
            mlp_bias="config",
            hidden_in_heads=True,
        ),
        Family(
            architecture="MistralForCausalLM",
            qkv_bias=False,
            mlp_bias=False,
            windows="all",
        ),
        Family(
            architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            mlp_bias=False,
            windows="layer_types",
        ),
        Family(
            architecture="Qwen3ForCausalLM",
            qkv_bias="config",
            mlp_bias=False,
            head_norms="each",
            windows="layer_types",
        ),
        Family(
            architecture="SmolLM3ForCausalLM",
            qkv_bias="config",
            mlp_bias="config",
            windows="layer_types",
            per_layer=("no_rope_layers",),
        ),
        Family(
            architecture="GraniteForCausalLM",
            qkv_bias="config",
            mlp_bias="config",
            multipliers="granite",
        ),
        Family(
            architecture="Gemma3ForCausalLM",
            qkv_bias="config",
            mlp_bias=False,
            head_norms="each",
            windows="layer_types",
            per_layer=("layer_types",),
            norms=Norms(
                mlp_in="pre_feedforward_layernorm",
                attention_out="post_attention_layernorm",
                mlp_out="post_feedforward_layernorm",
            ),
            norm_offset=1.0,
            norms_in_float32=True,
            multipliers="gemma",
            hidden_in_heads=True,
        ),
        Family(
            architecture="Olmo2ForCausalLM",
            qkv_bias="config",
            mlp_bias=False,
            head_norms="all",
            norms=_BEHIND,
            norms_in_float32=True,
            rope_in_float32=True,
        ),
        Family(
            architecture="Phi3ForCausalLM",
            qkv_bias=False,
            mlp_bias=False,
            windows="all",
            fused=True,
        ),
        Family(
            architecture="Qwen3MoeForCausalLM",
            qkv_bias="config",
            mlp_bias=False,
            windows="all",
            head_norms="each",
            mixture=Mixture(
                "mlp",
                "gate_proj",
                "up_proj",
                "down_proj",
                "num_experts",
                "moe_intermediate_size",
                in_float32=False,
                sums_to_one="config",
            ),
        ),
        Family(
            architecture="MixtralForCausalLM",
            qkv_bias=False,
            mlp_bias=False,
            windows="all",
            mixture=Mixture(
                "block_sparse_moe",
                "w1",
                "w3",
                "w2",
                "num_local_experts",
                "intermediate_size",
                in_float32=True,
                sums_to_one=True,
            ),
        ),
    )
}
