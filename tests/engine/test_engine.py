"""The whole engine: greedy text is transformers', whatever the schedule."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import FAMILIES, MIXTURES, quantize_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, Request, SamplingParams
from tinier.engine.runner import Captured, Runner, Shape
from tinier.errors import InputError
from tinier.kernels.native import load_library

Tiny = Callable[..., Checkpoint]


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def engine(checkpoint: Checkpoint, **limits: int) -> Engine:
    config = {"max_batch_size": 4, "max_seq_len": 128, "block_size": 4} | limits
    return Engine(checkpoint, EngineConfig(device="cpu", **config))


def transformers_greedy(checkpoint: Checkpoint, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    result: list[int] = out[0, len(prompt) :].tolist()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(tiny: Tiny, family: str) -> None:
    checkpoint = tiny(family)
    params = SamplingParams(max_tokens=24)
    for prompt in prompts(3):
        (ours,) = engine(checkpoint).generate([prompt], params)
        assert ours == transformers_greedy(checkpoint, prompt, 24)


@pytest.mark.skipif(isinstance(load_library(), str), reason=str(load_library()))
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_step_computes_every_family(
    tiny: Tiny, tmp_path: Path, family: str, kind: str
) -> None:
    """Beside the same steps operator by operator: what differs is the order of sums, so less than what one
    unit in the last place of the embeddings changes."""
    checkpoint = tiny(
        family, dtype=torch.bfloat16, head_dim=64, hidden_size=128, initializer_range=0.2,
        moe_intermediate_size=128,
    )  # fmt: skip
    if kind != "bf16":
        checkpoint = quantize_tiny(checkpoint, kind, tmp_path / kind)
    params = SamplingParams(max_tokens=6, logprobs=20)

    def run(*, native: bool, noise: float = 0.0) -> list[Request]:
        made = engine(checkpoint)
        assert made.runner._native is not None
        if not native:
            made.runner._native = None
        table = made.decoder.embedding.codes
        draw = torch.rand(table.shape, generator=torch.Generator().manual_seed(3))
        table.copy_(table.float() * (1 + noise * (2 * draw - 1)))
        requests = [made.add(prompt, params) for prompt in prompts(4)]
        while made.has_work:
            made.step()
        return requests

    theirs = run(native=False)
    apart = difference(run(native=True), theirs)
    moved = difference(run(native=False, noise=2**-8), theirs)
    # of a mixture's most: where the last bit sends a token to another expert they are far apart
    share = torch.tensor(0.5 if family in MIXTURES else 0.9)
    assert apart.quantile(share) < moved.quantile(share) + 0.02


def difference(ours: list[Request], theirs: list[Request]) -> Tensor:
    """Of the likeliest tokens' log-probabilities, in nats, as long as both wrote the same."""
    apart = []
    for one_request, other_request in zip(ours, theirs, strict=True):
        for one, other in zip(one_request.logprobs, other_request.logprobs, strict=True):
            both = [token for token in one.top if token in other.top]
            apart += [one.top[token] - other.top[token] for token in both]
            if one.token != other.token:
                break
    return torch.tensor(apart).abs()


def test_batched_text_is_that_of_single_requests(tiny: Tiny) -> None:
    checkpoint = tiny("qwen3")
    params = SamplingParams(max_tokens=20)
    single = [engine(checkpoint).generate([prompt], params)[0] for prompt in prompts(9)]
    assert engine(checkpoint).generate(prompts(9), params) == single


def test_chunked_prompts_give_the_same_text(tiny: Tiny) -> None:
    checkpoint = tiny()
    params = SamplingParams(max_tokens=12)
    asked = prompts(5, seed=1, longest=60)
    whole = engine(checkpoint).generate(asked, params)
    assert engine(checkpoint, max_step_tokens=7).generate(asked, params) == whole


def test_preempted_requests_give_the_same_text_and_free_their_blocks(tiny: Tiny) -> None:
    checkpoint = tiny()
    params = SamplingParams(max_tokens=40)
    asked = prompts(8, seed=2)
    roomy = engine(checkpoint).generate(asked, params)
    block_bytes = 2 * 4 * 2 * 16 * 4 * 4  # k and v, layers, kv heads, head dim, float32, block
    tight = engine(checkpoint, kv_cache_bytes=24 * block_bytes)
    assert tight.num_blocks == 24
    assert tight.generate(asked, params) == roomy
    assert tight.num_preemptions > 0
    assert tight.num_free_blocks == tight.num_blocks


