"""The training loop: optimizer steps, held-out measurements, saved state.

Start at `Trainer.train`. Accelerate joins the processes, shards the model over them (FSDP2) and
clips. The state is saved whole, in safetensors, so any number of processes can go on from it, and nothing
is unpickled. A step's windows are decided by the seed and the step's number alone, so a run that was killed
ends with the weights of one that was not.
"""

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tinier.checkpoint import TensorWriter, check_disk, new_file, sync_folder, write_atomically
from tinier.device import release_memory
from tinier.distillation.losses import IGNORED, Hard, Mixed, RowsLoss
from tinier.distillation.plan import DistillPlan, largest_divisor, learning_rate
from tinier.distillation.student import Student
from tinier.distillation.teacher import Teacher
from tinier.engine import Decoder
from tinier.errors import MeasuredFailure, OutputError
from tinier.progress import bar, say
from tinier.ranks import Ranks

_STATE_BYTES = 12
_VALUE, _MOMENTS = "value", ("exp_avg", "exp_avg_sq")
_CHUNK_TOKENS = 512
# a sharded student's parameters stay gathered within a step if they are no more than this of a GPU's memory
_KEPT_SHARE = 1 / 6
# a held-out loss that rose by as much as it was, and by this many nats at least, is no noise
_DIVERGED = 1.0


