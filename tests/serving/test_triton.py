"""The real Triton server, as `tritonclient` sees it over both protocols."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.serving.conftest import ENGINE

from tinier.errors import InputError
from tinier.exporting import export
from tinier.families import open_model
from tinier.serving import ServeConfig, Service
from tinier.serving.triton import check_installed, packages_folder

http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
grpc = pytest.importorskip("tritonclient.grpc")

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.filterwarnings("default")]
PORT = 18_500
TEXT = "Ten green bottles"


@pytest.fixture(scope="module")
def installed() -> Path:
    """The folder of tritonserver."""
    try:
        return check_installed()
    except InputError as error:
        if "pip install" not in str(error):
            pytest.skip(str(error))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target",
                   str(packages_folder()), "nvidia-pytriton==0.7.0", "numpy<2"]  # fmt: skip
        if subprocess.run(command, check=False).returncode:
            pytest.skip("needs a package index")
        try:
            return check_installed()
        except InputError as still:
            pytest.skip(str(still))


@pytest.fixture(scope="module")
def triton(installed: Path, model_folders: dict[str, Path]) -> Iterator[Service]:
    one, two = model_folders.values()
    config = ServeConfig(port=PORT, triton=True)
    service = Service([f"m@1={one}", f"m@2={two}", f"other={two}"], ENGINE, config)
    with pytest.MonkeyPatch.context() as patch:
        # as in an activated virtual environment, whose numpy Triton must not take
        patch.setenv("PATH", f"{sys.prefix}/bin", prepend=os.pathsep)
        with service as running:
            yield running


def inputs(module: Any, texts: list[str], max_tokens: int, **more: object) -> list[Any]:
    kinds = {np.dtype("int32"): "INT32", np.dtype("float32"): "FP32", np.dtype("bool"): "BOOL",
             np.dtype("uint64"): "UINT64", np.dtype("O"): "BYTES"}  # fmt: skip
    arrays = {
        "text_input": np.array([[text.encode()] for text in texts], dtype=np.object_),
        "max_tokens": np.full((len(texts), 1), max_tokens, dtype=np.int32),
    }
    for name, value in more.items():
        dtype = np.object_ if isinstance(value, bytes) else None
        arrays[name] = np.array([[value]] * len(texts), dtype=dtype)
    made = []
    for name, array in arrays.items():
        one = module.InferInput(name, list(array.shape), kinds[array.dtype])
        one.set_data_from_numpy(array)
        made.append(one)
    return made


def openai_text(service: Service, model: str, max_tokens: int, text: str = TEXT) -> str:
    body = {"model": model, "prompt": text, "max_tokens": max_tokens, "temperature": 0}
    answer = httpx.post(f"{service.url}/v1/completions", json=body)
    return str(answer.json()["choices"][0]["text"])


def text_of(result: Any, row: int = 0) -> str:
    return str(result.as_numpy("text_output")[row][0].decode())


def test_both_protocols_give_the_engine_s_text(triton: Service) -> None:
    expected = openai_text(triton, "m@2", 12)
    over_http = http.InferenceServerClient(f"127.0.0.1:{PORT}")
    over_grpc = grpc.InferenceServerClient(f"127.0.0.1:{PORT + 1}")
    for client, module in ((over_http, http), (over_grpc, grpc)):
        assert client.is_server_live()
        assert client.is_server_ready()
        result = client.infer("m", inputs(module, [TEXT], 12))
        assert text_of(result) == expected
        assert text_of(
            client.infer("m", inputs(module, [TEXT], 12), model_version="1")
        ) == openai_text(triton, "m@1", 12)
        assert text_of(client.infer("other", inputs(module, [TEXT], 12))) == expected


def test_batches_and_many_clients(triton: Service) -> None:
    client = grpc.InferenceServerClient(f"127.0.0.1:{PORT + 1}")
    texts = [f"number {i}" for i in range(4)]
    result = client.infer("m", inputs(grpc, texts, 10))
    expected = [openai_text(triton, "m", 10, text) for text in texts]
    assert [text_of(result, i) for i in range(4)] == expected
    made: dict[int, str] = {}

    def ask(i: int) -> None:
        made[i] = text_of(client.infer("m", inputs(grpc, [texts[i % 4]], 10)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made[i] for i in range(16)] == expected * 4


def test_streaming_over_grpc(triton: Service) -> None:
    client = grpc.InferenceServerClient(f"127.0.0.1:{PORT + 1}")
    pieces: list[str] = []
    done = threading.Event()

    def take(result: Any, error: Exception | None) -> None:
        assert error is None
        if result.get_response().parameters["triton_final_response"].bool_param:
            done.set()
        else:
            pieces.append(text_of(result))

    client.start_stream(take)
    client.async_stream_infer(
        "m_stream", inputs(grpc, [TEXT], 12), enable_empty_final_response=True
    )
    assert done.wait(30)
    client.stop_stream()
    assert len(pieces) > 1
    assert "".join(pieces) == openai_text(triton, "m", 12)


def test_sampling_stops_and_scores(triton: Service) -> None:
    client = http.InferenceServerClient(f"127.0.0.1:{PORT}")
    sampled = {"temperature": np.float32(1), "random_seed": np.uint64(7)}
    one, again = (text_of(client.infer("m", inputs(http, [TEXT], 12, **sampled))) for _ in range(2))
    assert one == again
    text = openai_text(triton, "m", 12)
    stopped = client.infer("m", inputs(http, [TEXT], 12, stop_words=text[3:5].encode()))
    assert text_of(stopped) == text[: text.index(text[3:5])]
    assert stopped.as_numpy("finish_reason")[0][0] == b"stop"
    scored = client.infer("m", inputs(http, [TEXT], 5, return_log_probs=np.bool_(1)))
    scores = scored.as_numpy("output_log_probs")[0]
    assert len(scores) == 5
    assert scored.as_numpy("cum_log_probs")[0][0] == pytest.approx(scores.sum(), rel=1e-5)


def test_errors_are_the_server_s(triton: Service) -> None:
    client = http.InferenceServerClient(f"127.0.0.1:{PORT}")
    with pytest.raises(Exception, match="maximum context length"):
        client.infer("m", inputs(http, [TEXT], 100_000))
    with pytest.raises(Exception, match="temperature"):
        client.infer("m", inputs(http, [TEXT], 5, temperature=np.float32(9)))
    with pytest.raises(Exception, match="unknown model|not found"):
        client.infer("nothing", inputs(http, [TEXT], 5))
    assert text_of(client.infer("m", inputs(http, [TEXT], 5))) == openai_text(triton, "m", 5)


def test_fields_that_are_missing_or_unknown_are_named(triton: Service) -> None:
    url = f"http://127.0.0.1:{PORT}/v2/models/m/generate"
    missing = httpx.post(url, json={"max_tokens": 3}, timeout=30)
    assert missing.status_code == 400
    assert "text_input" in missing.text
    assert "NoneType" not in missing.text
    unknown = httpx.post(url, json={"text_input": "x", "max_token": 3}, timeout=30)
    assert unknown.status_code >= 400
    assert "max_token is not known" in unknown.text
    known = httpx.post(url, json={"text_input": "x", "max_tokens": 3, "stream": False}, timeout=30)
    assert known.status_code == 200


def test_load_unload_metrics_and_statistics(triton: Service) -> None:
    client = http.InferenceServerClient(f"127.0.0.1:{PORT}")
    names = {(m["name"], m["version"]) for m in client.get_model_repository_index()}
    assert {("m", "1"), ("m", "2"), ("m_stream", "2"), ("other", "1")} <= names
    expected = text_of(client.infer("other", inputs(http, [TEXT], 5)))
    for name in ("other", "other_stream"):
        client.unload_model(name)
    for _ in range(100):
        models = httpx.get(f"{triton.url}/v1/models").json()["data"]
        if "other" not in [m["id"] for m in models]:
            break
        threading.Event().wait(0.1)
    assert not client.is_model_ready("other")
    assert "other" not in [m["id"] for m in models]
    client.load_model("other")
    assert text_of(client.infer("other", inputs(http, [TEXT], 5))) == expected
    stats = client.get_inference_statistics("other")["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] >= 1
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT + 2}/metrics") as answer:
        assert "nv_inference_request_success" in answer.read().decode()


def test_each_row_of_a_batch_has_its_own_parameters(triton: Service) -> None:
    with http.InferenceServerClient(f"127.0.0.1:{PORT}") as client:
        asked = inputs(http, [TEXT, TEXT], 3)
        asked[1].set_data_from_numpy(np.array([[3], [9]], dtype=np.int32))
        texts = client.infer("other", asked).as_numpy("text_output").reshape(-1)
    assert [text.decode() for text in texts] == [openai_text(triton, "other", n) for n in (3, 9)]


def test_a_key_closes_triton_s_ports_too(triton: Service, model_folders: dict[str, Path]) -> None:
    config = ServeConfig(port=PORT + 10, triton=True, api_keys=("secret",))
    with Service([f"m={model_folders['one']}"], ENGINE, config):
        for module, port, name in (
            (http, PORT + 10, "authorization"),
            (grpc, PORT + 11, "triton-grpc-protocol-authorization"),
        ):
            allowed = {name: "Bearer secret"}
            with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
                assert client.is_server_ready()
                for headers in (None, {name: "Bearer other"}):
                    with pytest.raises(Exception, match="restricted"):
                        client.infer("m", inputs(module, [TEXT], 3), headers=headers)
                    with pytest.raises(Exception, match="restricted"):
                        client.unload_model("m", headers=headers)
                made = client.infer("m", inputs(module, [TEXT], 3), headers=allowed)
                assert made.as_numpy("text_output").shape == (1, 1)
        for line in Path("/proc").glob("[0-9]*/cmdline"):  # which everyone can read
            with contextlib.suppress(OSError):
                assert b"secret" not in line.read_bytes()


def test_triton_is_not_opened_to_a_network_without_a_key() -> None:
    with pytest.raises(InputError, match="lets everyone who can connect run programs"):
        ServeConfig(host="0.0.0.0", triton=True)


@pytest.fixture
def repository(installed: Path, tmp_path: Path, model_folders: dict[str, Path]) -> Iterator[int]:
    """tritonserver on `tinier export --to triton`; its HTTP port, gRPC is the next one."""
    made, port = tmp_path / "made", PORT + 20
    export(open_model(model_folders["one"]), "triton", made)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backends = shutil.copytree(installed / "backends", tmp_path / "backends")
    stub = installed / "python_backend_stubs" / version / "triton_python_backend_stub"
    (backends / "python" / stub.name).symlink_to(stub)
    environ = os.environ | {
        "TINIER_PACKAGES": str(packages_folder()), "TINIER_PYTHON": sys.executable,
        "PATH": os.defpath,
    }  # fmt: skip
    command = [
        installed / "bin" / "tritonserver", f"--model-repository={made / 'model_repository'}",
        f"--backend-directory={backends}", f"--http-port={port}", f"--grpc-port={port + 1}",
        "--allow-metrics=false",
    ]  # fmt: skip
    with subprocess.Popen(command, env=environ) as process:
        yield port
        process.terminate()


def test_an_exported_repository_runs_tinier_s_engine(repository: int, service: Service) -> None:
    client = http.InferenceServerClient(f"127.0.0.1:{repository}")
    for _ in range(600):
        with contextlib.suppress(Exception):
            if client.is_model_ready("made"):
                break
        time.sleep(0.1)
    expected = openai_text(service, "one", 8)
    body = {"text_input": TEXT, "max_tokens": 8}
    url = f"http://127.0.0.1:{repository}/v2/models/made"
    assert httpx.post(f"{url}/generate", json=body).json()["text_output"] == expected
    lines = httpx.post(f"{url}/generate_stream", json=body | {"stream": True}).text.splitlines()
    pieces = [json.loads(line[6:])["text_output"] for line in lines if line.startswith("data: ")]
    assert len(pieces) > 1
    assert "".join(pieces) == expected
    refused = httpx.post(f"{url}/generate", json=body | {"beam_width": 2})
    assert refused.status_code == 400
    assert "beam_width" in refused.text
