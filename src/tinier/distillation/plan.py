"""What a distillation will do: every check that needs no weights, and its cost.

Start at `plan_distill`. In: student, teacher, a `DistillPlan` and text. Out: a StagePlan, and the
windows that it was made with.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tinier.calibration import check_attention_window
from tinier.checkpoint import Checkpoint, StagePlan, code_digest
from tinier.distillation.losses import Kind
from tinier.errors import InputError, SchemeError
from tinier.families import check_length, geometry_of
from tinier.quantization import QuantizePlan, plan_quantize
from tinier.text import (
    BUILTIN,
    Document,
    Text,
    documents_of,
    shortfall,
    tensor_sha256,
    token_windows,
)
from tinier.tokenizer import check_same_tokens, load_tokenizer

HELDOUT_WINDOWS = 8
# computed at once, in whole windows, unless the plan says how many
_TOKENS_AT_ONCE = {"cuda": 8192, "cpu": 2048}
# a trained parameter: float32 weights and gradients and Adam's two moments
_TRAINING_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillPlan:
    steps: int = 100
    """Optimizer steps."""
    batch: int = 64
    """Windows in one optimizer step (global batch, over all processes)."""
    micro_batch: int | None = None
    """Windows that one process computes at once; gradients accumulate up to `batch`. None: as many as
    have 8,192 tokens on a GPU, 2,048 on a CPU."""
    length: int = 512
    """Tokens in one window."""
    lr: float = 7e-5
    """Highest learning rate."""
    min_lr: float | None = None
    """Learning rate of the last step; cosine in between. None: 1e-5, or a seventh of `lr` where that is
    less."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from 0. None: 10, or a fifth of `steps` where that is less."""
    loss: Kind = "forward-kl"
    """Divergence from the teacher's distribution."""
    temperature: float = 1.0
    """Softens both distributions; 1 is the models' own."""
    ce_weight: float = 0.0
    """Share of cross-entropy with the text in the loss; 1: hard distillation alone."""
    hidden_weight: float = 0.0
    """Weight of the hidden states' loss, which is added."""
    hidden_loss: Literal["mse", "cosine"] = "mse"
    """Measured between layers that belong together, each divided by the teacher's power."""
    hidden_layers: tuple[tuple[int, int], ...] = ()
    """Pairs (student's layer, teacher's); empty: from the layers that pruning kept, or even steps."""
    train: Literal["all", "norms", "lora"] = "all"
    """All parameters, only norms (and scales of a quantized student), or low-rank updates of the
    linear layers that are merged at the end."""
    lora_rank: int = 16
    top_k: int | None = None
    """Store the teacher's k most likely tokens once, and train from them without the teacher."""
    generated: int = 0
    """Windows that the teacher writes, in addition to those of the text; each goes on from a piece of the
    text, where there is one."""
    quantize: QuantizePlan | None = None
    """Quantize the student first and train it on that grid."""
    checkpointing: Literal["none", "selective", "full"] | None = None
    """What is computed again in the backward pass: nothing, all but matrix products, or everything
    inside a decoder layer. None: nothing on a CPU; on a GPU selective, or full on a grid, where each
    rounding is many small operations and `selective` looks at every one of them in Python."""
    compile: bool = False
    """Compile the decoder layers (torch.compile): minutes of start, then faster steps on a GPU."""
    precision: Literal["auto", "float32"] = "auto"
    """`auto`: matrix products in bf16 where the device has it; weights and their update stay float32."""
    eval_every: int | None = None
    """Steps between two looks at the held-out text; None: five times in all."""
    seed: int = 0
    """Order of the training windows."""
    save_seconds: float = 300.0
    """Training state is saved about this often."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "length", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}. Use 1 or more.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                words = ", ".join(str(a) for a in allowed if a is not None)
                raise InputError(f"{name}={getattr(self, name)!r}. Use one of {words}.")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            divisors = [d for d in range(1, self.batch + 1) if self.batch % d == 0]
            raise InputError(
                f"micro_batch={self.micro_batch} does not divide batch={self.batch}. "
                f"Use one of {divisors}."
            )
        if not 0 <= self.lr < math.inf:
            raise InputError(f"lr={self.lr}. Use a number from 0 on, such as 7e-5.")
        if not 0 <= self.last_lr <= self.lr:
            raise InputError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}.")
        if self.warmup >= self.steps:
            raise InputError(
                f"warmup_steps={self.warmup_steps} leaves no step of {self.steps}. Use 0 to "
                f"{self.steps - 1}."
            )
        if self.warmup < 0:
            raise InputError(f"warmup_steps={self.warmup_steps}. Use 0 or more.")
        for name in ("seed", "hidden_weight", "generated"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}. Use 0 or more.")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature}. Use a number above 0, such as 1.")
        if not 0 <= self.ce_weight <= 1:
            raise InputError(f"ce_weight={self.ce_weight}. Use a share between 0 and 1.")
        if self.hidden_layers and not self.hidden_weight:
            raise InputError(
                "hidden_layers pairs layers for the loss of hidden states, and hidden_weight is 0. Use "
                "hidden_weight=1, or leave hidden_layers out."
            )
        if self.eval_every is not None and self.eval_every < 1:
            raise InputError(f"eval_every={self.eval_every}. Use 1 or more.")
        if self.top_k is not None:
            self._check_top_k(self.top_k)
        if self.quantize is not None and self.train == "lora":
            raise InputError(
                "train='lora' and quantize do not go together. Use train='all' or 'norms'."
            )

    def _check_top_k(self, top_k: int) -> None:
        if top_k < 1:
            raise InputError(f"top_k={top_k}. Use 1 or more, such as 64.")
        if self.loss != "forward-kl" or self.temperature != 1.0 or self.hidden_weight:
            raise InputError(
                "top_k stores probabilities at temperature 1 and no hidden states. Use it with "
                "loss='forward-kl', temperature=1 and hidden_weight=0."
            )

    def windows_at_once(self, share: int, device: torch.device) -> int:
        """The micro-batch of a process that has `share` windows of each batch; it divides them."""
        most = self.micro_batch or _TOKENS_AT_ONCE[device.type] // self.length
        return largest_divisor(share, most)

    def recomputes(self, device: torch.device) -> Literal["none", "selective", "full"]:
        """What the backward pass computes again on this device."""
        if self.checkpointing is not None:
            return self.checkpointing
        if device.type != "cuda":
            return "none"
        return "selective" if self.quantize is None else "full"

    @property
    def last_lr(self) -> float:
        """Learning rate of the last step."""
        return min(1e-5, self.lr / 7) if self.min_lr is None else self.min_lr

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return min(10, self.steps // 5) if self.warmup_steps is None else self.warmup_steps

    @property
    def evaluations(self) -> int:
        """Steps between two looks at the held-out text."""
        return self.eval_every or max(1, self.steps // 5)


_CHOICES: dict[str, tuple[object, ...]] = {
    "loss": ("forward-kl", "reverse-kl", "js"),
    "hidden_loss": ("mse", "cosine"),
    "train": ("all", "norms", "lora"),
    "checkpointing": ("none", "selective", "full", None),
    "precision": ("auto", "float32"),
}


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not over `most`; 1 at least."""
    return next(size for size in range(max(1, most), 0, -1) if number % size == 0)


def parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Pairs of layers from `5:7,11:15`. Raises InputError."""
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if match is None:
            raise InputError(f"hidden layers {text!r}: {part!r} is no pair. Use 5:7,11:15.")
        pairs.append((int(match[1]), int(match[2])))
    return tuple(pairs)


def learning_rate(plan: DistillPlan, step: int) -> float:
    """Learning rate of step 0, 1, …: linear warm-up, then cosine from `lr` to `min_lr`."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - 1 - plan.warmup)
    return plan.last_lr + (plan.lr - plan.last_lr) * 0.5 * (1 + math.cos(math.pi * done))


def plan_distill(
    student: Checkpoint,
    teacher: Checkpoint,
    plan: DistillPlan,
    text: Text = BUILTIN,
    heldout: Text = BUILTIN,
) -> StagePlan:
    """What `distill` would do, after every check that needs no weights.

    Raises SchemeError for a quantized model or a grid that does not fit, InputError for models of
    different vocabularies or layers that do not pair, TextError for a text shorter than one window.
    """
    documents, held = documents_of(text, "training"), documents_of(heldout, "heldout")
    return prepare(student, teacher, plan, documents, held)[0]


def prepare(
    student: Checkpoint,
    teacher: Checkpoint,
    plan: DistillPlan,
    documents: Sequence[Document],
    heldout: Sequence[Document],
) -> tuple[StagePlan, Tensor | None, Tensor]:
    """The stage, the text's training windows [n, length] (None: the teacher writes them all) and the
    held-out ones."""
    for role, checkpoint in (("student", student), ("teacher", teacher)):
        if "quantization_config" in checkpoint.config:
            raise SchemeError(
                f"the {role} {checkpoint.folder} is quantized. Distil first, then quantize the "
                "result; or train a 16-bit student on a grid: --quantize int4-gptq. If there is no 16-bit "
                f"model: tinier export {checkpoint.folder} --to 16bit --out DIR"
            )
    common = check_same_tokens(student, teacher)
    for checkpoint in (student, teacher):
        check_length(checkpoint, plan.length)
        check_attention_window(checkpoint, plan.length)
    pairs = layer_pairs(student, teacher, plan) if plan.hidden_weight else ()
    tokenizer = load_tokenizer(student, common)
    if plan.top_k is not None and plan.top_k > common:
        raise InputError(
            f"top_k={plan.top_k} is more than the {common} tokens that the models know. Use 1 to {common}."
        )
    if not documents and not plan.generated:
        raise InputError(
            "there is no text to train on. Give --text, or --generated N: windows that the teacher writes."
        )
    training = None
    if documents:
        needed = plan.steps * plan.batch
        training = token_windows(tokenizer, documents, length=plan.length, count=needed)
    held = token_windows(tokenizer, heldout, length=plan.length, count=HELDOUT_WINDOWS)
    warnings = [f"held-out text: {warning}" for warning in shortfall(held, HELDOUT_WINDOWS)]
    total = plan.generated + (0 if training is None else len(training))
    if total < plan.steps * plan.batch:
        warnings.append(
            f"the training text gives {total} windows of {plan.length} tokens for {plan.steps} steps of "
            f"{plan.batch}: each is seen {plan.steps * plan.batch / total:.1f} times"
        )
    parameters: dict[str, Any] = {k: v for k, v in asdict(plan).items() if k != "save_seconds"}
    parameters |= {
        "training_windows": total,
        "training_sha256": None if training is None else tensor_sha256(training),
        "heldout_sha256": tensor_sha256(held),
        "hidden_layers": [list(pair) for pair in pairs],
    }
    quantized = None
    if plan.quantize is not None:
        quantized = plan_quantize(student, plan.quantize, documents)
        parameters["quantize"] = quantized.parameters
    geometry = geometry_of(student)
    stage = StagePlan(
        stage="distill",
        parameters=parameters,
        inputs={"source": student, "teacher": teacher},
        output_config=quantized.output_config if quantized else student.config,
        output_bytes=quantized.output_bytes if quantized else student.disk_bytes,
        memory_bytes=geometry.parameters * _TRAINING_BYTES + teacher.weight_bytes,
        flops=training_flops(student, teacher) * plan.steps * plan.batch * plan.length,
        code=code_digest("tinier.distillation.driver"),
        warnings=(*warnings, *(quantized.warnings if quantized else ())),
    )
    return stage, training, held


