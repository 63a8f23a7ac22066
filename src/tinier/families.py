"""Which decoder architectures tinier knows, and where each keeps its tensors.

Start at `open_model`: it resolves a model, verifies its folder and checks that its tensors are those
that the configuration calls for, each of the right shape and type, and no others. A new architecture
that is a dense decoder with RoPE and grouped query attention is one more row in FAMILIES, where fields say
what its layers are made of.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from tinier.checkpoint import (
    Checkpoint,
    TensorInfo,
    layout_of,
    open_checkpoint,
    resolve,
    stored_shapes,
)
from tinier.errors import CheckpointError, InputError
from tinier.progress import warn
from tinier.schemes import Layout

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# buffers that older files carry and every loader computes for itself
_BUFFERS = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")
# what a weight of 16 bits or more may be stored in
_WEIGHT_TYPES = ("BF16", "F16", "F32", "F64")
# models that see pictures too, and what their language model alone is; of config.json's outer part it needs
_TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
_OUTER_KEYS = (
    "dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization_config", "transformers_version",
)  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
HEAD_LINEAR = "lm_head"


class Norms(NamedTuple):
    """The norms of a layer by what they do, under their names inside it."""

    attention_in: str | None = "input_layernorm"
    mlp_in: str | None = "post_attention_layernorm"
    attention_out: str | None = None
    """Over what attention adds to the stream, before it is added"""
    mlp_out: str | None = None


_USUAL = Norms()
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


_NONE = Multipliers()


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
    norms: Norms = _USUAL
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


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of one decoder, read from its configuration."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    turning: int
    """Channels of a head that RoPE turns, the first ones"""
    vocab: int
    max_positions: int
    norm_eps: float
    tied_head: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    hidden_in_heads: bool
    kinds: tuple[LayerKind, ...]
    """Of each layer."""
    head_norms: HeadNorms = "none"
    norm_names: Norms = _USUAL
    norm_offset: float = 0.0
    norms_in_float32: bool = False
    rope_in_float32: bool = False
    fused: bool = False
    mixture: Mixture | None = None
    experts: int = 0
    """How many; 0: one MLP"""
    top_k: int = 0
    """How many of them a token goes through"""
    shares_sum_to_one: bool = True
    """Whether the shares of a token's experts are divided by their sum"""
    multipliers: Multipliers = _NONE
    embedding_by_root: bool = False
    """Whether `multipliers.embedding` is the root of the hidden size."""
    activation: Literal["silu", "gelu_tanh"] = "silu"

    @property
    def cached_numbers(self) -> int:
        """Numbers that the cache holds for a token: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer's attention."""
        return tuple(kind.window for kind in self.kinds)

    @cached_property
    def blocks(self) -> tuple[tuple[Input, Input], ...]:
        """What a layer consists of, in the order that it is computed: attention, and the MLP or every
        expert. Of each what its first linear layers read, and what the last one does, which writes to the
        stream."""
        norms, q, kv = self.norm_names, self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
        values, up = 0, 0
        if self.fused:
            qkv, gate_up = ("self_attn.qkv_proj",), ("mlp.gate_up_proj",)
            values, up = q + kv, self.intermediate
        attention = (
            Input("self_attn", qkv, norms.attention_in),
            Input("self_attn.o_proj", ("self_attn.o_proj",), qkv[-1], True, values),
        )
        if self.mixture is None:
            mlp = (
                Input("mlp", gate_up, norms.mlp_in),
                Input("mlp.down_proj", ("mlp.down_proj",), gate_up[-1], first_row=up),
            )
            return attention, mlp
        experts = []
        for name in (f"{self.mixture.block}.experts.{i}" for i in range(self.experts)):
            parts = (self.mixture.gate, self.mixture.up, self.mixture.down)
            first, second, third = (f"{name}.{part}" for part in parts)
            # a factor on the norm would be one for the router and all experts
            experts.append((Input(name, (first, second), None), Input(third, (third,), second)))
        return attention, *experts

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What a layer's linear layers read, in the order that it is computed."""
        return tuple(read for block in self.blocks for read in block)

    @property
    def router(self) -> str | None:
        """Name of the linear layer that chooses experts, inside a layer."""
        return None if self.mixture is None else f"{self.mixture.block}.gate"

    @cached_property
    def outputs(self) -> dict[str, tuple[tuple[Channels, int], ...]]:
        """What the rows of a layer's linear layers are, one after the other, and how many of each, by
        the name inside the layer."""
        q, kv, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        attention: list[tuple[Channels, int]] = [("q", q), ("k", kv), ("v", kv)]
        mlp: list[tuple[Channels, int]] = [("gate", inner), ("up", inner)]
        found: dict[str, tuple[tuple[Channels, int], ...]] = {}
        for number, (first, last) in enumerate(self.blocks):
            parts = mlp if number else attention
            if self.fused:
                found[first.readers[0]] = tuple(parts)
            else:
                found |= {name: (part,) for name, part in zip(first.readers, parts, strict=True)}
            found[last.readers[0]] = (("hidden", self.hidden),)
        return found

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of a layer's linear layers, by their name inside the layer; not the router."""
        columns: dict[str, int] = {}
        for number, (first, last) in enumerate(self.blocks):
            inner = self.intermediate if number else self.heads * self.head_dim
            columns |= dict.fromkeys(first.readers, self.hidden) | dict.fromkeys(
                last.readers, inner
            )
        rows = {name: sum(count for _, count in parts) for name, parts in self.outputs.items()}
        return {name: (rows[name], count) for name, count in columns.items()}

    @property
    def norms(self) -> dict[str, tuple[int]]:
        """Shapes of a layer's norm weights, by their name inside the layer."""
        norms = {f"{name}.weight": (self.hidden,) for name in self.norm_names if name}
        if self.head_norms != "none":
            q, k = (self.heads, self.kv_heads) if self.head_norms == "all" else (1, 1)
            norms["self_attn.q_norm.weight"] = (q * self.head_dim,)
            norms["self_attn.k_norm.weight"] = (k * self.head_dim,)
        return norms

    @property
    def biases(self) -> dict[str, tuple[int]]:
        """Shapes of a layer's biases, by their name inside the layer."""
        biased: list[str] = []
        (attention, out), *mlps = self.blocks
        if self.qkv_bias:
            biased += attention.readers
        if self.out_bias:
            biased += out.readers
        if self.mlp_bias:
            biased += (name for block in mlps for read in block for name in read.readers)
        return {f"{name}.bias": (self.linears[name][0],) for name in biased}

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        linear = sum(rows * columns for rows, columns in self.linears.values())
        linear += self.experts * self.hidden
        return linear + sum(n for (n,) in (self.norms | self.biases).values())

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_head else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden


