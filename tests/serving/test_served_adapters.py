"""Models that are adapters of one base: one engine, and each says what its merged model does."""

import multiprocessing
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.engine.test_adapters import adapters
from tests.serving.conftest import ENGINE, write_model
from tests.test_adapters import pair, write_adapter

from tinier.engine import EngineConfig
from tinier.errors import InputError
from tinier.serving import ServeConfig, Service
from tinier.serving.metrics import Metrics
from tinier.serving.store import ModelStore

ASKED = {"prompt": "the old man and the sea " * 4, "max_tokens": 12, "temperature": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINIER_CACHE", str(tmp_path / "cache"))


def ask(service: Service, model: str, **fields: Any) -> httpx.Response:
    body = ASKED | {"model": model, "ignore_eos": True} | fields
    return httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)


def text(service: Service, model: str) -> str:
    answer = ask(service, model)
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["choices"][0]["text"]
    return said


@pytest.mark.slow
def test_adapters_of_one_base_share_its_engine(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    first, second = adapters(tmp_path)
    as_typed = f"{tmp_path}/adapters/../base"  # the same folder
    (tmp_path / "adapters").mkdir(exist_ok=True)
    sources = [f"a={base}+{base}/../{first.name}", f"plain={base}", f"b={as_typed}+{second}"]
    config = ServeConfig(port=0, load_folder=tmp_path, adapters="shared")
    before = set(multiprocessing.active_children())
    with Service(sources, ENGINE, config) as service:
        assert len(set(multiprocessing.active_children()) - before) == 1
        listed = httpx.get(f"{service.url}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["a", "plain", "b"]
        together: dict[str, str] = {}

        def one(name: str) -> None:
            together[name] = text(service, name)

        threads = [threading.Thread(target=one, args=(name,)) for name in ("a", "plain", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == {name: text(service, name) for name in together}
        metrics = httpx.get(f"{service.url}/metrics").text
        for name in ("a", "plain", "b"):
            assert f'tinier_requests_total{{model="{name}@1",result="length"}} 2.0' in metrics
            assert f'tinier_kv_cache_usage_ratio{{model="{name}@1"}}' in metrics
        unload = {"model": "a"}
        assert httpx.post(f"{service.url}/v1/models/unload", json=unload).status_code == 200
        assert ask(service, "a").status_code == 404
        assert text(service, "b") == together["b"]
        for inside, outside in ((base.name, "/tmp"), ("..", first.name)):
            load = {"model": f"again={inside}+{outside}"}
            assert httpx.post(f"{service.url}/v1/models/load", json=load).status_code == 404
        load = {"model": f"again={base.name}+{first.relative_to(tmp_path)}"}
        answer = httpx.post(f"{service.url}/v1/models/load", json=load, timeout=60)
        assert answer.status_code == 200, answer.text
        assert len(set(multiprocessing.active_children()) - before) == 1
        assert text(service, "again") == together["a"]
        os.utime(first / "adapter_model.safetensors")  # written since
        load = {"model": f"newer={base.name}+{first.name}"}
        assert httpx.post(f"{service.url}/v1/models/load", json=load, timeout=60).status_code == 200
        assert len(set(multiprocessing.active_children()) - before) == 2
        for name in ("plain", "b", "again", "newer"):
            assert (
                httpx.post(f"{service.url}/v1/models/unload", json={"model": name}).status_code
                == 200
            )
        assert not service._http._server.store._reserved
        assert not service._http._server.store._groups_of_engines
        assert set(multiprocessing.active_children()) == before
    for name, source in (("a", f"{base}+{first}"), ("b", f"{base}+{second}"), ("plain", str(base))):
        with Service([f"m={source}"], ENGINE) as alone:
            assert text(alone, "m") == together[name]
    assert len(set(together.values())) == 3


def test_what_must_be_merged_has_engines_of_its_own(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    first, _ = adapters(tmp_path)
    q = "model.layers.0.self_attn.q_proj"
    tensors = pair(q, 64, 64) | {"model.norm.weight": torch.full((64,), 1.5)}
    whole = write_adapter(tmp_path / "whole", tensors)
    before = set(multiprocessing.active_children())
    sources = [f"a={base}+{first}", f"w={base}+{whole}", f"p={base}"]
    with Service(sources, ENGINE, ServeConfig(port=0, adapters="shared")) as service:
        assert len(set(multiprocessing.active_children()) - before) == 2
        listed = httpx.get(f"{service.url}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["a", "w", "p"]
        assert len({text(service, name) for name in ("a", "w", "p")}) == 3


def test_on_a_cpu_each_is_merged_unless_told(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    first, _ = adapters(tmp_path)
    before = set(multiprocessing.active_children())
    with Service([f"a={base}+{first}", f"p={base}"], ENGINE) as service:
        assert len(set(multiprocessing.active_children()) - before) == 2
        assert text(service, "a") != text(service, "p")
    with pytest.raises(InputError, match="adapters='both'. Use auto, shared, merged"):
        ServeConfig(adapters="both")  # type: ignore[arg-type]
    with Service([f"a={base}+{first}"], ENGINE, ServeConfig(port=0, adapters="shared")) as service:
        (engines,) = service._http._server.store._reserved
        assert len(engines.replicas[0].spec.config.adapters) == 1
    with pytest.raises(InputError, match=r"1 adapters of no model.*Name models MODEL\+ADAPTER"):
        Service([str(base)], replace(ENGINE, adapters=(first,))).start()
    with pytest.raises(InputError, match="tensor_parallel=2 with shared adapters"):
        ModelStore(
            EngineConfig(device="cpu", tensor_parallel=2), replicas=1, max_queue=1, memory_bytes=None,
            metrics=Metrics(), log_level=0, adapters="shared",
        )  # fmt: skip
