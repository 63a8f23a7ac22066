"""Distil a student against a teacher: two folders in, a folder out. Start at `distill`.

Everything of an unfinished run lies in a hidden folder beside `out`: the student's post-training
quantization, text that the teacher wrote, the training state and the best weights so far. The same
call goes on from there, also after a kill.
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from tinier.checkpoint import (
    Checkpoint,
    StagePlan,
    TensorWriter,
    atomic_folder,
    check_output,
    copy_side_files,
    finished_checkpoint,
    hold,
    open_checkpoint,
    write_atomically,
    write_config,
)
from tinier.device import (
    check_memory,
    matmul_flops,
    pick_device,
    release_memory,
    reset_peak_memory,
)
from tinier.distillation.plan import DistillPlan, layer_pairs, prepare, training_flops
from tinier.distillation.student import export, load_model, load_student
from tinier.distillation.teacher import (
    LiveTeacher,
    StoredTeacher,
    Teacher,
    store_top_k,
    stored_path,
)
from tinier.distillation.trainer import Trainer, training_dtype
from tinier.engine import load_decoder
from tinier.errors import InputError, MeasuredFailure
from tinier.families import geometry_of, open_model
from tinier.progress import warn
from tinier.quantization import quantize
from tinier.ranks import Ranks, join_ranks
from tinier.text import BUILTIN, Document, Text, documents_of, written_windows


def distill(
    student: Checkpoint,
    teacher: Checkpoint,
    plan: DistillPlan,
    out: Path | str,
    *,
    text: Text = BUILTIN,
    heldout: Text = BUILTIN,
    device: str = "auto",
    teacher_store: Path | None = None,
    tensorboard: Path | None = None,
) -> Checkpoint:
    """Train `student` towards `teacher` on `text`, write it to the new folder `out`.

    The result has the weights of the lowest held-out loss; where those of the last step are others,
    they are kept in the folder `OUT-last`. heldout: text that is measured and never trained on.
    teacher_store: folder where the teacher's top-k probabilities (plan.top_k) are kept for other
    runs. tensorboard: folder for its scalars. Under torchrun the model is sharded over the processes.
    Raises InputError, SchemeError, TextError or OutputError before any work, and MeasuredFailure when
    the loss is no number or grows, or the memory is not enough.
    """
    started, out = time.monotonic(), Path(out)
    last = out.with_name(f"{out.name}-last")
    check_output(out)
    documents = documents_of(text, "training")
    stage, training, held = prepare(
        student, teacher, plan, documents, documents_of(heldout, "heldout")
    )
    if finished_checkpoint(last, stage.key) is None:
        check_output(last)
    check_folders(teacher_store, tensorboard)
    place = pick_device(device)
    ranks = join_ranks(place)
    reset_peak_memory(place)
    own = (stage.memory_bytes - teacher.weight_bytes) // ranks.size + teacher.weight_bytes
    check_memory(
        own, place, f"training {student.folder.name}",
        "Use --train lora, more processes, or another --device.",
    )  # fmt: skip
    for warning in stage.warnings:
        warn(warning)
    work = out.parent / f".{out.name}.training"
    with ExitStack() as stack:
        if ranks.writes:
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = out.parent / f".{out.name}.lock"
            stack.enter_context(hold(out, lock))
            _open_work(work, stage.key)
        ranks.wait()
        run = _prepare_run(
            student, teacher, plan, training, held, documents, work, place, ranks, teacher_store
        )
        peak = matmul_flops(place)
        try:
            run.train(tensorboard, training_flops(student, teacher), peak)
        except MeasuredFailure as error:
            kept = out.with_name(f"{out.name}-best")
            if not (run.heldout and run.best_step) or kept.exists():
                raise
            _write(run, run.best_step, student, stage, kept, place, started, plan)
            raise MeasuredFailure(
                f"{error} The best weights so far (step {run.best_step}, held-out KL "
                f"{run.heldout[run.best_step]}) are in {kept}."
            ) from None
        best = run.best_step
        if best == 0:
            run.warnings.append(
                f"no step lowered the held-out KL of {run.heldout[0]}: the result is the student "
                "as it was before training"
            )
        if best != plan.steps:
            if ranks.writes:
                shutil.rmtree(
                    last, ignore_errors=True
                )  # of this run, killed before `out` was there
            _write(run, plan.steps, student, stage, last, place, started, plan)
        _write(run, best, student, stage, out, place, started, plan)
        if ranks.writes:
            shutil.rmtree(work)
        ranks.wait()
    del run
    release_memory()
    return open_checkpoint(out)


def check_folders(teacher_store: Path | None, tensorboard: Path | None) -> None:
    """Raises InputError where one is a file, or TensorBoard is not installed."""
    _check_tensorboard(tensorboard)
    for name, folder in (("--teacher-store", teacher_store), ("--tensorboard", tensorboard)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise InputError(f"{name} {folder} is a file. Give a folder, or a name that is free.")


def _check_tensorboard(folder: Path | None) -> None:
    if folder is not None and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "TensorBoard's scalars need its package. Type: pip install tensorboard; or leave "
            "--tensorboard out."
        )


def _open_work(work: Path, key: str) -> None:
    """The folder of an unfinished run, emptied if it is another's."""
    key_file = work / "key"
    if not key_file.exists() or key_file.read_text(encoding="ascii") != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_atomically(key_file, key)


