"""Two processes that share a model answer as one does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import FAMILIES, quantize_tiny
from tests.engine.test_engine import prompts

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams, load_decoder
from tinier.engine.parallel import Share
from tinier.errors import InputError
from tinier.tokenizer import load_tokenizer

Tiny = Callable[..., Checkpoint]


def answers(model: Checkpoint, processes: int) -> list[list[float]]:
    """Greedy and drawn text of a few prompts, and the log-probabilities of one."""
    config = EngineConfig(
        max_batch_size=4, max_seq_len=96, block_size=4, tensor_parallel=processes, device="cpu"
    )
    engine = Engine(model, config)
    greedy = engine.generate(prompts(5), SamplingParams(max_tokens=12))
    drawn = engine.generate(prompts(3), SamplingParams(max_tokens=8, temperature=0.7, seed=1))
    request = engine.add(prompts(1)[0], SamplingParams(max_tokens=1, prompt_logprobs=0))
    while engine.has_work:
        engine.step()
    scores = [[round(entry.logprob, 3) for entry in request.prompt_logprobs]]
    return [*map(list, greedy), *map(list, drawn), *scores]


@pytest.mark.slow
def test_two_processes_answer_as_one(tiny: Tiny, tmp_path: Path) -> None:
    models = [tiny(family, name=family) for family in FAMILIES]
    models.append(tiny(name="untied", tie_word_embeddings=False, vocab_size=265))  # not even
    models += [
        quantize_tiny(models[0], preset, tmp_path / preset) for preset in ("int4", "fp8-static")
    ]
    models += [
        quantize_tiny(models[0], "int4", tmp_path / f"{kind}-table", embedding=kind)
        for kind in ("int8", "fp8")
    ]
    fused = tiny("phi3", name="fused")  # each process takes rows of q, of k and of v
    models += [
        quantize_tiny(fused, preset, tmp_path / f"fused-{preset}")
        for preset in ("int4", "fp8-static")
    ]
    for model in models:
        alone, shared = answers(model, 1), answers(model, 2)
        assert shared[:-1] == alone[:-1], model.folder
        assert shared[-1] == pytest.approx(alone[-1], abs=2e-3)
    # other libraries would think that they are meant, and wait for the other process
    assert not torch.distributed.is_initialized()


def test_requests_come_and_go_on_all_processes(tiny: Tiny) -> None:
    """Cancelled, cut short by a stop string, preempted, begun anew: the other process does it too, or the
    next step would have no partner."""
    source = tiny(vocab_size=264)
    tokenizer = load_tokenizer(source)
    outputs = []
    for processes in (1, 2):
        config = EngineConfig(
            max_batch_size=4, max_seq_len=64, block_size=4, tensor_parallel=processes, device="cpu",
            kv_cache_bytes=60_000 // processes,
        )  # fmt: skip
        engine = Engine(source, config, tokenizer=tokenizer)
        params = SamplingParams(max_tokens=24, temperature=1.0, stop=("e", "<"))
        requests = [engine.add(prompt, params) for prompt in prompts(6)]
        unstopped = SamplingParams(max_tokens=24, temperature=1.0, seed=3, n=2, logprobs=2)
        requests += engine.add_all(prompts(1)[0], unstopped)
        for _ in range(3):
            engine.step()
        engine.cancel(requests[-1])
        while engine.has_work:
            engine.step()
        assert engine.num_preemptions > 0
        outputs.append([request.output for request in requests])
        engine.reset()
        outputs[-1] += engine.generate(prompts(2), SamplingParams(max_tokens=4))
        with pytest.raises(InputError, match="the prompt is empty"):
            engine.add([], params)
    assert outputs[0] == outputs[1]


KILLED = """
import sys
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import open_model
engine = Engine(open_model(sys.argv[1]), EngineConfig(tensor_parallel=2, device="cpu", max_seq_len=4096))
print(engine._crew._processes[0].pid, flush=True)
engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4000))
print("done")
"""


@pytest.mark.parametrize("victim", ["follower", "leader"])
def test_no_process_outlives_another(tiny: Tiny, victim: str) -> None:
    source = tiny(max_position_embeddings=4096)
    leader = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source.folder)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert leader.stdout is not None
    line = leader.stdout.readline()
    assert line, leader.communicate()[1]
    follower = int(line)
    time.sleep(0.5)
    os.kill(follower if victim == "follower" else leader.pid, signal.SIGKILL)
    out, err = leader.communicate(timeout=30)
    assert "done" not in out
    if victim == "follower":
        assert leader.returncode == 1
        assert "process 1 of the 2 that share the model ended (exit code -9)" in err
    deadline = time.monotonic() + 10
    while _runs(follower) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(follower)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_cannot_be_shared_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = EngineConfig(tensor_parallel=2, device="cpu")
    with pytest.raises(InputError, match=r"does not divide the model's kv_heads \(1\)"):
        Engine(tiny(name="a", num_key_value_heads=1), shared)
    assert len(Engine(tiny(name="b"), shared).generate([[1]], SamplingParams(max_tokens=2))[0]) == 2
    with pytest.raises(InputError, match="tensor_parallel=4 on cpu, after 2 on cpu"):
        Engine(tiny(name="c"), EngineConfig(tensor_parallel=4, device="cpu"))
    with pytest.raises(InputError, match=r"does not divide the model's heads \(4\)"):
        load_decoder(tiny(name="d"), device=torch.device("cpu"), share=Share(0, 3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="leave torchrun out"):
        Engine(tiny(name="e"), shared)
