"""The student as it is trained: which parameters move, how a forward pass runs, what is written.

Start at `load_student`. Low-rank updates and fake quantization are torch parametrizations of the
linear layers' weights, so the modules stay transformers' own.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from tinier.calibration import KeysAndValues, cache_keyword, load_whole, turns
from tinier.checkpoint import Checkpoint, TensorReader, pack_linear, unpack_linear
from tinier.distillation.losses import RowsLoss, chunked_loss, hidden_loss
from tinier.distillation.plan import DistillPlan
from tinier.families import (
    EMBEDDING_MODULE,
    HEAD_LINEAR,
    checkpoint_layout,
    geometry_of,
    layer_name,
)
from tinier.numerics import dequantize
from tinier.quantization import FakeWeight, fake_cache, fake_inputs, read_targets, trainable_weight
from tinier.schemes import Grid, Scheme

_ORIGINAL = "parametrizations.weight.original"
_FIRST = "parametrizations.weight.0"
# results of these are kept for the backward pass; the rest of a layer is cheap to compute again
_KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


class LowRank(nn.Module):
    """weight + up · down; a torch parametrization. LoRA, arXiv 2106.09685, with alpha = 2 · rank."""

    def __init__(self, shape: torch.Size, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, shape[1], device=device))
        self.up = nn.Parameter(torch.zeros(shape[0], rank, device=device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return merged(weight, self.up, self.down)


def merged(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """weight [out, in] with its update, in the update's type."""
    return weight + 2.0 * (up @ down)


class Grids(NamedTuple):
    """Where a quantized student came from."""

    checkpoint: Checkpoint
    """The student after post-training quantization"""
    schemes: dict[str, Scheme]
    """Of the linear layers inside decoder layers, by full name"""
    input_scales: dict[str, Tensor | None]
    kept: frozenset[str]
    """Embedding and head, where they are quantized: they keep their codes while the layers are trained"""