def norm_weight(stored: Tensor, geometry: Geometry) -> Tensor:
    """What a norm multiplies with: the stored weight with the family's offset, in float32 where the norm
    rounds after that (kernels.rms_norm)."""
    return stored.float() + geometry.norm_offset if geometry.norms_in_float32 else stored


def layer_name(index: int) -> str:
    """Prefix of a decoder layer's tensors."""
    return f"model.layers.{index}"


def linear_names(geometry: Geometry) -> list[str]:
    """Every linear layer that may be quantized, by its full name, the head last."""
    layers = [f"{layer_name(i)}.{n}" for i in range(geometry.layers) for n in geometry.linears]
    return [*layers, HEAD_LINEAR]


def module_names(geometry: Geometry) -> list[str]:
    """Those, and the routers: all that other loaders take for a linear layer."""
    routers = [f"{layer_name(i)}.{geometry.router}" for i in range(geometry.layers)]
    return [*(routers if geometry.router else []), *linear_names(geometry)]


def checkpoint_layout(checkpoint: Checkpoint) -> Layout | None:
    """How the checkpoint is quantized; None if it is not. Raises CheckpointError."""
    return layout_of(checkpoint.config, module_names(geometry_of(checkpoint)))


def open_model(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Resolve and verify a model of a known family, in the names and types that stages and engine know;
    loads no weights.

    Where its files do other than config.json says and there is one right reading, that is taken, said as
    a warning, and kept in `Checkpoint.notes`.
    model: folder, Hub id, .gguf file or built-in name. Raises CheckpointError or NetworkError.
    """
    checkpoint = _canonical(open_checkpoint(resolve(str(model), revision)))
    for note in checkpoint.notes:
        warn(f"{checkpoint.folder.name}: {note}")
    return checkpoint


def _canonical(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose tensors have the usual names and are all that its configuration calls for."""
    checkpoint, notes = _text_part(checkpoint)
    family = family_of(checkpoint)
    config = dict(checkpoint.config)
    if config.get("quantization_config", ...) is None:
        del config["quantization_config"]
    if "compression_config" in config:
        raise CheckpointError(
            f"{checkpoint.folder} is quantized in an old layout of compressed-tensors "
            "(compression_config). Give the 16-bit model, or a checkpoint with quantization_config."
        )
    for key in family.per_layer:
        if config.get(key) is None:  # said of each layer, so that it holds when some of them go
            config[key] = list(getattr(hf_config(replace(checkpoint, config=config)), key))
    if not (config.get("dtype") or config.get("torch_dtype")):
        config["dtype"] = str(checkpoint.dtype).removeprefix("torch.")
        notes.append(
            f"config.json names no dtype; {config['dtype']} is taken, which most of the weights are in"
        )
    if family.windows == "none" and config.get("sliding_window"):
        notes.append(
            f"sliding_window={config['sliding_window']} in config.json means nothing to a "
            f"{family.architecture} and is not used"
        )
    tensors = _usual_names(checkpoint.tensors)
    if (
        HEAD not in tensors
        and not config.get("tie_word_embeddings", False)
        and EMBEDDING in tensors
    ):
        config = _tied_by_default(checkpoint, config)
    checkpoint = replace(checkpoint, config=config, tensors=tensors)
    geometry = geometry_of(checkpoint)
    if geometry.tied_head:
        checkpoint, note = _check_tie(checkpoint)
        notes += [note] if note else []
    _check_tensors(checkpoint, geometry_of(checkpoint))
    other = sorted(
        {
            info.dtype.lower()
            for name, info in checkpoint.tensors.items()
            if name.endswith((".weight", ".bias")) and info.dtype in _WEIGHT_TYPES
        }
        - {_SHORT_TYPES[checkpoint.dtype]}
    )
    if other:
        notes.append(
            f"weights stored as {', '.join(other)} are read as "
            f"{str(checkpoint.dtype).removeprefix('torch.')}, which is the model's type"
        )
    return replace(checkpoint, notes=tuple(notes))


_SHORT_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def _tied_by_default(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    """config.json with its family's default spelled out: without `tie_word_embeddings` some are tied."""
    if "tie_word_embeddings" in config:
        return config
    tied = bool(hf_config(replace(checkpoint, config=config)).tie_word_embeddings)
    return config | {"tie_word_embeddings": tied}


def _text_part(checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Of a model that sees pictures too, the language model; any other as it is. With what was left out,
    for people."""
    architecture = (checkpoint.config.get("architectures") or [""])[0]
    causal = _TEXT_PARTS.get(architecture)
    if causal is None:
        return checkpoint, []
    whole, tensors = checkpoint.config, {}
    for name, info in checkpoint.tensors.items():
        own = name.replace("language_model.", "", 1)
        if own != name or own == HEAD:
            tensors[own] = info
    outer = {key: whole[key] for key in _OUTER_KEYS if whole.get(key) is not None}
    config = outer | whole["text_config"] | {"architectures": [causal]}
    left = len(checkpoint.tensors) - len(tensors)
    return replace(checkpoint, config=config, tensors=tensors), [
        f"a {architecture}: its language model is taken, and {left} tensors that see pictures are left out"
    ]


def _usual_names(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by the names of a whole causal language model: a decoder alone (`LlamaModel`) lacks
    `model.`, a tied model may store the head and not the embedding."""
    if EMBEDDING.removeprefix("model.") in tensors:
        tensors = {
            name if name.startswith("lm_head.") else f"model.{name}": info
            for name, info in tensors.items()
        }
    if EMBEDDING not in tensors and HEAD in tensors:
        tensors = {EMBEDDING if name == HEAD else name: info for name, info in tensors.items()}
    return {name: info for name, info in tensors.items() if not name.endswith(_BUFFERS)}


def _check_tie(checkpoint: Checkpoint) -> tuple[Checkpoint, str | None]:
    """A tied model that stores a head: without it where it is the embedding; with it, and untied, where
    it is another matrix, which is how transformers reads such files."""
    head = checkpoint.tensors.get(HEAD)
    if head is None or head.dtype not in _WEIGHT_TYPES:
        return checkpoint, None
    shapes = {name: checkpoint.tensors[name].shape for name in (EMBEDDING, HEAD)}
    if shapes[EMBEDDING] == shapes[HEAD]:
        with checkpoint.reader() as read:
            alike = torch.equal(read(EMBEDDING), read(HEAD))
        if alike:
            tensors = {name: info for name, info in checkpoint.tensors.items() if name != HEAD}
            return replace(checkpoint, tensors=tensors), None
    untied = replace(checkpoint, config=checkpoint.config | {"tie_word_embeddings": False})
    return untied, (
        f"config.json ties the head to the embedding and the weights hold another {HEAD}; that one "
        "is used"
    )


def check_length(checkpoint: Checkpoint, length: int) -> None:
    """Raise InputError for sequences longer than the model has positions for."""
    positions = geometry_of(checkpoint).max_positions
    if length > positions:
        raise InputError(
            f"{length} tokens are more than the {positions} positions of {checkpoint.folder.name}. "
            f"Use at most {positions}."
        )


def family_of(checkpoint: Checkpoint) -> Family:
    """The table row of a checkpoint. Raises CheckpointError for an unknown architecture."""
    architectures = checkpoint.config.get("architectures") or ["(none named)"]
    family = FAMILIES.get(architectures[0])
    if family is None:
        raise CheckpointError(
            f"{checkpoint.folder} is a {architectures[0]}. tinier knows these families: "
            f"{', '.join(FAMILIES)}."
        )
    return family


def hf_config(checkpoint: Checkpoint) -> Any:
    """transformers' own configuration object, with its defaults filled in."""
    try:
        values = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:  # its strict classes have errors of their own
        path = checkpoint.folder / "config.json"
        told = " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"transformers rejects {path}: {told:.300}") from None


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """Sizes of a checkpoint's decoder. Raises CheckpointError for what tinier cannot run."""
    family = family_of(checkpoint)
    config = hf_config(checkpoint)
    _check_computable(checkpoint, config)
    _check_sizes(checkpoint, config)
    _check_mixture(checkpoint, family.mixture, config)
    mixture = family.mixture
    bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    return Geometry(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, mixture.width_key if mixture else "intermediate_size"),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        turning=_turning(config),
        vocab=config.vocab_size,
        max_positions=_positions(config),
        norm_eps=config.rms_norm_eps,
        tied_head=bool(config.tie_word_embeddings),
        qkv_bias=bias if family.qkv_bias == "config" else family.qkv_bias,
        out_bias=bias if family.qkv_bias == "config" else False,
        mlp_bias=mlp_bias if family.mlp_bias == "config" else family.mlp_bias,
        head_norms=family.head_norms,
        hidden_in_heads=family.hidden_in_heads,
        kinds=_kinds(family, config),
        norm_names=family.norms,
        norm_offset=family.norm_offset,
        norms_in_float32=family.norms_in_float32,
        rope_in_float32=family.rope_in_float32,
        fused=family.fused,
        mixture=mixture,
        experts=getattr(config, mixture.count_key) if mixture else 0,
        top_k=config.num_experts_per_tok if mixture else 0,
        shares_sum_to_one=_shares_sum_to_one(mixture, config),
        multipliers=_multipliers(family, config, checkpoint.dtype),
        embedding_by_root=family.multipliers == "gemma",
        activation=_ACTIVATIONS[_activation(config)],
    )


def _activation(config: Any) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _check_computable(checkpoint: Checkpoint, config: Any) -> None:
    """Raise CheckpointError for what config.json asks for and tinier does not compute."""
    for key in rope_keys(config):
        rope_type = rope_parameters(config, key).get("rope_type", "default")
        if rope_type not in _ROPE_TYPES:
            raise CheckpointError(
                f"{checkpoint.folder} uses RoPE of type {rope_type!r}; known: {', '.join(_ROPE_TYPES)}."
            )
    activation = _activation(config)
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{checkpoint.folder} uses {activation!r}; known: {', '.join(_ACTIVATIONS)}."
        )
    for name in (
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if getattr(config, name, None):
            raise CheckpointError(
                f"{checkpoint.folder} has {name}={getattr(config, name)} in config.json, which tinier "
                "does not compute."
            )


def _shares_sum_to_one(mixture: Mixture | None, config: Any) -> bool:
    if mixture is None or mixture.sums_to_one != "config":
        return True
    return bool(config.norm_topk_prob)


def _check_mixture(checkpoint: Checkpoint, mixture: Mixture | None, config: Any) -> None:
    """Raise CheckpointError for experts that tinier does not compute."""
    if mixture is None:
        return
    path = checkpoint.folder / "config.json"
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise CheckpointError(
            f"{path} has layers without experts among those with (mlp_only_layers, decoder_sparse_step). "
            "tinier knows models of one kind of layer."
        )
    count, chosen = getattr(config, mixture.count_key), config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise CheckpointError(f"{path} sends a token to {chosen} of {count} experts.")


def _check_sizes(checkpoint: Checkpoint, config: Any) -> None:
    """Raise CheckpointError for sizes that no decoder can have."""
    path = checkpoint.folder / "config.json"
    sizes = (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    for name in sizes:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path} has {name}={value!r}. It is a number, 1 or more.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{path} has {config.num_attention_heads} query heads and {config.num_key_value_heads} KV "
            "heads. The second divides the first."
        )
    size, turning = _head_dim(config), _turning(config)
    if turning < 2 or turning % 2:
        raise CheckpointError(
            f"{path} has heads of size {size}, of which {turning} turn. RoPE turns pairs: that is even."
        )
    epsilon = config.rms_norm_eps
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise CheckpointError(f"{path} has rms_norm_eps={epsilon!r}. It is small, such as 1e-5.")


def _head_dim(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _turning(config: Any) -> int:
    rope = rope_parameters(config, rope_keys(config)[-1])
    return int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))


