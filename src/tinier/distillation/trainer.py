"""Distil a student against a teacher: two folders in, a folder out.

Start at `distill`. The loop is Accelerate's: mixed precision, gradient accumulation to the global
batch, state saved while it trains, so that a killed run goes on from its last saved step and ends
with the weights of an uninterrupted one.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tinier.checkpoint import (
    Checkpoint,
    StagePlan,
    TensorWriter,
    atomic_folder,
    check_disk,
    check_output,
    code_digest,
    copy_side_files,
    open_checkpoint,
    write_config,
)
from tinier.device import pick_device, reset_peak_memory
from tinier.distillation.losses import forward_kl
from tinier.errors import InputError, MeasuredFailure, OutputError, SchemeError
from tinier.families import check_length, check_same_vocabulary, geometry_of
from tinier.progress import bar, say
from tinier.text import load_tokenizer, tensor_sha256, token_windows

CODE = code_digest("checkpoint", "families", "text", "distillation")
_HELDOUT_WINDOWS = 8
# a parameter: float32 weights and gradients and Adam's two moments
_TRAINING_BYTES = 16
_STATE_BYTES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillPlan:
    steps: int = 100
    """Optimizer steps."""
    batch: int = 64
    """Windows in one optimizer step (global batch)."""
    micro_batch: int = 4
    """Windows computed at once; gradients accumulate up to `batch`."""
    length: int = 512
    """Tokens in one window."""
    lr: float = 7e-5
    """Highest learning rate."""
    min_lr: float = 1e-5
    """Learning rate of the last step; cosine in between."""
    warmup_steps: int = 10
    """Steps of linear warm-up from 0."""
    temperature: float = 1.0
    """Softens both distributions; 1 is the models' own."""
    seed: int = 0
    """Order of the training windows."""
    save_seconds: float = 300.0
    """Training state is saved about this often."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}. Use 1 or more.")
        if self.batch % self.micro_batch:
            divisors = [d for d in range(1, self.batch + 1) if self.batch % d == 0]
            raise InputError(
                f"micro_batch={self.micro_batch} does not divide batch={self.batch}. "
                f"Use one of {divisors}."
            )
        if not 0 <= self.min_lr <= self.lr:
            raise InputError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}.")
        if self.warmup_steps >= self.steps:
            raise InputError(
                f"warmup_steps={self.warmup_steps} leaves no step of {self.steps}. Use fewer."
            )
        if self.seed < 0:
            raise InputError(f"seed={self.seed}. Use 0 or more.")
        if self.temperature <= 0:
            raise InputError(f"temperature={self.temperature}. Use more than 0.")


def learning_rate(plan: DistillPlan, step: int) -> float:
    """Learning rate of step 0, 1, …: linear warm-up, then cosine from `lr` to `min_lr`."""
    if step < plan.warmup_steps:
        return plan.lr * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - 1 - plan.warmup_steps)
    return plan.min_lr + (plan.lr - plan.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def plan_distill(
    student: Checkpoint,
    teacher: Checkpoint,
    plan: DistillPlan,
    documents: Sequence[str],
    heldout: Sequence[str],
) -> StagePlan:
    """What `distill` would do, after every check that needs no weights.

    Raises SchemeError for a quantized model, InputError for models of different vocabularies,
    TextError for a text shorter than one window.
    """
    for role, checkpoint in (("student", student), ("teacher", teacher)):
        if "quantization_config" in checkpoint.config:
            raise SchemeError(
                f"the {role} {checkpoint.folder} is quantized. Distil first, then quantize the result."
            )
    check_same_vocabulary(student, teacher)
    for checkpoint in (student, teacher):
        check_length(checkpoint, plan.length)
    training, held = _windows(student, plan, documents, heldout)
    parameters = {k: v for k, v in asdict(plan).items() if k != "save_seconds"}
    parameters |= {
        "training_windows": len(training),
        "training_sha256": tensor_sha256(training),
        "heldout_sha256": tensor_sha256(held),
    }
    return StagePlan(
        stage="distill",
        parameters=parameters,
        inputs={"source": student, "teacher": teacher},
        output_config=student.config,
        output_bytes=student.disk_bytes,
        memory_bytes=geometry_of(student).parameters * _TRAINING_BYTES + teacher.weight_bytes,
        flops=_training_flops(student, teacher, plan),
        code=CODE,
    )


def distill(
    student: Checkpoint,
    teacher: Checkpoint,
    plan: DistillPlan,
    out: Path,
    *,
    documents: Sequence[str],
    heldout: Sequence[str],
    device: str = "auto",
) -> Checkpoint:
    """Train `student` towards `teacher` on `documents`, write it to the new folder `out`.

    heldout: text of which a few windows tell the divergence before and after, in the manifest.
    Raises InputError, SchemeError, TextError or OutputError before any work, and MeasuredFailure
    when the loss is no longer a number.
    """
    started = time.monotonic()
    check_output(out)
    stage = plan_distill(student, teacher, plan, documents, heldout)
    training, held = _windows(student, plan, documents, heldout)
    place = pick_device(device)
    reset_peak_memory(place)
    run = _Training(student, teacher, plan, place, out.parent / f".{out.name}.training", stage.key)
    before = run.divergence(held)
    losses = run.train(training)
    after = run.divergence(held)
    if not after < before:
        run.warnings.append(f"held-out KL rose from {before} to {after}")
    with atomic_folder(out, needed_bytes=student.disk_bytes) as partial:
        run.write_weights(partial)
        write_config(partial, stage.output_config)
        copy_side_files(student, partial)
        stage.manifest(
            started=started,
            device=place,
            measures={"loss": losses, "heldout_kl_before": before, "heldout_kl_after": after},
            warnings=run.warnings,
        ).write(partial)
    run.forget()
    return open_checkpoint(out)


def _training_flops(student: Checkpoint, teacher: Checkpoint, plan: DistillPlan) -> float:
    """Arithmetic of the whole run: 6 FLOP a parameter and token for the student, 2 for the teacher."""
    tokens = plan.steps * plan.batch * plan.length
    per_token = 6 * geometry_of(student).parameters + 2 * geometry_of(teacher).parameters
    return float(per_token * tokens)


class _Student(nn.Module):
    """Student and loss in one module, so that Accelerate wraps the whole forward pass."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, windows: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=windows, use_cache=False).last_hidden_state  # type: ignore[operator]
        return forward_kl(
            hidden.flatten(0, 1),
            self.model.lm_head.weight,  # type: ignore[arg-type, union-attr]
            teacher_hidden.flatten(0, 1),
            teacher_head,
            temperature=self.temperature,
        )