class Student(nn.Module):
    """Student and loss in one module, so that sharding wraps the whole forward pass."""

    def __init__(self, model: nn.Module, plan: DistillPlan, dtype: torch.dtype, mode: str) -> None:
        super().__init__()
        self.model = model
        self._plan, self._dtype, self._mode = plan, dtype, mode

    def forward(
        self,
        windows: Tensor,
        loss: RowsLoss,
        layers: tuple[int, ...] = (),
        teacher_states: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """windows: [n, length]. layers: whose outputs are compared with `teacher_states`."""
        device = windows.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            hidden, states = hidden_states(self.model, windows, self._dtype, layers, self._mode)
        flat = hidden.flatten(0, 1).to(self._dtype)
        value = chunked_loss(flat, self.model.lm_head.weight, loss)  # type: ignore[arg-type,union-attr]
        if teacher_states:
            apart = hidden_loss(states, list(teacher_states), self._plan.hidden_loss)
            value = value + self._plan.hidden_weight * apart
        return value


def hidden_states(
    model: Any,
    windows: Tensor,
    dtype: torch.dtype,
    layers: tuple[int, ...] = (),
    mode: str = "none",
) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states [n, length, hidden] after the norm, divided as the logits are, and the outputs
    of `layers`.

    mode: what the backward pass computes again, as in DistillPlan.checkpointing.
    """
    base = model.model
    # Granite's two numbers at the ends, which are 1 elsewhere
    times = getattr(model.config, "embedding_multiplier", 1.0)
    divisor = getattr(model.config, "logits_scaling", 1.0)
    hidden = base.embed_tokens(windows).to(dtype)
    hidden = hidden if times == 1 else hidden * times
    at = torch.arange(windows.shape[1], device=windows.device)[None]
    turned = turns(base.rotary_emb, hidden, at, model.config)
    kept = []
    for index, layer in enumerate(base.layers):
        key = model.config.layer_types[index] if "" not in turned else ""
        run = partial(layer, position_embeddings=turned[key])
        if mode == "none" or not torch.is_grad_enabled():
            hidden = run(hidden)
        else:
            contexts = _selective if mode == "selective" else noop_context_fn
            hidden = checkpoint(run, hidden, use_reentrant=False, context_fn=contexts)
        if index in layers:
            kept.append(hidden)
    normed = base.norm(hidden)
    return normed if divisor == 1 else normed / divisor, kept


def _selective() -> Any:
    def policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        keep = op in _KEPT_OPS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def load_model(source: Checkpoint, plan: DistillPlan, device: torch.device) -> Any:
    """transformers' model in the type of the checkpoint (or float32, if all is to be), with nothing
    to train."""
    dtype = torch.float32 if plan.precision == "float32" else source.dtype
    return load_whole(source, dtype, device)


def load_student(
    source: Checkpoint, plan: DistillPlan, device: torch.device, quantized: Checkpoint | None,
    targets: Path,
) -> tuple[Any, Grids | None]:  # fmt: skip
    """The model with its trained parameters in float32; with `quantized`, rounded to that one's grid.

    targets: where `quantize` kept the weights that the codes stand for.
    """
    model = load_model(source, plan, device)
    grids = _install_grids(model, quantized, targets, device) if quantized else None
    if plan.train == "lora":
        for index in range(geometry_of(source).layers):
            for name in geometry_of(source).linears:
                linear = model.get_submodule(f"{layer_name(index)}.{name}")
                update = LowRank(linear.weight.shape, plan.lora_rank, device)
                parametrize.register_parametrization(linear, "weight", update, unsafe=True)
    for name, parameter in model.named_parameters():
        if _is_trained(name, plan):
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
    return model, grids


def _is_trained(name: str, plan: DistillPlan) -> bool:
    if plan.train == "lora":
        return name.endswith((f"{_FIRST}.up", f"{_FIRST}.down"))
    is_norm = name.endswith("norm.weight") or name.endswith(f"{_FIRST}.stretch")
    if plan.train == "norms" or is_norm:
        return is_norm
    # on a grid the embeddings and the head stay the teacher's (QAD trains what was rounded)
    return plan.quantize is None or ".layers." in name


def _install_grids(model: Any, quantized: Checkpoint, targets: Path, device: torch.device) -> Grids:
    """Give the linear layers the weights and grids of a quantized checkpoint, to be trained on; head and
    cache compute as they will when it is served."""
    layout = checkpoint_layout(quantized)
    assert layout is not None
    ends = layout.schemes.keys() & {EMBEDDING_MODULE, HEAD_LINEAR}
    schemes = {name: s for name, s in layout.schemes.items() if name not in ends}
    input_scales: dict[str, Tensor | None] = {}
    parameters = dict(model.named_parameters())
    with quantized.reader(device) as read:
        for name in parameters.keys() & quantized.tensors.keys():
            # norms and biases, which equalization may have changed
            if name.removesuffix(".weight") not in ends:
                parameters[name].data = read(name).to(parameters[name].dtype)
        for name in ends:
            _install_end(model, quantized, read, name, layout.schemes[name])
        for index in range(geometry_of(quantized).layers):
            prefix = layer_name(index)
            here = {n: s for n, s in schemes.items() if n.startswith(f"{prefix}.")}
            kept = read_targets(targets, index) if here else {}
            for name, scheme in here.items():
                codes, input_scale = unpack_linear(quantized.optional(read), name, scheme)
                linear = model.get_submodule(name)
                target = kept[name.removeprefix(f"{prefix}.")].to(device)
                linear.weight.data = trainable_weight(target, codes, scheme.weights)
                fake = FakeWeight(codes, scheme.weights)
                parametrize.register_parametrization(linear, "weight", fake, unsafe=True)
                input_scales[name] = input_scale
                if scheme.activations is not None:
                    linear.register_forward_pre_hook(_rounding(scheme, input_scale))
            if layout.kv_cache is not None:
                attention = model.get_submodule(f"{prefix}.self_attn")
                scales = tuple(read(f"{prefix}.self_attn.{n}_scale") for n in "kv")
                attention.register_forward_pre_hook(
                    _rounded_cache(layout.kv_cache, scales, cache_keyword(attention)),
                    with_kwargs=True,
                )
    return Grids(quantized, schemes, input_scales, frozenset(ends))


def _install_end(
    model: Any, quantized: Checkpoint, read: TensorReader, name: str, scheme: Scheme
) -> None:
    """The embedding or the head that codes stand for, apart from the other unless they are tied, and the
    head's inputs rounded."""
    tied, input_scale = geometry_of(quantized).tied_head, None
    if name == EMBEDDING_MODULE or not tied:
        codes, input_scale = unpack_linear(quantized.optional(read), name, scheme)
        module = model.get_submodule(name)
        weight = dequantize(codes, module.weight.dtype).to(module.weight.device)
        module.weight = nn.Parameter(weight, requires_grad=False)
        if tied:
            model.lm_head.weight = module.weight
        else:
            model.config.tie_word_embeddings = False
    activations = scheme.activations
    if activations is not None:
        # the loss multiplies the head itself, so what it reads is rounded where the final norm ends
        model.model.norm.register_forward_hook(
            lambda _, __, output: fake_inputs(output, activations, input_scale)
        )


def _rounded_cache(grid: Grid, scales: tuple[Tensor, ...], keyword: str) -> Callable[..., Any]:
    """A hook that gives attention a cache, by its name there, which rounds keys and values."""

    def rounding(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return fake_cache(keys, grid, scales[0]), fake_cache(values, grid, scales[1])

    def hook(_: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        return inputs, named | {keyword: KeysAndValues(rounding)}

    return hook


def _rounding(scheme: Scheme, input_scale: Tensor | None) -> Callable[..., tuple[Tensor]]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        assert scheme.activations is not None
        return (fake_inputs(inputs[0], scheme.activations, input_scale),)

    return hook


def export(
    source: Checkpoint, model: Any, grids: Grids | None, state: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the checkpoint to write, by name: the student's, in its types; never the teacher's.

    state: the whole parameters of `model` by name; empty: as they were before training.
    """
    origin = grids.checkpoint if grids else source
    written: set[str] = set()
    with origin.reader() as read:
        for name in origin.tensors:
            linear = name.rpartition(".")[0]
            if grids and linear in grids.kept:
                yield name, read(name)
                continue
            if state and grids and linear in grids.schemes and not name.endswith(".bias"):
                if linear not in written:
                    written.add(linear)
                    yield from _quantized_tensors(linear, model, grids, state)
                continue
            stored = read(name)
            trained = _trained(name, state)
            # older checkpoints carry buffers that the model no longer has; a tied head that is
            # stored all the same shares memory, which safetensors does not write
            yield name, stored if trained is None else trained.to(stored.dtype, copy=True)


def _quantized_tensors(
    linear: str, model: Any, grids: Grids, state: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    fake = model.get_submodule(linear).parametrizations.weight[0]
    codes = fake.harden(state[f"{linear}.{_ORIGINAL}"], state.get(f"{linear}.{_FIRST}.stretch"))
    parts = pack_linear(codes, grids.schemes[linear], grids.input_scales[linear])
    for part, tensor in parts.items():
        yield f"{linear}.{part}", tensor


def _trained(name: str, state: dict[str, Tensor]) -> Tensor | None:
    """The value of a stored tensor after training; None for what the model does not have."""
    linear = name.removesuffix(".weight")
    if f"{linear}.{_FIRST}.up" in state:
        up, down = state[f"{linear}.{_FIRST}.up"], state[f"{linear}.{_FIRST}.down"]
        return merged(state[f"{linear}.{_ORIGINAL}"], up, down)
    if name == f"{HEAD_LINEAR}.weight" and name not in state:
        return state.get("model.embed_tokens.weight")
    return state.get(name)