def test_requests_may_arrive_at_any_time(tiny: Tiny) -> None:
    checkpoint = tiny("mistral", sliding_window=12)
    params = SamplingParams(max_tokens=15)
    asked = prompts(6, seed=3)
    alone = [engine(checkpoint).generate([prompt], params)[0] for prompt in asked]
    shared = engine(checkpoint)
    requests = []
    for prompt in asked:
        requests.append(shared.add(prompt, params))
        shared.step()
        shared.step()
    while shared.has_work:
        shared.step()
    assert [request.output for request in requests] == alone
    assert shared.num_free_blocks == shared.num_blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("chunk", [16, 60, 4096])
def test_graphs_of_mixed_steps_give_the_text_of_single_requests(tiny: Tiny, chunk: int) -> None:
    checkpoint = tiny("qwen3")
    params = SamplingParams(max_tokens=15)
    asked = prompts(20, seed=4, longest=100)
    alone = engine(checkpoint).generate(asked, params)
    config = EngineConfig(
        device="cuda", max_batch_size=8, max_seq_len=128, block_size=4, max_step_tokens=chunk
    )
    on_gpu = Engine(checkpoint, config)
    if chunk == 60:
        on_gpu.warm_up()
    requests = []
    for prompt in asked:
        requests.append(on_gpu.add(prompt, params))
        on_gpu.step()
    while on_gpu.has_work:
        on_gpu.step()
    assert [request.output for request in requests] == alone
    assert any(shape.rows > shape.sequences for shape in on_gpu.runner._captured)


def test_sampling_depends_on_the_seed_alone(tiny: Tiny) -> None:
    checkpoint = tiny()
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7)
    asked = prompts(4)
    (alone,) = engine(checkpoint).generate(asked[:1], params)
    assert engine(checkpoint).generate(asked, params)[0] == alone
    other = SamplingParams(max_tokens=20, temperature=1.0, seed=8)
    assert engine(checkpoint).generate(asked[:1], other)[0] != alone


def test_top_k_one_and_a_tiny_top_p_are_greedy(tiny: Tiny) -> None:
    checkpoint = tiny()
    greedy = engine(checkpoint).generate(prompts(2), SamplingParams(max_tokens=10))
    for params in (
        SamplingParams(max_tokens=10, temperature=1.0, top_k=1),
        SamplingParams(max_tokens=10, temperature=1.0, top_p=1e-6),
    ):
        assert engine(checkpoint).generate(prompts(2), params) == greedy


def test_stop_tokens_end_the_text_and_are_not_part_of_it(tiny: Tiny) -> None:
    checkpoint = tiny()
    (text,) = engine(checkpoint).generate(prompts(1), SamplingParams(max_tokens=20))
    stop = text[4]
    params = SamplingParams(max_tokens=20, stop_token_ids=(stop,))
    (stopped,) = engine(checkpoint).generate(prompts(1), params)
    assert stopped == text[: text.index(stop)]


def test_streaming_gives_tokens_one_by_one(tiny: Tiny) -> None:
    checkpoint = tiny()
    params = SamplingParams(max_tokens=8)
    stream = engine(checkpoint).stream(prompts(1)[0], params)
    assert list(stream) == engine(checkpoint).generate(prompts(1), params)[0]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "prompt is empty"),
        ([1, 2, 9999], 4, r"outside 0\.\.263"),
        ([1] * 100, 60, "need 160 positions; this engine has 128"),
    ],
)
def test_impossible_requests_are_refused(
    tiny: Tiny, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine(tiny()).add(prompt, SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_impossible_sampling_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_impossible_limits_are_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="max_batch_size=0"):
        EngineConfig(max_batch_size=0)
    with pytest.raises(InputError, match="below max_batch_size"):
        EngineConfig(max_batch_size=8, max_step_tokens=4)
    with pytest.raises(InputError, match="no room for one block"):
        engine(tiny(), kv_cache_bytes=10)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="torch sees no GPU"):
        Engine(tiny(), EngineConfig(device="cuda"))
    with pytest.raises(InputError, match="'tpu' is not known"):
        Engine(tiny(), EngineConfig(device="tpu"))


_ONE_TOKEN = """
import sys
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import open_model

engine = Engine(open_model(sys.argv[1]), EngineConfig(device="cpu", max_seq_len=64))
engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
"""


