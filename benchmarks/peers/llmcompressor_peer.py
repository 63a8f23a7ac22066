"""llm-compressor on the CPU, on given calibration tokens. Run inside its own environment:

    ENV/bin/python benchmarks/peers/llmcompressor_peer.py MODEL TOKENS.safetensors METHOD

The model is quantized in its own dtype and compressed by the library, as saving it does. Its
scales are then upcast, and the library's decompression on the first forward pass runs in float32:
the integer codes and scales measured are the ones that a checkpoint holds. The library goes on
quantizing the activations in each forward pass.
"""

from collections.abc import Callable

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from measure import load
from peer import check_coverage, read_job, report, timed
from torch.utils.data import DataLoader

GROUP_SIZE = 64
IGNORE = ["lm_head"]


def by_preset(kind: type[Modifier], scheme: str) -> Modifier:
    return kind(targets=["Linear"], scheme=scheme, ignore=IGNORE)


def by_group(kind: type[Modifier], preset: str = "W4A16") -> Modifier:
    """The preset with groups of GROUP_SIZE in place of 128."""
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights.group_size = GROUP_SIZE
    return kind(config_groups={"group_0": scheme}, ignore=IGNORE)


def smooth() -> Modifier:
    return SmoothQuantModifier(smoothing_strength=0.8)


RECIPES: dict[str, Callable[[], list[Modifier]]] = {
    "fp8": lambda: [by_preset(QuantizationModifier, "FP8_DYNAMIC")],
    "fp8-static": lambda: [by_preset(QuantizationModifier, "FP8")],
    "int8-sq-gptq": lambda: [smooth(), by_preset(GPTQModifier, "W8A8")],
    "int8-sq-rtn": lambda: [smooth(), by_preset(QuantizationModifier, "W8A8")],
    "int4-gptq": lambda: [by_group(GPTQModifier)],
    "int4-awq": lambda: [AWQModifier(), by_group(QuantizationModifier)],
    "int4-awq-asym": lambda: [AWQModifier(), by_group(QuantizationModifier, "W4A16_ASYM")],
    "int4-rtn": lambda: [by_group(QuantizationModifier)],
}
WITHOUT_DATA = {"fp8", "int4-rtn"}


def main() -> None:
    job = read_job(__doc__, RECIPES)
    model = load(job.model, "auto")
    recipe = RECIPES[job.method]()
    # A DataLoader is used as it is: no tokenizing, padding or shuffling; one window a batch is
    # the library's default.
    windows = DataLoader([{"input_ids": window} for window in job.calibration], batch_size=1)
    data = {} if job.method in WITHOUT_DATA else {"dataset": windows}
    _, cost = timed(lambda: oneshot(model=model, recipe=recipe, **data))
    check_coverage(model, lambda module: hasattr(module, "quantization_scheme"))
    if job.out:
        model.save_pretrained(job.out)  # compresses the model in place
    else:
        ModelCompressor.from_pretrained_model(model).compress_model(model)
    report(job, "llm-compressor", "llmcompressor", cost, model)


if __name__ == "__main__":
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # AWQ pins memory; needs a GPU
    main()
