"""What ModelOpt itself exports of a model, a folder for each of its configurations. In its own environment:

ENV/bin/python benchmarks/peers/modelopt_export.py MODEL OUT CONFIGURATION…
"""

import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM


def main() -> None:
    model_folder, out, *configurations = sys.argv[1:]
    ids = torch.randint(0, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    for name in configurations:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
        with torch.no_grad():
            mtq.quantize(model, getattr(mtq, name), lambda it: it(ids))
            export_hf_checkpoint(model, export_dir=str(Path(out) / name))


if __name__ == "__main__":
    main()
