"""`tinier import`"""

from tinier.cli import options, output
from tinier.cli.export import write_for


def import_(
    model: options.Model,
    out: options.Out,
    revision: options.Revision = None,
    device: options.Device = "cpu",
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Write another tool's quantized checkpoint as tinier's own, and check that it is the same model.

    In: GPTQ (v1, v2), AutoAWQ GEMM, transformers' fine-grained FP8, ModelOpt's FP8, NVFP4 and INT4. Out:
    compressed-tensors, the same codes and scales. What tinier does not compute is refused: inputs in
    another order (desc_act), or divided first (pre_quant_scale).

    \b
    Examples:
      tinier import Qwen/Qwen2.5-7B-Instruct-AWQ --out qwen-awq
      tinier export qwen-awq --to gguf --out qwen-gguf
    """
    output.start(quiet=quiet, log_level=log_level)
    write_for("tinier", model, out, revision, device, dry_run=dry_run, json=json)
