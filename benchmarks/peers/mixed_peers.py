"""Mixed precision by ModelOpt's AutoQuantize and AutoRound's AutoScheme: a 16-bit model of the weights that
each makes, in its own environment:

    python benchmarks/peers/mixed_peers.py modelopt|autoround BASE TOKENS.json BITS OUT [DEVICE]

TOKENS: calibration windows of token ids. Both choose among 2, 3 and 4 bits in groups of 64 and 8 bits. BITS
is what they are asked for: AutoQuantize counts no scales, a quarter of a bit with such groups, and the head
among the weights with 16.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDTHS, GROUP = (2, 3, 4, 8), 64


def modelopt(base: str, windows: list[list[int]], bits: float, device: str) -> Any:
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
    model, state = mtq.auto_quantize(
        model, constraints={"effective_bits": bits},
        quantization_formats=[weights(width) for width in WIDTHS], data_loader=batches,
        forward_step=lambda it, batch: it(**batch), loss_func=lambda output, batch: output.loss,
        num_calib_steps=8, num_score_steps=len(batches), disabled_layers=["*lm_head*"],
    )  # fmt: skip
    print(str(state)[:2000], file=sys.stderr)
    with torch.no_grad():
        for module in model.modules():
            quantizer = getattr(module, "weight_quantizer", None)
            if quantizer is not None and quantizer.is_enabled:
                module.weight.data = quantizer(module.weight.float()).to(module.weight.dtype)
    clean = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    own = {n: p for n, p in model.state_dict().items() if n in clean.state_dict()}
    clean.load_state_dict({n: t.cpu() for n, t in own.items()}, strict=False)
    return clean


def autoround(base: str, windows: list[list[int]], bits: float, device: str) -> Any:
    from auto_round import AutoRound, AutoScheme

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    scheme = AutoScheme(
        avg_bits=bits, options=(*(f"W{width}A16G{GROUP}" for width in WIDTHS[:3]), "W8A16"),
    )  # fmt: skip
    texts = Path(f"{base}-calibration.json")
    texts.write_text(json.dumps([{"text": tokenizer.decode(window)} for window in windows]))
    made = AutoRound(
        model, tokenizer, scheme=scheme, iters=50, nsamples=len(windows), seqlen=len(windows[0]),
        dataset=str(texts), device_map=device,
    )  # fmt: skip
    quantized, _ = made.quantize()
    return quantized


def main() -> None:
    tool, base, tokens, bits, out = sys.argv[1:6]
    device = sys.argv[6] if len(sys.argv) > 6 else "cpu"
    started = time.monotonic()
    windows = json.loads(Path(tokens).read_text())
    model = {"modelopt": modelopt, "autoround": autoround}[tool](base, windows, float(bits), device)
    model.save_pretrained(out)
    print(json.dumps({"seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
