from collections.abc import Callable

import pytest
import torch

from tinier.benchmark import Workload, compare_speed, environment, measure_memory
from tinier.benchmark.speed import Sample, _result, engine_for
from tinier.checkpoint import Checkpoint
from tinier.engine import Engine
from tinier.errors import InputError

Tiny = Callable[..., Checkpoint]
WORKLOAD = Workload(concurrency=3, input_length=10, output_length=5)


def test_figures_agree_with_each_other(tiny: Tiny) -> None:
    checkpoints = {"base": tiny(), "small": tiny(name="small", num_hidden_layers=2)}
    engines = {n: Engine(c, engine_for(WORKLOAD, "cpu")) for n, c in checkpoints.items()}
    results = compare_speed(engines, WORKLOAD, repeats=3, seed=0, base="base")
    assert list(results) == ["base", "small"]
    for result in results.values():
        assert result.repeats == 3
        assert 0 < result.ttft_ms.median < result.latency_ms.median
        assert result.latency_ms.lowest <= result.latency_ms.median <= result.latency_ms.highest
    assert results["base"].ratio_to_base is None
    assert results["small"].ratio_to_base is not None
    for engine in engines.values():
        assert engine.num_free_blocks == engine.num_blocks


def test_definitions() -> None:
    own = [Sample(100, 20, 10, 50, 5), Sample(90, 20, 10, 60, 6), Sample(95, 20, 10, 70, 7)]
    base = [Sample(100, 20, 10, 25, 5), Sample(90, 20, 10, 20, 6), Sample(95, 20, 10, 70, 7)]
    result = _result(WORKLOAD, own, base, {}, is_base=False)
    assert result.output_tokens_per_s.median == 60
    assert result.ratio_to_base is not None
    # 2, 3 and 1: each round against its own base
    assert (result.ratio_to_base.median, result.ratio_to_base.highest) == (2.0, 3.0)


def test_models_take_turns(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinier.benchmark import speed

    engines = {name: Engine(tiny(name=name), engine_for(WORKLOAD, "cpu")) for name in "ab"}
    turns = []
    original = speed._run

    def record(engine: Engine, prompts: list[list[int]], workload: Workload) -> Sample:
        turns.append(next(name for name, e in engines.items() if e is engine))
        return original(engine, prompts, workload)

    monkeypatch.setattr(speed, "_run", record)
    compare_speed(engines, WORKLOAD, repeats=3, seed=0, base="a")
    assert "".join(turns) == "abbaabba"


def test_memory_is_that_of_a_fresh_process(tiny: Tiny) -> None:
    ballast = torch.ones(100_000_000)  # 400 MB that the other process must not see
    checkpoint = tiny()
    memory = measure_memory(checkpoint, WORKLOAD, "cpu")
    assert memory.weights_bytes <= checkpoint.weight_bytes
    # 4 layers, k and v, 3 requests of 15 tokens in blocks of 16, 2 kv heads, 16 wide, float32
    assert memory.kv_bytes == 4 * 2 * 3 * 16 * 2 * 16 * 4
    assert 0 < memory.start_bytes < memory.peak_bytes
    from tinier.device import peak_memory_bytes

    assert memory.peak_bytes < peak_memory_bytes(torch.device("cpu"))
    del ballast


def test_environment_says_what_matters() -> None:
    record = environment(torch.device("cpu"))
    assert record["cpu"]
    assert record["memory_bytes"] > 1e8
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"input_length": 0}, "input_length=0"),
        ({"output_length": 1}, "output_length=1. Use 2 or more"),
    ],
)
def test_bad_workloads(values: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Workload(**values)
