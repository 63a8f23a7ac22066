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
    engine: Annotated[
        bool, typer.Option("--engine", help="Send requests to the serving engine instead.")
    ] = False,
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
    """Measure quality: perplexity, divergence, MMLU.

    \b
    Examples:
      tinier eval smollm2-135m
      tinier eval smollm2-int4 --against smollm2-135m --text wiki.txt
      tinier eval smollm2-135m --mmlu mmlu --shots 5 --sample 500
      tinier eval smollm2-int4 --engine --mmlu mmlu
    """
    from dataclasses import asdict

    from tinier.device import pick_device
    from tinier.engine import load_decoder
    from tinier.errors import InputError
    from tinier.evaluation import (
        MmluPlan,
        evaluate,
        evaluate_mmlu,
        load_mmlu,
        measure_served,
        reference_states,
    )
    from tinier.families import check_length, open_model
    from tinier.progress import warn
    from tinier.report.terminal import quality_text, size_of
    from tinier.text import load_part, shortfall, token_windows
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
    place = pick_device(device)
    checkpoint = open_model(model, revision)
    original = open_model(against) if against else None
    check_length(checkpoint, length + engine)  # the engine adds a token
    common = check_same_tokens(checkpoint, original) if original else None
    tokenizer = load_tokenizer(checkpoint, common)
    held = token_windows(tokenizer, load_part(text, "heldout"), length=length, count=windows)
    for warning in shortfall(held, windows):
        warn(warning)
    questions = None
    if mmlu:
        plan = MmluPlan(
            folder=mmlu, shots=shots, subjects=tuple(subject or ()), sample=sample, seed=seed
        )
        questions = load_mmlu(plan)
    reference = reference_states(load_decoder(original, device=place), held) if original else None
    if engine:
        quality, answers = measure_served(
            checkpoint, tokenizer, held, questions, shots, device, tensor_parallel, int4_inputs
        )
    else:
        decoder = load_decoder(checkpoint, device=place, int4_inputs=int4_inputs)
        quality = evaluate(decoder, held, reference)
        answers = evaluate_mmlu(decoder, tokenizer, questions, shots) if questions else None
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
    }
    output.result(quality_text(data), data, as_json=json)