def _positions(config: Any) -> int:
    """How long a sequence may be. Under YaRN (arXiv 2309.00071) and dynamic scaling
    `max_position_embeddings` is often left at what the model was trained on; what it reaches is that times
    the factor."""
    rope = rope_parameters(config, rope_keys(config)[-1])
    positions = int(config.max_position_embeddings)
    if rope.get("rope_type") not in ("yarn", "dynamic"):
        return positions
    original = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(original * rope.get("factor", 1.0)))


def _kinds(family: Family, config: Any) -> tuple[LayerKind, ...]:
    """What each layer is."""
    windows = _windows(family, config)
    ropes: list[str | None] = [""] * len(windows)
    if "no_rope_layers" in family.per_layer:
        ropes = ["" if turned else None for turned in config.no_rope_layers]
    if rope_keys(config) != ("",):
        ropes = list(config.layer_types)
    return tuple(map(LayerKind, windows, ropes))


def rope_keys(config: Any) -> tuple[str, ...]:
    """The kinds of layers that have a RoPE of their own; ("",): all have one."""
    found: dict[str, Any] = config.rope_parameters or {}
    if not any(isinstance(value, dict) for value in found.values()):
        return ("",)
    return tuple(key for key in found if key in config.layer_types)


def rope_parameters(config: Any, key: str) -> dict[str, Any]:
    """Of one of `rope_keys`."""
    found: dict[str, Any] = config.rope_parameters or {}
    return found[key] if key else found


