"""Which decoder architectures tinier knows, and where each keeps its tensors.

Start at `open_model`: it resolves a model, verifies its folder and checks every tensor's shape
against the configuration. A new architecture that is a dense pre-norm decoder with RoPE, grouped
query attention and SwiGLU is one more row in FAMILIES.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import CONFIG_MAPPING

from tinier.checkpoint import Checkpoint, layout_of, open_checkpoint, resolve, stored_shapes
from tinier.errors import CheckpointError, InputError
from tinier.schemes import Layout

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
HEAD_LINEAR = "lm_head"

# linear layers that read the same input, and what stands before that input: where a factor for each
# of its channels can be folded into. A norm's weight, or the rows of a linear layer
INPUT_GROUPS: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    architecture: str
    """Class name in config.json's `architectures`."""
    qkv_bias: bool | Literal["config"]
    """Whether q, k and v have a bias; `config`: as `attention_bias` says, and then o has one too."""
    mlp_bias: bool | Literal["config"]
    qk_norm: bool
    """RMSNorm over each head of q and k before RoPE."""
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
            qk_norm=False,
            hidden_in_heads=True,
        ),
        Family(architecture="MistralForCausalLM", qkv_bias=False, mlp_bias=False, qk_norm=False),
        Family(architecture="Qwen2ForCausalLM", qkv_bias=True, mlp_bias=False, qk_norm=False),
        Family(architecture="Qwen3ForCausalLM", qkv_bias="config", mlp_bias=False, qk_norm=True),
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
    vocab: int
    max_positions: int
    norm_eps: float
    tied_head: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hidden_in_heads: bool
    windows: tuple[int | None, ...]
    """For each layer how many tokens back attention sees; None: all."""

    @property
    def cached_numbers(self) -> int:
        """Numbers that the cache holds for a token: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of a layer's linear layers, by their name inside the layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def norms(self) -> dict[str, tuple[int]]:
        """Shapes of a layer's norm weights, by their name inside the layer."""
        norms = {
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }
        if self.qk_norm:
            norms["self_attn.q_norm.weight"] = (self.head_dim,)
            norms["self_attn.k_norm.weight"] = (self.head_dim,)
        return norms

    @property
    def biases(self) -> dict[str, tuple[int]]:
        """Shapes of a layer's biases, by their name inside the layer."""
        biased = []
        if self.qkv_bias:
            biased += ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        if self.out_bias:
            biased += ["self_attn.o_proj"]
        if self.mlp_bias:
            biased += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        return {f"{name}.bias": (self.linears[name][0],) for name in biased}

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        linear = sum(rows * columns for rows, columns in self.linears.values())
        return linear + sum(n for (n,) in (self.norms | self.biases).values())

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_head else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden


def layer_name(index: int) -> str:
    """Prefix of a decoder layer's tensors."""
    return f"model.layers.{index}"


def linear_names(geometry: Geometry) -> list[str]:
    """Every linear layer of the model by its full name, the head last."""
    layers = [f"{layer_name(i)}.{n}" for i in range(geometry.layers) for n in geometry.linears]
    return [*layers, HEAD_LINEAR]


def checkpoint_layout(checkpoint: Checkpoint) -> Layout | None:
    """How the checkpoint is quantized; None if it is not. Raises CheckpointError."""
    return layout_of(checkpoint.config, linear_names(geometry_of(checkpoint)))


def open_model(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Resolve, verify and shape-check a model of a known family; loads no weights.

    model: folder, Hub id, .gguf file or built-in name. Raises CheckpointError or NetworkError.
    """
    checkpoint = open_checkpoint(resolve(str(model), revision))
    _check_tensors(checkpoint, geometry_of(checkpoint))
    return checkpoint


def check_length(checkpoint: Checkpoint, length: int) -> None:
    """Raise InputError for sequences longer than the model has positions for."""
    positions = geometry_of(checkpoint).max_positions
    if length > positions:
        raise InputError(
            f"{length} tokens are more than the {positions} positions of {checkpoint.folder.name}. "
            f"Use at most {positions}."
        )


def check_same_vocabulary(one: Checkpoint, other: Checkpoint) -> None:
    """Raise InputError unless both models predict over the same number of tokens."""
    sizes = geometry_of(one).vocab, geometry_of(other).vocab
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{one.folder.name} and {other.folder.name} have vocabularies of {sizes[0]} and "
            f"{sizes[1]} tokens, and are compared token by token. Use models of the same family."
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
        return CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(dict(checkpoint.config))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        path = checkpoint.folder / "config.json"
        raise CheckpointError(f"transformers rejects {path}: {error!r}") from None


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """Sizes of a checkpoint's decoder. Raises CheckpointError for what tinier cannot run."""
    family = family_of(checkpoint)
    config = hf_config(checkpoint)
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise CheckpointError(
            f"{checkpoint.folder} uses RoPE of type {rope_type!r}; known: {', '.join(_ROPE_TYPES)}."
        )
    if config.hidden_act != "silu":
        raise CheckpointError(f"{checkpoint.folder} uses {config.hidden_act!r}, not SwiGLU.")
    bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    return Geometry(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied_head=bool(config.tie_word_embeddings),
        qkv_bias=bias if family.qkv_bias == "config" else family.qkv_bias,
        out_bias=bias if family.qkv_bias == "config" else False,
        mlp_bias=mlp_bias if family.mlp_bias == "config" else family.mlp_bias,
        qk_norm=family.qk_norm,
        hidden_in_heads=family.hidden_in_heads,
        windows=_windows(config),
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral: one window for all layers
        return (window,) * int(config.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _check_tensors(checkpoint: Checkpoint, geometry: Geometry) -> None:
    """Raise CheckpointError unless every tensor is there, with the shape that config.json implies."""
    expected = _expected_shapes(checkpoint, geometry)
    checkpoint.require(expected)
    for name, shape in expected.items():
        stored = checkpoint.tensors[name].shape
        if stored != shape:
            raise CheckpointError(
                f"{name} in {checkpoint.folder} has shape {list(stored)}; config.json implies "
                f"{list(shape)}. The weights and the configuration are not of one model."
            )


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
    for i in range(geometry.layers):
        for name, vector in (geometry.norms | geometry.biases).items():
            shapes[f"{layer_name(i)}.{name}"] = vector
        if layout and layout.kv_cache:
            shapes[f"{layer_name(i)}.self_attn.k_scale"] = (1,)
            shapes[f"{layer_name(i)}.self_attn.v_scale"] = (1,)
    return shapes
