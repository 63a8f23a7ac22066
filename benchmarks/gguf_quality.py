"""The quality of 4-bit GGUF files against their size: tinier's GPTQ codes carried over to Q4_0, and what
llama.cpp's own quantizer makes of the same BF16 file.

The weights were 4-bit once, whose grid would flatter some formats: every linear weight is moved by a
random amount within half of its old step first (quantization_peers.off_grid). All files are judged
alike: the `gguf` package dequantizes them, transformers computes in float32, KL from the moved model
over windows of WikiText-2 that no calibration saw. llama.cpp's quantizer comes from llama-cpp-python,
built from source, in an environment of its own, without an importance matrix and with one: mean squares of
each layer's inputs, as llama-imatrix takes them, over the text that tinier calibrates on.

    python3 -m venv ENV && ENV/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    python -m benchmarks.gguf_quality --models smollm2-135m gemma3-270m --text valid.txt
        --llama-python ENV/bin/python --work WORK --out RESULT.json
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from benchmarks.peers.measure import load, measure
from benchmarks.quantization_peers import off_grid

from tinier.benchmark import environment
from tinier.checkpoint import Checkpoint
from tinier.exporting import export
from tinier.families import geometry_of, open_model
from tinier.quantization import QuantizePlan, quantize
from tinier.text import load_documents, token_windows
from tinier.tokenizer import load_tokenizer

SEQUENCES, LENGTH, EVALUATED = 32, 512, 16
PEERS = {"Q4_0": 2, "Q4_K_M": 15, "IQ4_XS": 30}
"""Numbers of llama.cpp's file types"""
OURS = {
    "int4-gptq g32, INT8 embedding": QuantizePlan(
        preset="int4-gptq", group_size=32, embedding="int8", windows=SEQUENCES, length=LENGTH
    ),
    "int4-best g32, INT8 embedding": QuantizePlan(
        preset="int4-best", group_size=32, embedding="int8", windows=SEQUENCES, length=LENGTH,
        iterations=25, weighting="none", drift="ignored",
    ),
}  # fmt: skip
_QUANTIZE = """
import sys, ctypes, numpy, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), 2
if len(sys.argv) > 4:
    kept = [(name.encode(), numpy.ascontiguousarray(x)) for name, x in numpy.load(sys.argv[4]).items()]
    rows = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()  # the last one, empty, ends it
    for row, (name, x) in zip(rows, kept):
        row.name, row.size = name, x.size
        row.data = x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = rows
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params) == 0
"""


def importance_matrix(base: Checkpoint, windows: torch.Tensor, file: Path) -> None:
    """Save the mean square of each input of each linear layer, by the names of the GGUF file."""
    model, names = load(str(base.folder), torch.float32), tensor_names(base)
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).double().square().sum(dim=0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            found = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            module.register_forward_pre_hook(hook(found or ""))
    with torch.no_grad():
        for window in windows:
            model.model(window[None], use_cache=False)
    means = {name: (total / windows.numel()).float().numpy() for name, total in sums.items()}
    np.savez(file, **means)


def tensor_names(base: Checkpoint) -> gguf.TensorNameMap:
    kind = gguf.MODEL_ARCH.LLAMA if base.config["model_type"] == "llama" else gguf.MODEL_ARCH.GEMMA3
    return gguf.get_tensor_name_map(kind, geometry_of(base).layers)


def judged(file: Path, base: Checkpoint, windows: torch.Tensor) -> dict[str, Any]:
    """Bytes of a file's tensors and of the file, their types, and how far the model is from the base."""
    geometry, model = geometry_of(base), load(str(base.folder), torch.float32)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    turned = base.config["model_type"] == "llama"
    names = tensor_names(base)
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            continue
        stored = tensors[names.get_name(name, try_suffixes=(".weight",)) or ""]
        weight = torch.from_numpy(
            gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32)
        )
        heads = {"q_proj": geometry.heads, "k_proj": geometry.kv_heads}.get(name.split(".")[-2])
        if turned and heads:
            halves = weight.view(heads, geometry.head_dim // 2, 2, -1)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        parameter.data = weight
    kinds: dict[str, int] = {}
    for tensor in tensors.values():
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return {
        "file_bytes": file.stat().st_size,
        "tensor_bytes": sum(kinds.values()),
        "bytes_by_type": kinds,
        **measure(model, str(base.folder), windows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ours", nargs="*", default=list(OURS), choices=list(OURS))
    arguments = parser.parse_args()
    documents = load_documents(arguments.text)
    record: dict[str, Any] = {"environment": environment(torch.device("cpu")), "models": {}}
    if arguments.out.exists():
        record = json.loads(arguments.out.read_text())
    for name in arguments.models:
        work = arguments.work / name
        work.mkdir(parents=True, exist_ok=True)
        base = off_grid(open_model(name), work / "moved")
        windows = token_windows(load_tokenizer(base), documents, length=LENGTH)
        evaluation = windows[SEQUENCES : SEQUENCES + EVALUATED]
        if not (work / "bf16").exists():
            export(base, "gguf", work / "bf16")
        whole, files = work / "bf16" / "model.gguf", {}
        matrix = work / "imatrix.npz"
        if not matrix.exists():
            importance_matrix(base, windows[:SEQUENCES], matrix)
        for kind, number in PEERS.items():
            for what, more in (("", []), (", importance matrix", [matrix])):
                files[f"llama.cpp {kind}{what}"] = file = work / f"{kind}{bool(more)}.gguf"
                if not file.exists():
                    command = [arguments.llama_python, "-c", _QUANTIZE, whole, file, str(number)]
                    subprocess.run([*command, *more], check=True, capture_output=True)
        for plan in arguments.ours:
            folder = work / plan.replace(", ", "-").replace(" ", "-")
            if not folder.exists():
                quantize(base, OURS[plan], folder, text=documents, device="cpu")
            made = work / f"{folder.name}-gguf"
            if not made.exists():
                export(open_model(folder), "gguf", made)
            files[f"tinier {plan}, as Q4_0"] = made / "model.gguf"
        rows = record["models"].setdefault(name, {})
        for row, file in files.items():
            if row not in rows:
                rows[row] = judged(file, base, evaluation)
                print(name, row, rows[row], file=sys.stderr, flush=True)
                arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