@pytest.mark.slow
def test_a_process_may_end_while_its_memory_is_moved_to_huge_pages(tiny: Tiny) -> None:
    large = tiny(
        dtype=torch.bfloat16, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4
    )
    command = [sys.executable, "-c", _ONE_TOKEN, str(large.folder)]
    for _ in range(6):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_context_is_the_model_s_own_where_the_cache_has_room(tiny: Tiny) -> None:
    model = tiny(max_position_embeddings=20_000)
    token = 2 * 4 * 2 * 16 * 4  # keys and values of four layers, two heads of 16, float32
    for cache, room in ((None, 20_000), (6_000 * token, 6_000), (100 * token, 96)):
        engine = Engine(model, EngineConfig(device="cpu", max_batch_size=8, kv_cache_bytes=cache))
        assert engine.limits.room == engine.max_seq_len == room
    # no larger cache than for requests of 4,096 tokens
    assert Engine(model, EngineConfig(device="cpu", max_batch_size=8)).num_blocks == 8 * 256
    asked = Engine(model, EngineConfig(device="cpu", max_seq_len=128))
    assert (asked.limits.room, asked.num_blocks) == (128, 32 * 8)


def test_sequences_that_would_be_turned_otherwise_are_not_the_default(tiny: Tiny) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = tiny(max_position_embeddings=256, rope_parameters=rope)
    assert Engine(model, EngineConfig(device="cpu")).max_seq_len == 256
    assert Engine(model, EngineConfig(device="cpu", max_seq_len=600)).max_seq_len == 600


class Replayed:
    """What a CUDA graph is to the runner, on a CPU: a shape's step, computed from buffers that stay."""

    def __init__(self, runner: Runner, captured: Captured, shape: Shape) -> None:
        self._runner, self._captured, self._shape = runner, captured, shape

    def replay(self) -> None:
        parts = self._runner._split(self._captured.inputs, self._shape.rows, self._shape.sequences)
        starts = parts[6]
        counts = [count for count in starts.diff().tolist() if count]
        rows, sequences = sum(counts), len(counts)
        ends = [rows] * 4 + [sequences] * 2 + [sequences + 1, 1, sequences]
        real = [part[:end].flatten() for part, end in zip(parts, ends, strict=True)]
        self._captured.output = self._runner._compute(torch.cat(real), counts, 1)


@pytest.mark.parametrize("narrow", [1, 2, 1000])
def test_only_used_columns_of_wide_block_tables_are_copied(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, narrow: int
) -> None:
    model = tiny(initializer_range=0.2)
    config = EngineConfig(device="cpu", block_size=4, max_batch_size=3, max_seq_len=200)
    asked = prompts(7)
    params = SamplingParams(max_tokens=30)
    plain = Engine(model, config).generate(asked, params)
    monkeypatch.setattr("tinier.engine.runner._NARROW", narrow)
    assert Engine(model, config).generate(asked, params) == plain
    monkeypatch.setattr("tinier.engine.runner.captures", lambda *_: True)
    engine = Engine(model, config)
    runner = engine.runner
    widths = set()

    def capture(shape: Shape) -> Captured:
        inputs = runner._inputs([], shape.rows, shape.sequences).clone()
        captured = Captured.__new__(Captured)
        captured.inputs = inputs
        captured.tables = runner._split(inputs, shape.rows, shape.sequences)[-1]
        captured.graph = Replayed(runner, captured, shape)  # type: ignore[assignment]
        runner._captured[shape] = captured
        return captured

    def stage(size: int) -> torch.Tensor:
        widths.add(size)
        return torch.full((size,), -7, dtype=torch.int32)

    monkeypatch.setattr(runner, "_native", None)
    monkeypatch.setattr(runner, "_capture", capture)
    monkeypatch.setattr(runner, "_stage", stage)
    monkeypatch.setattr(runner._staging, "sent", lambda: None)
    assert engine.generate(asked, params) == plain
    assert len(widths) > 2


class Used(Exception):
    """The layers are one kernel."""


def test_few_tokens_of_short_contexts_take_the_kernel(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole:
        most_tokens = 2

        def step(self, *_: torch.Tensor) -> torch.Tensor:
            raise Used

    def used(count: int, length: int = 3) -> bool:
        engine = Engine(tiny("llama"), EngineConfig(max_batch_size=3, max_seq_len=64, device="cpu"))
        runner = engine.runner
        assert runner.paths == engine.decoder.paths
        monkeypatch.setattr(runner, "_native", None)
        runner._whole = Whole()  # type: ignore[assignment]
        assert runner.paths["one kernel for the layers, steps of 2 tokens at most"]
        try:
            engine.generate([[5] * length] * count, SamplingParams(max_tokens=3))
        except Used:
            return True
        return False

    assert used(1)
    assert used(2)
    assert not used(3)
    monkeypatch.setattr("tinier.engine.runner.LONG_CONTEXT", 20)
    assert used(1)
    assert not used(1, length=30)
