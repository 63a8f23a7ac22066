"""A graph for ONNX Runtime GenAI, made by its own model builder from the GPTQ layout.

The builder's defaults make another model: they round the head to INT4 and the inputs of each product to
8 bits (KL 0.17 nats on SmolLM2). Asked for float32 products, and for head and embedding as they are, it
keeps every code: 3e-9. It holds the whole model in memory.
"""

import ctypes
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.errors import InputError, MeasuredFailure
from tinier.families import Geometry

_PACKAGES = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir")
_ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GraniteForCausalLM",
)  # fmt: skip
"""Seen with the same logits; SmolLM3 and Gemma 3 end in a KeyError of builder 0.18"""
_OPTIONS = {
    "accuracy_level": "1",  # products in float32
    "nodes_to_exclude": "/lm_head/MatMul,/model/embed_tokens/Gather",
}


def onnx_refusal(source: Checkpoint) -> str | None:
    """Why the builder takes no such model; None: it does."""
    architecture = source.config["architectures"][0]
    if architecture not in _ARCHITECTURES:
        return f"its builder makes no graph of a {architecture} that was seen to work."
    return None


def check_builder() -> None:
    """Raises InputError where the builder is not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    packages = " ".join(missing).replace("_", "-")
    if missing:
        raise InputError(f"--to onnx needs {', '.join(missing)}. Type: pip install {packages}")


def build(gptq: Path, out: Path, *, tied: bool) -> None:
    """Make a graph of a checkpoint in GPTQ layout. Raises MeasuredFailure if the builder fails."""
    options = _OPTIONS | ({"shared_embeddings": "true"} if tied else {})
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(gptq), "-o", str(out),
        "-p", "int4", "-e", "cpu", "-c", str(gptq / "cache"),
        "--extra_options", *(f"{name}={value}" for name, value in options.items()),
    ]  # fmt: skip
    for path in out.glob("model.onnx*"):  # of a run that was stopped
        path.unlink()
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environ,
        check=False,
        preexec_fn=_end_with_parent,
    )
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise MeasuredFailure(f"ONNX Runtime's builder failed. Nothing was written.\n{said}")


def _end_with_parent() -> None:
    """The builder ends when this process does (prctl(2), PR_SET_PDEATHSIG): it would write into the folder
    of the next run."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def log_probabilities(folder: Path, geometry: Geometry, windows: Tensor) -> Tensor:
    """[tokens, vocab] of windows [n, length], by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    past = (len(windows), geometry.kv_heads, 0, geometry.head_dim)
    feed: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": windows.numpy(), "attention_mask": np.ones(windows.shape, dtype=np.int64),
    }  # fmt: skip
    feed |= {
        entry.name: np.zeros(past, dtype=np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    logits = torch.from_numpy(session.run(["logits"], feed)[0])
    return logits.flatten(0, 1).log_softmax(dim=-1)