def _prepare_run(
    student: Checkpoint,
    teacher: Checkpoint,
    plan: DistillPlan,
    training: Tensor | None,
    held: Tensor,
    documents: Sequence[Document],
    work: Path,
    device: torch.device,
    ranks: Ranks,
    teacher_store: Path | None,
) -> Trainer:
    """Make what training starts from: quantized student, written text, teacher."""
    quantized = None
    if plan.quantize is not None:
        folder = work / "quantized"
        if not folder.exists():
            quantize(
                student, plan.quantize, folder, text=documents, device=device.type,
                targets=work / "targets",
            )  # fmt: skip
        quantized = open_model(folder)
    if plan.generated:
        written = _written(teacher, plan, training, work, device, ranks)
        training = written if training is None else torch.cat((training, written))
    assert training is not None
    windows = {"training": training, "heldout": held}
    pairs = layer_pairs(student, teacher, plan) if plan.hidden_weight else ()
    dtype = training_dtype(plan, device)
    original: Teacher = LiveTeacher(
        load_model(teacher, plan, device),
        plan,
        dtype,
        tuple(theirs for _, theirs in pairs),
        vocab=geometry_of(student).vocab,
    )
    if plan.top_k is not None:
        original = _stored(original, teacher, plan, windows, teacher_store or work, device, ranks)
        release_memory()
    torch.manual_seed(plan.seed)  # low-rank updates start at random
    model, grids = load_student(student, plan, device, quantized, work / "targets")

    def tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
        exported = export(student, model, grids, state)
        return {name: tensor.cpu().contiguous() for name, tensor in exported}

    layers = tuple(mine for mine, _ in pairs)
    return Trainer(model, original, plan, windows, layers, tensors, work, device, ranks)


def _written(
    teacher: Checkpoint, plan: DistillPlan, text: Tensor | None, work: Path, device: torch.device,
    ranks: Ranks,
) -> Tensor:  # fmt: skip
    """Windows that the teacher writes, once; it goes on from pieces of the text, where there is one."""
    path = work / "written.json"
    if not path.exists() and ranks.writes:
        windows = written_windows(
            teacher, plan.generated, plan.length, seed=plan.seed, device=device, text=text
        )
        write_atomically(path, json.dumps(windows.tolist()))
        release_memory()
    ranks.wait()
    return torch.tensor(json.loads(path.read_text(encoding="ascii")))


def _stored(
    live: Teacher,
    teacher: Checkpoint,
    plan: DistillPlan,
    windows: dict[str, Tensor],
    store: Path,
    device: torch.device,
    ranks: Ranks,
) -> StoredTeacher:
    """The teacher's top-k on all windows, computed unless an earlier run left them."""
    assert plan.top_k is not None
    assert isinstance(live, LiveTeacher)
    files = {}
    for part, tokens in windows.items():
        path = stored_path(store, teacher, tokens, plan.top_k)
        if ranks.writes and not path.exists():
            store_top_k(
                live, tokens, plan.top_k, path, plan.windows_at_once(plan.batch, device), device
            )
        files[part] = path
    ranks.wait()
    return StoredTeacher(files)


def _write(
    run: Trainer,
    step: int,
    student: Checkpoint,
    stage: StagePlan,
    out: Path,
    device: torch.device,
    started: float,
    plan: DistillPlan,
) -> None:
    """Write the checkpoint of the weights after `step`; the writing process does, all must call."""
    tensors = run.tensors(step)
    if not tensors:
        return
    with atomic_folder(out, needed_bytes=stage.output_bytes) as partial:
        writer = TensorWriter(partial)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
        write_config(partial, stage.output_config)
        copy_side_files(student, partial)
        written = written_divergence(run, open_checkpoint(partial), device)
        check_written(written, run.heldout[step])
        stage.manifest(
            started=started,
            device=device,
            measures={
                "loss": run.losses,
                "heldout_kl": {str(done): kl for done, kl in run.heldout.items()},
                "heldout_kl_before": run.heldout[0],
                "heldout_kl_after": run.heldout[step],
                "heldout_kl_written": written,
                "step": step,
                "tokens_per_s": run.median_rate,
                "all_tokens_per_s": [round(rate, 1) for rate in run.tokens_per_s],
                "micro_batch": run.micro_batch,
                "plan": asdict(plan),
            },
            warnings=run.warnings,
        ).write(partial)


def written_divergence(run: Trainer, written: Checkpoint, device: torch.device) -> float:
    """Held-out KL from the teacher, per token in nats, of a checkpoint as the engine reads and runs it."""
    return run.divergence_of(load_decoder(written, device=device))


def check_written(written: float, measured: float) -> None:
    """Raise MeasuredFailure where a checkpoint is not the model that was measured in training."""
    # of two ways to round to 16 bits in between
    if not abs(written - measured) <= max(0.1 * measured, 0.02):
        raise MeasuredFailure(
            f"the written checkpoint has a held-out KL of {written:.4f}, and the model in training had "
            f"{measured:.4f}: they are not the same model. This is a fault of tinier; please report it."
        )