class _Training:
    """Models, optimizer and saved state of one run."""

    def __init__(
        self,
        student: Checkpoint,
        teacher: Checkpoint,
        plan: DistillPlan,
        device: torch.device,
        work: Path,
        key: str,
    ) -> None:
        self._plan = plan
        self._work = work
        self._key = key
        self._source = student
        self.warnings: list[str] = []
        set_seed(plan.seed)
        # Accelerate keeps one device and precision a process; those of an earlier run must not decide
        AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(
            mixed_precision="bf16" if _has_bf16(device) else "no",
            gradient_accumulation_steps=plan.batch // plan.micro_batch,
            cpu=device.type == "cpu",
        )
        self._teacher = _load(teacher, teacher.dtype).to(device).eval().requires_grad_(False)
        model = _load(student, torch.float32)
        if device.type == "cuda":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        module = _Student(model.train(), plan.temperature)
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._module, self._optimizer = self._accelerator.prepare(module, optimizer)

    @torch.no_grad()
    def divergence(self, windows: Tensor) -> float:
        """Mean KL per token over a few windows, in nats at temperature 1 · temperature²."""
        losses = [self._loss(batch).item() for batch in windows.split(1)]
        return round(sum(losses) / len(losses), 6)

    def train(self, windows: Tensor) -> list[float]:
        """Run the remaining steps; returns the loss of every step."""
        plan = self._plan
        losses = self._resume()
        saved_at = time.monotonic()
        with bar("distil", plan.steps) as advance:
            advance(len(losses))
            for step in range(len(losses), plan.steps):
                losses.append(self._step(step, windows[_batch_indices(len(windows), step, plan)]))
                advance(1)
                if time.monotonic() - saved_at > plan.save_seconds and step + 1 < plan.steps:
                    self._save(losses)
                    saved_at = time.monotonic()
        return losses

    def write_weights(self, folder: Path) -> None:
        """Write the student in its source's types and names: a plain checkpoint, never the teacher."""
        state = self._accelerator.unwrap_model(self._module).model.state_dict()
        writer = TensorWriter(folder)
        with self._source.reader() as read:
            for name in self._source.tensors:
                stored = read(name)
                # older checkpoints carry buffers that the model no longer has; a tied head that is
                # stored all the same shares memory, which safetensors does not write
                trained = state[name].to(stored.dtype, copy=True) if name in state else stored
                writer.add(name, trained)
        writer.close()

    def forget(self) -> None:
        """Remove the saved state of a finished run."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _loss(self, batch: Tensor) -> Tensor:
        batch = batch.to(self._accelerator.device)
        with torch.no_grad():
            hidden = self._teacher.model(input_ids=batch, use_cache=False).last_hidden_state
        loss: Tensor = self._module(batch, hidden, self._teacher.lm_head.weight)
        return loss

    def _step(self, step: int, batch: Tensor) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._plan, step)
        total = 0.0
        for micro in batch.split(self._plan.micro_batch):
            with self._accelerator.accumulate(self._module):
                loss = self._loss(micro)
                self._accelerator.backward(loss)
                if self._accelerator.sync_gradients:
                    self._accelerator.clip_grad_norm_(self._module.parameters(), 1.0)
                self._optimizer.step()
                self._optimizer.zero_grad()
            total += loss.item() * len(micro) / len(batch)
        if not math.isfinite(total):
            raise MeasuredFailure(
                f"the loss is {total} at step {step + 1} of {self._plan.steps}. Lower the learning "
                f"rate (--lr {self._plan.lr / 3:.1e}) or lengthen the warm-up."
            )
        return round(total, 6)

    def _save(self, losses: list[float]) -> None:
        """Save the state beside `out`; the older state goes when the newer one is whole.

        A disk without room is a warning, in the manifest too: the training itself is well.
        """
        fresh = self._work / "unfinished"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            check_disk(fresh, geometry_of(self._source).parameters * _STATE_BYTES)
            fresh.mkdir(parents=True)
            self._accelerator.save_state(str(fresh))
            progress = {"key": self._key, "losses": losses}
            (fresh / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        except (
            OSError,
            RuntimeError,
            OutputError,
        ) as error:  # torch: a full disk is a RuntimeError
            shutil.rmtree(fresh, ignore_errors=True)
            self.warnings.append(f"training state not saved after step {len(losses)}: {error}")
            say(f"warning: {self.warnings[-1]}")
            return
        older = list(self._work.glob("step-*"))
        fresh.rename(self._work / f"step-{len(losses):06d}")
        for path in older:
            shutil.rmtree(path)

    def _resume(self) -> list[float]:
        """Load the latest saved state of the same run, if there is one; returns the losses so far."""
        for state in sorted(self._work.glob("step-*"), reverse=True):
            path = state / "progress.json"
            progress = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if progress.get("key") == self._key:
                self._accelerator.load_state(str(state))
                losses: list[float] = progress["losses"]
                say(f"distil: goes on after step {len(losses)} of {self._plan.steps}")
                return losses
        return []


def _windows(
    student: Checkpoint, plan: DistillPlan, documents: Sequence[str], heldout: Sequence[str]
) -> tuple[Tensor, Tensor]:
    tokenizer = load_tokenizer(student)
    needed = plan.steps * plan.batch
    return (
        token_windows(tokenizer, documents, length=plan.length, count=needed),
        token_windows(tokenizer, heldout, length=plan.length, count=_HELDOUT_WINDOWS),
    )


def _batch_indices(num_windows: int, step: int, plan: DistillPlan) -> Tensor:
    """Windows of one step: each pass over the text is a new order, decided by the seed alone."""
    wanted = range(step * plan.batch, (step + 1) * plan.batch)
    orders = {
        epoch: torch.randperm(
            num_windows, generator=torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
        )
        for epoch in {position // num_windows for position in wanted}
    }
    return torch.stack([orders[p // num_windows][p % num_windows] for p in wanted])


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=dtype, local_files_only=True, trust_remote_code=False
    )


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