def _multipliers(family: Family, config: Any, dtype: torch.dtype) -> Multipliers:
    if family.multipliers == "none":
        return _NONE
    if family.multipliers == "gemma":
        root = torch.tensor(config.hidden_size**0.5).to(dtype).item()
        return Multipliers(embedding=root, attention=config.query_pre_attn_scalar**-0.5)
    return Multipliers(
        embedding=float(config.embedding_multiplier), residual=float(config.residual_multiplier),
        logits=float(config.logits_scaling), attention=float(config.attention_multiplier),
    )  # fmt: skip


def _windows(family: Family, config: Any) -> tuple[int | None, ...]:
    layers = int(config.num_hidden_layers)
    if family.windows == "none":
        return (None,) * layers
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if family.windows == "all":
        return (window,) * layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _check_tensors(checkpoint: Checkpoint, geometry: Geometry) -> None:
    """Raise CheckpointError unless the tensors are those that config.json calls for, all of them and no
    others, of the right shapes and types."""
    expected = _expected_shapes(checkpoint, geometry)
    layout = checkpoint_layout(checkpoint)
    schemes = layout.schemes if layout else {}
    # the shape of packed integers follows from the configuration
    _check_leftovers(checkpoint, {*expected, *(f"{name}.weight_shape" for name in schemes)})
    checkpoint.require(expected)
    for name, shape in expected.items():
        info = checkpoint.tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} has shape {list(info.shape)}; config.json implies "
                f"{list(shape)}. The weights and the configuration are not of one model."
            )
    quantized = {f"{name}.weight" for name in schemes}
    for name in expected:
        info = checkpoint.tensors[name]
        plain = name.endswith((".weight", ".bias")) and name not in quantized
        if plain and info.dtype not in _WEIGHT_TYPES:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} is stored as {info.dtype}, and config.json does not say "
                "that it is quantized. Give a checkpoint whose config.json has its quantization_config, "
                "or the 16-bit model."
            )


