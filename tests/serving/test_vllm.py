"""What vLLM is started with; that it starts is seen by hand, as it needs an environment of its own."""

from pathlib import Path

import pytest

from tinier.engine import EngineConfig
from tinier.errors import InputError
from tinier.serving import ServeConfig, Source
from tinier.serving.vllm import VllmPlan, serve_vllm

SOURCE = Source("llama", None, "./llama")


def test_the_command_names_every_limit_and_no_key() -> None:
    plan = VllmPlan(
        source=SOURCE, folder=Path("/models/llama"), tensor_parallel=4, pipeline_parallel=2, ray=True,
        engine=EngineConfig(max_batch_size=16, max_seq_len=8192),
        serve=ServeConfig(port=9000, api_keys=("secret",)),
    )  # fmt: skip
    command = plan.command()
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    for option in (
        "--model=/models/llama", "--served-model-name=llama", "--port=9000", "--max-num-seqs=16",
        "--max-model-len=8192", "--tensor-parallel-size=4", "--pipeline-parallel-size=2",
        "--distributed-executor-backend=ray",
    ):  # fmt: skip
        assert option in command
    assert "secret" not in " ".join(command)


def test_no_vllm_is_said_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINIER_VLLM_PYTHON", "/nowhere/python")
    plan = VllmPlan(source=SOURCE, folder=Path("m"), engine=EngineConfig(), serve=ServeConfig())
    with pytest.raises(InputError, match="TINIER_VLLM_PYTHON=/path"):
        serve_vllm(plan)
