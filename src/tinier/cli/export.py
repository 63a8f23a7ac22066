"""`tinier export`"""

from pathlib import Path
from typing import Annotated

import typer

from tinier.cli import options, output


def _print_matrix(asked: bool) -> None:
    if asked:
        from tinier.exporting import matrix, matrix_text

        print(matrix_text(matrix()))
        raise typer.Exit


def export(
    model: options.Model,
    to: Annotated[str, typer.Option("--to", help="What will read it; see below.")],
    out: options.Out,
    revision: options.Revision = None,
    device: options.Device = "cpu",
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix",
            callback=_print_matrix,
            is_eager=True,
            help="Print which preset goes where, and why not, and end.",
        ),
    ] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Write a checkpoint as another engine reads it, and check that it is the same model.

    Codes and scales are carried over, nothing is rounded again. What the target cannot read is refused
    before any work, with the preset that would work. What was written is read back and its logits are
    compared; an export that is another model leaves nothing behind.

    \b
    Targets:
      transformers, vllm, sglang   compressed-tensors, held to the loader's rules
      tensorrt-llm                 ModelOpt's checkpoint and hf_quant_config.json
      triton, triton-vllm, triton-tensorrt-llm   a model repository of Triton Inference Server
      gptq, gptq-v2                GPTQ: vLLM, SGLang, transformers, OpenVINO, ONNX Runtime, MLX
      awq                          AutoAWQ GEMM
      onnx                         ONNX Runtime GenAI (pip install onnxruntime-genai onnx onnx-ir)
      fp8-hf                       transformers' fine-grained FP8
      gguf                         llama.cpp: INT4 to Q4_0 or Q4_1, INT8 to Q8_0, MXFP4, BF16
      ollama                       that file and a Modelfile
      16bit                        numbers instead of codes, to quantize, prune or distil again

    \b
    Examples:
      tinier export smollm2-int4 --to gptq --out smollm2-gptq
      tinier export llama-fp8 --to tensorrt-llm --out llama-trt
      tinier export smollm2-int4 --to gguf --out smollm2-gguf
      tinier export downloaded-fp8 --to 16bit --out downloaded
    """
    output.start(quiet=quiet, log_level=log_level)
    write_for(to, model, out, revision, device, dry_run=dry_run, json=json)


def write_for(
    to: str, model: str, out: Path, revision: str | None, device: str, *, dry_run: bool, json: bool
) -> None:
    """Export a model, or say what that would do, and print it."""
    from tinier.checkpoint import check_output
    from tinier.exporting import export as write
    from tinier.exporting import plan_export
    from tinier.families import open_model
    from tinier.report.terminal import exported_text, stage_text

    check_output(out)
    source = open_model(model, revision)
    if dry_run:
        text, data = stage_text(plan_export(source, to), out, device)
    else:
        text, data = exported_text(out, write(source, to, out, device=device))
    output.result(text, data, as_json=json)
