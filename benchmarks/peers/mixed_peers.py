"""Mixed precision by ModelOpt's AutoQuantize and AutoRound's AutoScheme: a 16-bit model of the weights that
each makes, in its own environment:

    python benchmarks/peers/mixed_peers.py modelopt|autoround BASE TOKENS.json BITS OUT [DEVICE]

TOKENS: calibration windows of token ids. Both choose among 2, 3 and 4 bits in groups of 64 and 8 bits. BITS
of a weight of the layers as stored, with a 16-bit scale a group. Prints the bits reached as JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDTHS, GROUP = (2, 3, 4, 8), 64
SCALE = 16 / GROUP
"""Bits of a weight, which neither tool is asked to count"""


def modelopt(base: str, windows: list[list[int]], bits: float, device: str) -> tuple[Any, float]:
    import modelopt.torch.quantization as mtq

    def weights(width: int) -> dict[str, Any]:
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {
                    "quantizer_name": "*weight_quantizer",
                    "cfg": {"num_bits": width, "block_sizes": {-1: GROUP, "type": "static"}},
                    "enable": True,
                },
                {"quantizer_name": "*input_quantizer", "enable": False},
                {"quantizer_name": "*lm_head*", "enable": False},
            ],
            "algorithm": "max",
        }

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)
    batches = [{"input_ids": torch.tensor([w], device=device)} for w in windows]
    for batch in batches:
        batch["labels"] = batch["input_ids"]
    layers, head = _sizes(model)
    model, _ = mtq.auto_quantize(
        # the head counts among its weights, with 16 bits
        model, constraints={"effective_bits": ((bits - SCALE) * layers + 16 * head) / (layers + head)},
        quantization_formats=[weights(width) for width in WIDTHS], data_loader=batches,
        forward_step=lambda it, batch: it(**batch), loss_func=lambda output, batch: output.loss,
        num_calib_steps=8, num_score_steps=len(batches), disabled_layers=["*lm_head*"],
    )  # fmt: skip
    stored = 0.0
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                quantizer = module.weight_quantizer
                rounds = quantizer.is_enabled
                width = quantizer.num_bits + SCALE if rounds else 16
                stored += width * module.weight.numel()
                if rounds:
                    module.weight.data = quantizer(module.weight.float()).to(module.weight.dtype)
    clean = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    own = {n: p for n, p in model.state_dict().items() if n in clean.state_dict()}
    clean.load_state_dict({n: t.cpu() for n, t in own.items()}, strict=False)
    return clean, stored / layers


def autoround(base: str, windows: list[list[int]], bits: float, device: str) -> tuple[Any, float]:
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = Path(f"{base}-calibration.json")
    # decoded windows may have fewer tokens than they had, and short ones are left out
    joined = [
        tokenizer.decode(one + other)
        for one, other in zip(windows, windows[1:] + windows[:1], strict=True)
    ]
    texts.write_text(json.dumps([{"text": text} for text in joined]))
    options = [QuantizationScheme(bits=width, group_size=GROUP, sym=True) for width in WIDTHS]
    scheme = AutoScheme(
        avg_bits=bits - SCALE, options=options, ignore_scale_zp_bits=True, dataset=str(texts),
        nsamples=len(windows), seqlen=len(windows[0]),
    )  # fmt: skip
    rounder = AutoRound(
        model, tokenizer, scheme=scheme, iters=200, nsamples=len(windows), seqlen=len(windows[0]),
        dataset=str(texts), device_map=device,
    )  # fmt: skip
    made, _ = rounder.quantize()
    layers, _ = _sizes(made)
    stored = 0.0
    for name, module in made.named_modules():
        if name.endswith("_proj"):
            width = int(rounder.layer_config[name]["bits"])
            stored += (width if width >= 16 else width + SCALE) * module.weight.numel()
    return made, stored / layers


def _sizes(model: Any) -> tuple[int, int]:
    """Weights of the layers, and of the head."""
    layers = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    return layers, model.get_output_embeddings().weight.numel()


def main() -> None:
    tool, base, tokens, bits, out = sys.argv[1:6]
    device = sys.argv[6] if len(sys.argv) > 6 else "cpu"
    started = time.monotonic()
    windows = json.loads(Path(tokens).read_text())
    make = {"modelopt": modelopt, "autoround": autoround}[tool]
    model, reached = make(base, windows, float(bits), device)
    model.to(torch.bfloat16).save_pretrained(out)
    print(json.dumps({"bits": reached, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