def training_flops(student: Checkpoint, teacher: Checkpoint) -> float:
    """Arithmetic of one token: 6 FLOP a parameter for the student, 2 for the teacher; attention's
    scores and what checkpointing computes again are left out."""
    return (
        6.0 * geometry_of(student).active_parameters + 2.0 * geometry_of(teacher).active_parameters
    )


def layer_pairs(
    student: Checkpoint, teacher: Checkpoint, plan: DistillPlan
) -> tuple[tuple[int, int], ...]:
    """Which layers' outputs are compared: (student's, teacher's), counted from 0.

    Raises InputError for layers that do not exist and for models of different width.
    """
    own, original = geometry_of(student), geometry_of(teacher)
    if own.hidden != original.hidden:
        raise InputError(
            f"hidden states of width {own.hidden} and {original.hidden} cannot be compared. "
            "Use hidden_weight=0 with a student that is pruned in its hidden size."
        )
    if plan.hidden_layers:
        for mine, theirs in plan.hidden_layers:
            if not (0 <= mine < own.layers and 0 <= theirs < original.layers):
                raise InputError(
                    f"layers {mine}:{theirs} do not exist: the student has 0 to {own.layers - 1}, "
                    f"the teacher 0 to {original.layers - 1}."
                )
        return tuple(sorted(plan.hidden_layers))
    dropped = student.manifest.measures.get("dropped_layers") if student.manifest else None
    if dropped and len(dropped) + own.layers == original.layers:
        kept = [i for i in range(original.layers) if i not in dropped]
        return tuple(enumerate(kept))
    ratio = original.layers / own.layers
    return tuple((i, round((i + 1) * ratio) - 1) for i in range(own.layers))
