"""Several engines of one model behind one queue, and engines that several processes share."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.serving.conftest import ENGINE
from tests.serving.test_faults import LONG, running, wait_for

from tinier.engine import SamplingParams
from tinier.engine.crew import crew_devices
from tinier.engine.request import Limits
from tinier.errors import InputError
from tinier.serving import ServeConfig, Service
from tinier.serving.metrics import Metrics
from tinier.serving.model import Engines, Model
from tinier.serving.replica import Prefixes
from tinier.serving.worker import Ready, WorkerSpec


def test_known_beginnings_are_counted_in_whole_blocks() -> None:
    known = Prefixes(block_size=4, num_blocks=4)
    known.add([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert known.length([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8
    assert known.length([1, 2, 3, 4, 5, 6, 7, 0]) == 4
    assert known.length([0, 2, 3, 4]) == known.length([1, 2, 3]) == 0
    assert known.length([5, 6, 7, 8]) == 0  # known after another beginning only
    assert known.length([1, 2, 3, 4], adapter=1) == 0  # of the model without it
    known.add([7, 7, 7, 7], adapter=1)
    assert known.length([7, 7, 7, 7], adapter=1) == 4
    assert known.length([7, 7, 7, 7], adapter=2) == 0
    known.add([9] * 12)  # room for four blocks: the oldest goes, and what followed it is useless
    assert known.length([1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert known.length([9] * 12) == 12


def idle(replicas: int) -> Model:
    """A model whose engines are ready, without processes."""
    spec = WorkerSpec(folder=Path("."), config=ENGINE)
    metrics = Metrics()
    engines = Engines("m@1", [spec] * replicas, 100, metrics)
    model = Model("m", 1, engines, None, (), metrics)  # type: ignore[arg-type]
    for replica in model.engines.replicas:
        replica._take(Ready(Limits(100, 200, 200), 50, 1, 1, []))
        replica._outbox = multiprocessing.SimpleQueue()  # type: ignore[assignment]
    return model


def test_requests_go_where_the_prompt_is_cached_else_to_the_shorter_queue() -> None:
    model, params = idle(3), SamplingParams(max_tokens=4)

    def where(prompt: list[int]) -> int:
        (job,) = model.submit(prompt, params)
        return next(
            i for i, replica in enumerate(model.engines.replicas) if job.id in replica._jobs
        )

    prompts = [[i] * 20 for i in range(3)]
    assert [where(prompt) for prompt in prompts] == [0, 1, 2]
    assert [where([*prompt, 7]) for prompt in reversed(prompts)] == [2, 1, 0]
    assert where(prompts[1]) == 1
    assert where([50, 51, 52, 53]) in (0, 2)
    # not behind more than half a batch
    places = [where(prompts[1]) for _ in range(12)]
    loads = [replica.num_jobs for replica in model.engines.replicas]
    assert places[0] == 1
    assert max(loads) - min(loads) <= ENGINE.max_batch_size // 2 + 1
    # one that is down gets none
    model.engines.replicas[1].ready = None
    assert where(prompts[1]) != 1


def test_jobs_without_a_token_are_sent_to_another_engine_once() -> None:
    model, params = idle(2), SamplingParams(max_tokens=4, n=2, seed=5)
    first, second = model.submit([1] * 8, params)
    first.output.append(3)
    lost, other = model.engines.replicas
    lost._spawn = lambda: None  # type: ignore[method-assign]
    lost._ended()
    assert first.error is not None
    assert "ended; it starts again" in str(first.error)
    assert second.error is None
    assert list(other._jobs) == [second.id]
    assert (second.params.n, second.params.seed) == (1, 6)
    lost.ready = other.ready
    other._spawn = lambda: None  # type: ignore[method-assign]
    other._ended()
    assert second.error is not None  # twice is enough
    assert not lost._jobs


def ask(service: Service, **fields: Any) -> httpx.Response:
    url = f"{service.url}/v1/completions"
    return httpx.post(url, json=LONG | fields, timeout=120)


@pytest.mark.slow
def test_a_replica_that_dies_loses_its_own_requests_alone(model_folders: dict[str, Path]) -> None:
    config = ServeConfig(port=0, replicas=2, max_queue=64)
    before = set(multiprocessing.active_children())
    with Service([f"one={model_folders['one']}"], ENGINE, config) as service:
        workers = [p for p in multiprocessing.active_children() if p not in before]
        assert len(workers) == 2
        whole = ask(service, max_tokens=20).json()["choices"][0]["text"]
        answers: list[httpx.Response] = []

        def one(i: int) -> None:
            answers.append(ask(service, prompt=f"{i} " * 20, max_tokens=120))

        threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda: running(service) == 8)
        assert workers[0].pid is not None
        os.kill(workers[0].pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        codes = sorted(answer.status_code for answer in answers)
        assert codes[:4] == [200] * 4
        assert set(codes) <= {200, 500}
        assert httpx.get(f"{service.url}/health/ready").status_code == 200
        assert ask(service, max_tokens=20).json()["choices"][0]["text"] == whole
        wait_for(
            lambda: sum(r.ready is not None for r in service._http.models[0].engines.replicas) == 2,
            60,
        )
        for _ in range(4):
            assert ask(service, max_tokens=20).json()["choices"][0]["text"] == whole


@pytest.mark.slow
def test_an_engine_of_two_processes_is_served_and_comes_back(
    model_folders: dict[str, Path],
) -> None:
    source = [f"one={model_folders['one']}"]
    with Service(source, ENGINE, ServeConfig(port=0)) as alone:
        expected = ask(alone, max_tokens=40).json()["choices"][0]["text"]
    before = set(multiprocessing.active_children())
    shared = dataclasses.replace(ENGINE, tensor_parallel=2)
    with Service(source, shared, ServeConfig(port=0)) as service:
        (worker,) = (p for p in multiprocessing.active_children() if p not in before)
        assert ask(service, max_tokens=40).json()["choices"][0]["text"] == expected
        # a client that leaves ends its request on both, or the next one would hang
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/v1/completions", json=LONG, timeout=0.05)
        wait_for(lambda: running(service) == 0)
        assert ask(service, max_tokens=40).json()["choices"][0]["text"] == expected
        (follower,) = psutil.Process(worker.pid).children()
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(ask(service, n=4)))
        asking.start()
        wait_for(lambda: running(service) > 0)
        follower.kill()
        asking.join()
        assert answers[0].json()["error"]["code"] == "engine_failure"
        wait_for(lambda: httpx.get(f"{service.url}/health/ready").status_code == 200, 60)
        assert ask(service, max_tokens=40).json()["choices"][0]["text"] == expected
        new = [p for p in multiprocessing.active_children() if p not in before]
        (follower,) = psutil.Process(new[0].pid).children()
    end = time.monotonic() + 20
    while follower.is_running() and follower.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_more_gpus_than_there_are_is_an_error_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert crew_devices(2, torch.device("cuda", 0)) == ["cuda:0", "cuda:1"]
    with pytest.raises(InputError, match=r"replicas=3: 3 GPUs are needed from cuda:0 on.* sees 2"):
        crew_devices(3, torch.device("cuda", 0), "replicas=3")