def _check_leftovers(checkpoint: Checkpoint, expected: set[str]) -> None:
    """Raise CheckpointError for tensors that nothing would read: the model would be another one than the
    files hold."""
    left = sorted(set(checkpoint.tensors) - expected)
    if not left:
        return
    some = ", ".join(left[:4]) + (" …" if len(left) > 4 else "")
    said = f"{checkpoint.folder} holds {len(left)} tensors that its config.json does not call for: {some}."
    if any(
        name.endswith((".weight_scale", ".weight_scale_inv", ".weight_packed")) for name in left
    ):
        raise CheckpointError(
            f"{said} They belong to quantized weights, which quantization_config must describe. Add it, "
            "or give the 16-bit model."
        )
    if all(name.endswith(".bias") for name in left):
        raise CheckpointError(
            f"{said} transformers would leave these biases out. If the model has them, config.json must "
            "say so (attention_bias, mlp_bias); if not, remove them."
        )
    raise CheckpointError(f"{said} Remove them, or correct config.json.")


def _expected_shapes(checkpoint: Checkpoint, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (geometry.vocab, geometry.hidden),
        FINAL_NORM: (geometry.hidden,),
    }
    layout = checkpoint_layout(checkpoint)
    schemes = layout.schemes if layout else {}
    if EMBEDDING.replace(".weight", ".weight_scale") in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.folder} has a quantized {EMBEDDING}; tinier reads none."
        )
    if HEAD_LINEAR in schemes and geometry.tied_head:
        raise CheckpointError(f"{checkpoint.folder} has a head that is quantized and tied.")
    linears = {
        f"{layer_name(i)}.{name}": shape
        for i in range(geometry.layers)
        for name, shape in geometry.linears.items()
    }
    if not geometry.tied_head:
        linears[HEAD_LINEAR] = (geometry.vocab, geometry.hidden)
    for name, shape in linears.items():
        if name not in schemes:
            shapes[f"{name}.weight"] = shape
            continue
        stored = stored_shapes(schemes[name], shape)
        shapes.update({f"{name}.{part}": size for part, size in stored.items()})
    if geometry.router is not None:
        router = (geometry.experts, geometry.hidden)
        shapes |= {
            f"{layer_name(i)}.{geometry.router}.weight": router for i in range(geometry.layers)
        }
    for i in range(geometry.layers):
        for name, vector in (geometry.norms | geometry.biases).items():
            shapes[f"{layer_name(i)}.{name}"] = vector
        if layout and layout.kv_cache:
            shapes[f"{layer_name(i)}.self_attn.k_scale"] = (1,)
            shapes[f"{layer_name(i)}.self_attn.v_scale"] = (1,)
    return shapes
