"""Log-probabilities of one prompt by another reader of a checkpoint, in that reader's own environment:

    ENV/bin/python benchmarks/peers/reader_logits.py gptqmodel|openvino FOLDER OUT.npy

Prints the reader's kind of layer, and saves [tokens, vocab] in float32.
"""

import sys

import numpy as np
import torch

IDS = torch.arange(100, 164)[None]


def gptqmodel(folder: str) -> torch.Tensor:
    """transformers with gptqmodel's kernels."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    print(type(model.model.layers[0].mlp.down_proj).__name__)
    with torch.no_grad():
        return model(IDS).logits[0]


def openvino(folder: str) -> torch.Tensor:
    """optimum-intel's export, computed in float32 (its default rounds the inputs of a layer to 8 bits)."""
    from optimum.intel import OVModelForCausalLM

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, ov_config=exact)
    return model(IDS, attention_mask=torch.ones_like(IDS)).logits[0]


if __name__ == "__main__":
    reader = {"gptqmodel": gptqmodel, "openvino": openvino}[sys.argv[1]]
    np.save(sys.argv[3], reader(sys.argv[2]).float().log_softmax(dim=-1).numpy())
