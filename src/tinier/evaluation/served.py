"""The same measures through the serving engine: its cache, its batches, its kernels for single tokens.

`evaluate_windows` and `evaluate_mmlu` run whole windows through the engine's decoder; these send requests,
so that what is measured is all of what serves. Divergence from an original needs whole windows.
"""

import math

import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, Request, SamplingParams
from tinier.errors import InputError
from tinier.evaluation.mmlu import (
    Mmlu,
    MmluResult,
    check_prompts,
    letter_tokens,
    question_prompts,
    score,
)
from tinier.evaluation.quality import Quality, stderr
from tinier.progress import bar
from tinier.schemes import Int4Inputs
from tinier.tokenizer import Tokenizer

# the largest bias that a request may ask for
_ONLY_THESE = 100.0


def measure_served(
    checkpoint: Checkpoint, tokenizer: Tokenizer, windows: Tensor, mmlu: Mmlu | None, shots: int,
    device: str, tensor_parallel: int = 1, int4_inputs: Int4Inputs = "int8",
) -> tuple[Quality, MmluResult | None]:  # fmt: skip
    """Both measures on an engine with room for the longest window or question."""
    lengths = [windows.shape[1]]
    if mmlu:
        lengths += map(len, question_prompts(tokenizer, mmlu))
    config = EngineConfig(
        max_seq_len=max(lengths) + 1,
        device=device,
        tensor_parallel=tensor_parallel,
        int4_inputs=int4_inputs,
    )
    engine = Engine(checkpoint, config)
    quality = evaluate_served(engine, windows)
    return quality, evaluate_mmlu_served(engine, tokenizer, mmlu, shots) if mmlu else None


def evaluate_served(engine: Engine, windows: Tensor) -> Quality:
    """Perplexity on windows [n, length] of token ids, from the log-probabilities of prompts."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    requests = [engine.add(window, params) for window in windows.tolist()]
    _serve(engine, requests, "evaluate")
    sums = [-sum(entry.logprob for entry in request.prompt_logprobs) for request in requests]
    per_window = windows.shape[1] - 1
    nll = torch.tensor(sums, dtype=torch.float64) / per_window
    mean = nll.mean().item()
    return Quality(
        perplexity=math.exp(mean) if math.isfinite(mean) else None,
        nll_stderr=stderr(nll),
        kl=None,
        kl_stderr=None,
        top1_agreement=None,
        tokens=per_window * len(requests),
    )


def evaluate_mmlu_served(
    engine: Engine, tokenizer: Tokenizer, mmlu: Mmlu, shots: int
) -> MmluResult:
    """Ask every question: one token, the four letters raised above all others. Raises TextError for
    questions that are longer than the engine takes."""
    if mmlu.format != "letters":
        raise InputError("requests answer MMLU by letters. Leave --mmlu-format out, or --engine.")
    letters = letter_tokens(tokenizer)
    params = SamplingParams(max_tokens=1, logit_bias=dict.fromkeys(letters, _ONLY_THESE))
    prompts = question_prompts(tokenizer, mmlu)
    check_prompts(prompts, mmlu, engine.max_input_len)
    requests = [engine.add(prompt, params) for prompt in prompts]
    _serve(engine, requests, "MMLU")
    right = [
        request.output[0] == letters[question.answer]
        for request, question in zip(requests, mmlu.questions, strict=True)
    ]
    return score(mmlu, right, shots)


def _serve(engine: Engine, requests: list[Request], label: str) -> None:
    with bar(label, len(requests)) as advance:
        while engine.has_work:
            advance(sum(request.finished is not None for request in engine.step()))
