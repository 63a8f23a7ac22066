"""`tinier eval`"""

from pathlib import Path
from typing import Annotated

import typer

from tinier.cli import options, output


def eval_(
    model: options.Model,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Original model: adds KL divergence and top-1 agreement."),
    ] = None,
    text: options.TextSource = "builtin",
    windows: options.Windows = 16,
    length: options.Length = 512,
    mmlu: Annotated[
        Path | None, typer.Option("--mmlu", help="Folder with dev/ and test/ of MMLU.")
    ] = None,
    shots: Annotated[int, typer.Option("--shots", help="Solved MMLU examples, 0 to 5.")] = 5,
    subject: Annotated[
        list[str] | None, typer.Option("--subject", help="Only this MMLU subject; repeatable.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", help="So many MMLU questions, drawn by --seed.")
    ] = None,
    mmlu_format: Annotated[
        str,
        typer.Option(
            "--mmlu-format",
            help="letters: which of A to D comes next; continuation: the likeliest choice by its own text, "
            "which tells small models apart.",
        ),
    ] = "letters",
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Tasks of lm-evaluation-harness, with commas: arc_easy,hellaswag,gsm8k. Needs "
            "pip install lm-eval.",
        ),
    ] = None,
    task_shots: Annotated[
        int | None,
        typer.Option(
            "--task-shots", help="Solved examples of a task.", show_default="as the task says"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only so many questions of each task.")
    ] = None,
    include: Annotated[
        str | None, typer.Option("--include", help="A folder with task files of your own.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask tasks with the model's chat template.")
    ] = False,
    engine: Annotated[
        bool, typer.Option("--engine", help="Send requests to the serving engine instead.")
    ] = False,
    draft: options.Draft = None,
    tensor_parallel: options.TensorParallel = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    device: options.Device = "auto",
    int4_inputs: options.Int4Inputs = "int8",
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Measure quality: perplexity, divergence, MMLU, tasks of lm-evaluation-harness.

    With --against, answers are compared in pairs, too: which changed, and whether by more than chance.

    \b
    Examples:
      tinier eval smollm2-135m
      tinier eval smollm2-int4 --against smollm2-135m --text wiki.txt
      tinier eval smollm2-135m --mmlu mmlu --shots 5 --sample 500
      tinier eval smollm2-135m --mmlu mmlu --mmlu-format continuation --shots 0
      tinier eval smollm2-int4 --against smollm2-135m --tasks arc_easy,hellaswag --limit 500
      tinier eval smollm2-int4 --engine --mmlu mmlu
    """
    from dataclasses import asdict

    from tinier.device import pick_device
    from tinier.engine import load_decoder
    from tinier.errors import InputError
    from tinier.evaluation import (
        MmluPlan,
        TasksPlan,
        compare_answers,
        evaluate_mmlu,
        evaluate_windows,
        heldout_windows,
        load_mmlu,
        measure_served,
        reference_states,
        task_changes,
    )
    from tinier.families import check_length, open_model
    from tinier.report.terminal import quality_text, size_of
    from tinier.tokenizer import check_same_tokens, load_tokenizer

    output.start(quiet=quiet, log_level=log_level)
    if engine and against:
        raise InputError(
            "--engine has no --against: divergence needs whole windows. Leave one out."
        )
    if tensor_parallel != 1 and not engine:
        raise InputError(
            f"--tensor-parallel {tensor_parallel} is the engine's. Add --engine, or leave it out."
        )
    if mmlu is None and (subject or sample is not None):
        raise InputError("--subject and --sample are for --mmlu. Add it, or leave them out.")
    asked = None
    for_tasks = include or chat or draft or limit is not None or task_shots is not None
    if tasks is None and for_tasks:
        raise InputError(
            "--task-shots, --limit, --include, --chat and --draft are for --tasks. Add it."
        )
    if tasks is not None:
        from tinier.evaluation.harness import check_tasks, run_tasks

        asked = TasksPlan(
            names=tuple(name.strip() for name in tasks.split(",")), shots=task_shots, limit=limit,
            include=include, chat=chat, seed=seed,
        )  # fmt: skip
        check_tasks(asked)
    place = pick_device(device)
    checkpoint = open_model(model, revision)
    original = open_model(against) if against else None
    check_length(checkpoint, length + engine)  # the engine adds a token
    held = heldout_windows(checkpoint, original, text, windows, length)
    common = check_same_tokens(checkpoint, original) if original else None
    tokenizer = load_tokenizer(checkpoint, common)
    questions = None
    if mmlu:
        plan = MmluPlan(
            folder=mmlu, shots=shots, subjects=tuple(subject or ()), sample=sample, seed=seed,
            format=mmlu_format,  # type: ignore[arg-type]
        )  # fmt: skip
        questions = load_mmlu(plan)
    base = load_decoder(original, device=place) if original else None
    reference = reference_states(base, held) if base else None
    original_answers = (
        evaluate_mmlu(base, tokenizer, questions, shots) if base and questions else None
    )
    del base
    if engine:
        quality, answers = measure_served(
            checkpoint, tokenizer, held, questions, shots, device, tensor_parallel, int4_inputs
        )
    else:
        decoder = load_decoder(checkpoint, device=place, int4_inputs=int4_inputs)
        quality = evaluate_windows(decoder, held, reference)
        answers = evaluate_mmlu(decoder, tokenizer, questions, shots) if questions else None
    found, changes = [], {}
    if answers and original_answers:
        changes["mmlu"] = compare_answers(original_answers.answers, answers.answers)
    if asked is not None:
        folders = [checkpoint.folder, *([original.folder] if original else [])]
        own, *others = (
            run_tasks(
                str(folder),
                asked,
                device=device,
                int4_inputs=int4_inputs,
                draft=draft if folder == checkpoint.folder else None,
            )
            for folder in folders
        )
        found = [asdict(task) for task in own]
        for theirs in others:
            changes |= task_changes(theirs, own)
    data = {
        "model": model,
        "against": against,
        "text": text,
        "windows": len(held),
        "length": length,
        "size": size_of(checkpoint),
        "engine": engine,
        "quality": asdict(quality),
        "mmlu": asdict(answers) if answers else None,
        "tasks": found,
        "changes": {name: asdict(change) for name, change in changes.items()},
    }
    output.result(quality_text(data), data, as_json=json)