class Scalars:
    """TensorBoard's scalars, where a folder was asked for."""

    def __init__(self, folder: Path | None, resumed_at: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=resumed_at)

    def add(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()


class Trainer:
    """Student, optimizer and saved state of one run."""

    def __init__(
        self,
        model: Any,
        teacher: Teacher,
        plan: DistillPlan,
        windows: dict[str, Tensor],
        layers: tuple[int, ...],
        export: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        work: Path,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        """model: transformers' student, trained parameters chosen. windows: `training` and `heldout`,
        [n, length]. layers: the student's whose outputs are compared. export: the tensors of a
        checkpoint from the model's parameters. work: folder for the state of this run alone."""
        self._plan, self._teacher, self._windows = plan, teacher, windows
        self._layers, self._export, self._work, self._ranks = layers, export, work, ranks
        self.warnings: list[str] = []
        self.losses: list[float] = []
        self.heldout: dict[int, float] = {}
        """Held-out KL by steps done."""
        self.tokens_per_s: list[float] = []
        self.micro_batch = plan.windows_at_once(plan.batch // ranks.size, device)
        layer_class = type(model.model.layers[0]).__name__
        self._accelerator = _accelerator(device, ranks, layer_class)
        dtype = training_dtype(plan, device)
        if plan.compile:
            # a parametrized linear is its own class, so every layer of a student on a grid is compiled
            # for itself; past the limit torch would leave the rest uncompiled
            dynamo_config.recompile_limit = max(
                dynamo_config.recompile_limit, 2 * len(model.model.layers)
            )
            for layer in model.model.layers:
                layer.compile()
        student = Student(model.train(), plan, dtype, plan.recomputes(device))
        self._stays_whole = _fits_whole(student, device)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=ranks.size == 1
        )
        self._student, self._optimizer = self._accelerator.prepare(student, optimizer)
        self._device = device

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean held-out KL from the teacher, per token in nats, at temperature 1."""
        windows = self._windows["heldout"]
        total = 0.0
        # every process computes all of them: the figure is the same on each, whatever their number
        for rows in torch.arange(len(windows)).split(self.micro_batch):
            batch = windows[rows].to(self._device)
            loss, _ = self._teacher.targets("heldout", rows, batch, training=False)
            total += self._student(batch, loss).item() * len(rows)
        # processes must agree to the last bit, for they decide by it
        mean = self._ranks.max_(torch.tensor(total / len(windows), dtype=torch.float64))
        return round(mean.item(), 6)

    @torch.inference_mode()
    def divergence_of(self, decoder: Decoder) -> float:
        """The same of a written checkpoint, as the engine runs it."""
        windows = self._windows["heldout"]
        total = 0.0
        for rows in torch.arange(len(windows)).split(self.micro_batch):
            batch = windows[rows].to(self._device)
            loss, _ = self._teacher.targets("heldout", rows, batch, training=False)
            hidden = decoder.hidden_states(batch).flatten(0, 1)
            for start in range(0, len(hidden), _CHUNK_TOKENS):
                chunk = slice(start, start + _CHUNK_TOKENS)
                total += loss(decoder.logits(hidden[chunk]), chunk)[0].item()
        return round(total / windows.numel(), 6)

    def train(self, scalars: Path | None, flops_per_token: float, peak_flops: float) -> None:
        """Run the remaining steps. Raises MeasuredFailure where the loss is no number or grows."""
        plan = self._plan
        self._resume()
        if not self.heldout:
            self._look(0)
        board = Scalars(scalars if self._ranks.writes else None, len(self.losses))
        saved_at = time.monotonic()
        with bar("distil", plan.steps) as advance:
            advance(len(self.losses))
            for step in range(len(self.losses), plan.steps):
                started = time.monotonic()
                self.losses.append(self._step(step))
                rate = plan.batch * plan.length / (time.monotonic() - started)
                self.tokens_per_s.append(rate)
                values = {
                    "loss": self.losses[-1],
                    "learning_rate": learning_rate(plan, step),
                    "tokens_per_s": rate,
                    "share_of_peak_flops": rate * flops_per_token / peak_flops / self._ranks.size,
                }
                done = step + 1
                if done % plan.evaluations == 0 or done == plan.steps:
                    self._look(done)
                    values["heldout_kl"] = self.heldout[done]
                board.add(done, values)
                advance(1)
                due = time.monotonic() - saved_at > plan.save_seconds and done < plan.steps
                if self._agreed(due):
                    self._save()
                    saved_at = time.monotonic()

    @property
    def best_step(self) -> int:
        """Steps after which the held-out KL was lowest; 0: never below the start."""
        return min(self.heldout, key=lambda step: (self.heldout[step], step))

    @property
    def median_rate(self) -> float | None:
        """Training tokens per second of the median step; None where no step was run."""
        return round(statistics.median(self.tokens_per_s), 1) if self.tokens_per_s else None

    def tensors(self, step: int) -> dict[str, Tensor]:
        """The tensors of the checkpoint after `step`: 0, `best_step` or the steps done so far.

        Every process must call it; it is empty in all but the writing one.
        """
        if step and step == len(self.losses):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state: dict[str, Any] = dict(get_model_state_dict(self._student, options=options))
            parameters = {n.removeprefix("model."): t.detach() for n, t in state.items()}
            return self._export(parameters) if self._ranks.writes else {}
        if not self._ranks.writes:
            return {}
        tensors: dict[str, Tensor] = load_file(self._best_path(step)) if step else self._export({})
        return tensors

    def _best_path(self, step: int) -> Path:
        return self._work / f"best-{step:06d}.safetensors"

    def _agreed(self, yes: bool) -> bool:
        """Whether any process says yes: what follows must be done by all or none."""
        return bool(self._ranks.max_(torch.tensor(float(yes))))

    def _look(self, done: int) -> None:
        """Measure the held-out loss after `done` steps; keep the weights if they are the best."""
        found = self.divergence()
        first = self.heldout.get(0, found)
        if not done and not math.isfinite(found):
            raise MeasuredFailure(
                f"the held-out loss is {found} before training: the weights of student or teacher are "
                "no numbers. Check them with tinier eval."
            )
        if not math.isfinite(found) or found > first + max(first, _DIVERGED):
            self._fail(f"the held-out loss went from {first} to {found} after step {done}")
        better = not self.heldout or found < min(self.heldout.values())
        self.heldout[done] = found
        if better and done:
            tensors = self.tensors(done)
            if tensors:
                # the one before stays until a state is saved that needs it no more
                with new_file(self._best_path(done)) as partial:
                    save_file(tensors, partial, metadata={"format": "pt"})
            self._ranks.wait()

    def _step(self, step: int) -> float:
        """One optimizer step; its loss. Out of memory: again with half the micro-batch."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._plan, step)
        chosen = _batch_indices(len(self._windows["training"]), step, self._plan)
        share = chosen.chunk(self._ranks.size)[self._ranks.rank]
        while True:
            try:
                total = self._gradients(share)
                break
            except torch.OutOfMemoryError:
                self._optimizer.zero_grad()
            # past the except: its traceback holds on to the tensors of the failed pass
            self._halve(len(share))
        if not math.isfinite(total):
            self._fail(f"the loss is {total} at step {step + 1} of {self._plan.steps}")
        self._accelerator.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return round(total, 6)

    def _gradients(self, share: Tensor) -> float:
        """Add up the gradients of this process's windows; the mean loss over all processes."""
        total = torch.zeros((), device=self._device)
        micros = share.split(self.micro_batch)
        for number, rows in enumerate(micros):
            windows = self._windows["training"][rows].to(self._device)
            last = number + 1 == len(micros)
            self._keep_whole(forward=True, backward=not last)
            # gradients are exchanged once a step
            quiet = nullcontext() if last else self._accelerator.no_sync(self._student)
            with quiet:
                loss, states = self._teacher.targets("training", rows, windows, training=True)
                loss = self._with_text(loss, windows)
                value = self._student(windows, loss, self._layers, states)
                part = value * (len(rows) / len(share))
                self._accelerator.backward(part)
            total += part.detach()
        self._keep_whole(forward=False, backward=False)
        if self._ranks.size > 1:
            total = self._ranks.sum_(total) / self._ranks.size
        return total.item()

    def _keep_whole(self, *, forward: bool, backward: bool) -> None:
        """Whether parameters that were gathered over the processes stay so after a pass: within a step
        nothing changes them, so they need to come but once where there is room."""
        if self._stays_whole and isinstance(self._student, FSDPModule):
            self._student.set_reshard_after_forward(not forward)
            self._student.set_reshard_after_backward(not backward)

    def _with_text(self, loss: RowsLoss, windows: Tensor) -> RowsLoss:
        """The loss with its share of cross-entropy."""
        weight = self._plan.ce_weight
        if weight == 0:
            return loss
        labels = torch.full_like(windows, IGNORED)
        labels[:, :-1] = windows[:, 1:]
        hard = Hard(labels.flatten())
        return hard if weight == 1 else Mixed(loss, hard, weight)

    def _halve(self, share: int) -> None:
        if self._ranks.size > 1 or self.micro_batch == 1:
            # the others wait for this process already; torchrun stops them when it ends
            smaller = f"--micro-batch {self.micro_batch // 2}, " if self.micro_batch > 1 else ""
            raise MeasuredFailure(
                f"out of memory with {self.micro_batch} windows at once. Use {smaller}a shorter "
                "--length, --checkpointing full or --train lora."
            )
        self.micro_batch = largest_divisor(share, self.micro_batch // 2)
        self.warnings.append(
            f"out of memory: micro-batch halved to {self.micro_batch}, the batch is still {share}"
        )
        say(self.warnings[-1])
        release_memory()

    def _fail(self, what: str) -> None:
        raise MeasuredFailure(
            f"{what}. Lower the learning rate (--lr {self._plan.lr / 3:.1e}) or lengthen the "
            f"warm-up (--warmup-steps {2 * self._plan.warmup + 1})."
        )

    def _save(self) -> None:
        """Save the state; the older one goes when the newer one is whole.

        A disk without room is a warning, in the manifest too: the training itself is well.
        """
        fresh = self._work / "unfinished"
        done = len(self.losses)
        failure: Exception | None = None
        if self._ranks.writes:
            shutil.rmtree(fresh, ignore_errors=True)
            count = sum(p.numel() for _, p in self._trained())
            try:
                check_disk(fresh, count * _STATE_BYTES)
                fresh.mkdir(parents=True)
            except (OSError, OutputError) as error:
                failure = error
        if not self._agreed(failure is not None):
            failure = self._write_state(fresh)
            self._ranks.wait()
        if not self._ranks.writes:
            return
        if failure is not None:
            shutil.rmtree(fresh, ignore_errors=True)
            self.warnings.append(f"training state not saved after step {done}: {failure}")
            say(f"warning: {self.warnings[-1]}")
            return
        progress = {
            "losses": self.losses,
            "heldout": self.heldout,
            "tokens_per_s": self.tokens_per_s,
            "micro_batch": self.micro_batch,
            "warnings": self.warnings,
        }
        write_atomically(fresh / "progress.json", json.dumps(progress))
        sync_folder(fresh)
        older = list(self._work.glob("step-*"))
        fresh.rename(self._work / f"step-{done:06d}")
        for path in older:
            shutil.rmtree(path)
        # from here on nothing goes back to a step before this one
        for path in self._work.glob("best-*"):
            if path != self._best_path(self.best_step):
                path.unlink()

    def _write_state(self, folder: Path) -> Exception | None:
        """Write every trained parameter and what the optimizer keeps of it, whole, in safetensors; returns
        what went wrong. All processes must call it: sharded tensors are gathered, one at a time."""
        writer = TensorWriter(folder) if self._ranks.writes else None
        failure: Exception | None = None
        for name, tensor in self._state():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if writer is not None and failure is None:
                try:
                    writer.add(name, whole)
                except (
                    OSError,
                    SafetensorError,
                ) as error:  # a full disk: the others still wait for us
                    failure = error
        if writer is not None and failure is None:
            try:
                writer.close()
            except (OSError, SafetensorError) as error:
                failure = error
        return failure

    def _resume(self) -> None:
        """Load the latest saved state of the same run, if there is one, whatever number of processes wrote
        it."""
        for folder in sorted(self._work.glob("step-*"), reverse=True):
            path = folder / "progress.json"
            if not path.exists():  # its removal had begun
                continue
            progress = json.loads(path.read_text(encoding="utf-8"))
            with torch.no_grad():
                self._read_state(folder)
            self.losses = progress["losses"]
            self.heldout = {int(step): kl for step, kl in progress["heldout"].items()}
            self.tokens_per_s = progress["tokens_per_s"]
            self.micro_batch = progress["micro_batch"]
            self.warnings = progress["warnings"]
            say(f"distil: goes on after step {len(self.losses)} of {self._plan.steps}")
            return

    def _read_state(self, folder: Path) -> None:
        """What `_write_state` wrote."""
        files: dict[str, Any] = {}
        for path in folder.glob("*.safetensors"):
            stream = safe_open(path, framework="pt")
            files |= dict.fromkeys(stream.keys(), stream)
        for name, parameter in self._trained():

            def read(key: str, name: str = name) -> Tensor:
                tensor: Tensor = files[f"{name}.{key}"].get_tensor(f"{name}.{key}")
                return tensor

            parameter.copy_(_like(parameter, read(_VALUE)))
            if f"{name}.step" in files:
                moments = {key: _like(parameter, read(key)) for key in _MOMENTS}
                step = read("step").to(self._step_device)
                self._optimizer.optimizer.state[parameter] = {**moments, "step": step}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._student.named_parameters() if p.requires_grad]

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """What a step changes, by name."""
        for name, parameter in self._trained():
            yield f"{name}.{_VALUE}", parameter.detach()
            kept = self._optimizer.optimizer.state.get(parameter)
            if kept:  # not before its first gradient
                for key in (*_MOMENTS, "step"):
                    yield f"{name}.{key}", kept[key]

    @property
    def _step_device(self) -> torch.device:
        """Where AdamW counts its steps: the fused one beside the parameters."""
        fused = self._optimizer.optimizer.defaults["fused"]
        return self._device if fused else torch.device("cpu")


def _fits_whole(student: nn.Module, device: torch.device) -> bool:
    """Whether there is room for parameters that stay gathered; alike on all processes' GPUs."""
    if device.type != "cuda":
        return True
    whole = sum(p.numel() * p.element_size() for p in student.parameters())
    return whole <= torch.cuda.get_device_properties(device).total_memory * _KEPT_SHARE


def _like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor where and as `parameter` is: on its device, sharded as it is."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def training_dtype(plan: DistillPlan, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in."""
    if plan.precision == "float32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _accelerator(device: torch.device, ranks: Ranks, layer_class: str) -> Any:
    # Accelerate keeps one device a process; that of an earlier run must not decide
    AcceleratorState._reset_state(reset_partial_state=True)
    sharding = None
    if ranks.size > 1:
        sharding = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[layer_class],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )
    on_cpu = device.type == "cpu"
    accelerator = Accelerator(
        mixed_precision="no", cpu=on_cpu, fsdp_plugin=None if on_cpu else sharding
    )
    if on_cpu and sharding is not None:
        # Accelerate shards on accelerators alone; torch's FSDP2 does it on CPUs too, over gloo
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = sharding
    return accelerator


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
