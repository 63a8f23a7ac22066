"""In-process speed of an engine, always beside the base model's in the same run.

Start at `bench`. A workload is `concurrency` requests of equal length that arrive together,
greedy, with no stop token, prompts of random tokens. Definitions are AIPerf's: TTFT is first token
minus arrival; ITL is (latency - TTFT) / (output tokens - 1); throughput counts output tokens over
the wall time of the workload. Models take turns, and each round starts with another one, so that
neither a warm cache nor a slow minute favours one of them.
"""

import statistics
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from tinier.checkpoint import Checkpoint
from tinier.device import release_memory
from tinier.engine import Engine, EngineConfig, Request, SamplingParams
from tinier.errors import InputError
from tinier.families import check_length
from tinier.progress import bar
from tinier.schemes import Int4Inputs
from tinier.text import BUILTIN, documents_of, token_windows
from tinier.tokenizer import load_tokenizer

DRAFTED = "{} with the draft"
"""What a model is called where it has one"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    concurrency: int = 1
    """Requests in flight."""
    input_length: int = 128
    """Prompt tokens of each."""
    output_length: int = 64
    """Output tokens of each."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "input_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}. Use 1 or more.")
        if self.output_length < 2:
            raise InputError(f"output_length={self.output_length}. Use 2 or more.")


class Sample(NamedTuple):
    """One repeat of a workload; times are means over its requests."""

    latency_ms: float
    ttft_ms: float
    itl_ms: float
    output_tokens_per_s: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Statistic:
    """Over the repeats."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    workload: Workload
    repeats: int
    latency_ms: Statistic
    ttft_ms: Statistic
    itl_ms: Statistic
    output_tokens_per_s: Statistic
    requests_per_s: Statistic
    paths: dict[str, bool]
    """How the linear layers were multiplied, each with whether the device does so natively."""
    ratio_to_base: Statistic | None
    """Output tokens/s over the base's of the same round; None for a base measured alone."""


def engine_for(
    workload: Workload, device: str, tensor_parallel: int = 1, int4_inputs: Int4Inputs = "int8"
) -> EngineConfig:
    """An engine with room for exactly this workload."""
    return EngineConfig(
        max_batch_size=workload.concurrency,
        max_seq_len=workload.input_length + workload.output_length,
        max_step_tokens=max(2048, workload.concurrency),
        reuse_prefixes=False,  # the rounds send the same prompts
        device=device,
        tensor_parallel=tensor_parallel,
        int4_inputs=int4_inputs,
    )


def bench(
    models: dict[str, Checkpoint],
    workload: Workload,
    *,
    base: str,
    repeats: int,
    seed: int,
    device: str,
    tensor_parallel: int = 1,
    int4_inputs: Int4Inputs = "int8",
    draft: str | None = None,
) -> dict[str, SpeedResult]:
    """Load the models side by side and measure them by turns; they are freed before this returns.

    models: by name, the one called `base` among them. draft: EngineConfig's; the base is measured with it
    too, as DRAFTED says, and all prompts are text, which a draft can know, and not random.
    Raises InputError for no repeats, or a workload longer than a model has positions for, before anything
    is loaded.
    """
    if repeats < 1:
        raise InputError(f"repeats={repeats}. Use 1 or more.")
    for checkpoint in models.values():
        check_length(checkpoint, workload.input_length + workload.output_length)
    engines = {
        name: Engine(checkpoint, engine_for(workload, device, tensor_parallel, int4_inputs))
        for name, checkpoint in models.items()
    }
    prompts = None
    if draft is not None:
        config = engine_for(workload, device, tensor_parallel, int4_inputs)
        engines[DRAFTED.format(base)] = Engine(models[base], replace(config, draft=draft))
        prompts = text_prompts(models[base], workload)
    results = compare_speed(
        engines, workload, repeats=repeats, seed=seed, base=base, prompts=prompts
    )
    del engines
    release_memory()
    return results


def compare_speed(
    engines: dict[str, Engine], workload: Workload, *, repeats: int, seed: int, base: str,
    prompts: list[list[int]] | None = None,
) -> dict[str, SpeedResult]:  # fmt: skip
    """Measure each engine `repeats` times in turns, after one warm-up round.

    engines: by name, the one called `base` among them. prompts: the workload's; None: random ones.
    """
    prompts = prompts or random_prompts(engines[base], workload, seed)
    names = list(engines)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    label = f"speed, {workload.concurrency} at once"
    with bar(label, (repeats + 1) * len(names)) as advance:
        for round_ in range(repeats + 1):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                sample = _run(engines[name], prompts, workload)
                if round_ > 0:  # round 0 warms up
                    samples[name].append(sample)
                advance(1)
    return {
        name: _result(
            workload,
            samples[name],
            samples[base],
            engines[name].runner.paths,
            is_base=name == base,
        )
        for name in names
    }


def random_prompts(engine: Engine, workload: Workload, seed: int) -> list[list[int]]:
    """The workload's prompts: token ids drawn with `seed` from the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    shape = (workload.concurrency, workload.input_length)
    ids: list[list[int]] = torch.randint(
        0, engine.decoder.geometry.vocab, shape, generator=generator
    ).tolist()
    return ids


def text_prompts(model: Checkpoint, workload: Workload) -> list[list[int]]:
    """The workload's prompts from the built-in held-out text, again from its start where it ends."""
    documents = documents_of(BUILTIN, "heldout")
    found: list[list[int]] = token_windows(
        load_tokenizer(model), documents, length=workload.input_length, count=workload.concurrency
    ).tolist()
    return [found[i % len(found)] for i in range(workload.concurrency)]


def _run(engine: Engine, prompts: list[list[int]], workload: Workload) -> Sample:
    params = SamplingParams(max_tokens=workload.output_length)
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    started = min(r.arrived for r in requests)
    seconds = max(r.token_times[-1] for r in requests) - started
    return Sample(
        latency_ms=1e3 * statistics.fmean(r.token_times[-1] - r.arrived for r in requests),
        ttft_ms=1e3 * statistics.fmean(r.token_times[0] - r.arrived for r in requests),
        itl_ms=1e3 * statistics.fmean(_inter_token_seconds(r) for r in requests),
        output_tokens_per_s=sum(len(r.output) for r in requests) / seconds,
        requests_per_s=len(requests) / seconds,
    )


def _inter_token_seconds(request: Request) -> float:
    times = request.token_times
    return (times[-1] - times[0]) / (len(times) - 1)


def _result(
    workload: Workload,
    samples: list[Sample],
    base: list[Sample],
    paths: dict[str, bool],
    *,
    is_base: bool,
) -> SpeedResult:
    def over_repeats(values: list[float]) -> Statistic:
        digits = [float(f"{value:.5g}") for value in values]
        return Statistic(statistics.median(digits), min(digits), max(digits))

    ratios = [
        own.output_tokens_per_s / other.output_tokens_per_s
        for own, other in zip(samples, base, strict=True)
    ]
    return SpeedResult(
        workload=workload,
        repeats=len(samples),
        paths=paths,
        latency_ms=over_repeats([s.latency_ms for s in samples]),
        ttft_ms=over_repeats([s.ttft_ms for s in samples]),
        itl_ms=over_repeats([s.itl_ms for s in samples]),
        output_tokens_per_s=over_repeats([s.output_tokens_per_s for s in samples]),
        requests_per_s=over_repeats([s.requests_per_s for s in samples]),
        ratio_to_base=None if is_base else over_repeats(ratios),
    )
