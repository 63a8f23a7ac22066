"""Model repositories of the Triton Inference Server: `tinier export --to triton…`.

`model_repository/NAME` holds config.pbtxt and version 1, with the weights in `1/weights`. Its files name
them as a container does that has the repository as /models; serve.txt is the command. Layouts: Triton's
vLLM backend, whose model.json holds the arguments of vLLM's engine, and TensorRT-LLM's
triton_backend/all_models/llmapi.
"""

import json
from pathlib import Path

_MOUNTED = "/models"
_RELEASE = "26.09"
"""Of Triton's containers, when this was written"""
_LLMAPI_INPUTS = {
    "text_input": "STRING", "streaming": "BOOL", "sampling_param_best_of": "INT32",
    "sampling_param_temperature": "FP32", "sampling_param_top_k": "INT32", "sampling_param_top_p": "FP32",
    "sampling_param_frequency_penalty": "FP32", "sampling_param_presence_penalty": "FP32",
    "sampling_param_max_tokens": "INT32", "sampling_param_stop": "STRING",
    "sampling_param_seed": "UINT64", "sampling_param_exclude_input_from_output": "BOOL",
    "sampling_param_return_perf_metrics": "BOOL", "return_finish_reason": "BOOL",
    "return_stop_reason": "BOOL", "return_cumulative_logprob": "BOOL", "stop": "BOOL",
}  # fmt: skip
_LLMAPI_OUTPUTS = {
    "text_output": "STRING", "finish_reason": "STRING", "stop_reason": "STRING",
    "cumulative_logprob": "FP32", "kv_cache_reused_block": "INT32", "kv_cache_missed_block": "INT32",
    "kv_cache_alloc_new_blocks": "INT32", "kv_cache_alloc_total_blocks": "INT32",
    "kv_cache_hit_rate": "FP32", "arrival_time_ns": "INT64", "first_scheduled_time_ns": "INT64",
    "first_token_time_ns": "INT64", "last_token_time_ns": "INT64", "acceptance_rate": "FP32",
    "total_accepted_draft_tokens": "INT32", "total_draft_tokens": "INT32",
}  # fmt: skip
_TIMES_AND_COUNTS = (
    "arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns",
    "acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens",
)  # fmt: skip


def weights_folder(name: str) -> Path:
    """Where the weights of a model are in an export."""
    return _model(name) / "1" / "weights"


def engine_repository(name: str) -> dict[str, str]:
    """The Python backend with tinier's engine: the model starts `tinier serve` and hands requests on."""
    from tinier.serving.config import MAX_BATCH_SIZE
    from tinier.serving.triton import python_config

    model = Path(__file__).parents[1] / "serving" / "triton_model.py"
    options = f"--max-batch-size {MAX_BATCH_SIZE}"
    config = python_config(
        name, {"tinier_serve": options}, decoupled=True, max_batch_size=MAX_BATCH_SIZE, stream=True
    )
    return {
        str(_model(name) / "config.pbtxt"): config,
        str(_model(name) / "1" / "model.py"): model.read_text(encoding="utf-8"),
        "serve.txt": _serve(
            "trtllm-python-py3",
            f"pip install /models/tinier-*.whl && {_TRITON}",
            "In a checkout of tinier: pip wheel --no-deps -w THIS_FOLDER/model_repository .\n"
            "# Any image of Triton with the Python backend. TINIER_PYTHON names another Python that has\n"
            "# tinier; options of `tinier serve` are in config.pbtxt.",
        ),
    }


def vllm_repository(name: str) -> dict[str, str]:
    """The vLLM backend's: config.pbtxt and the arguments of vLLM's engine."""
    engine = {"model": f"{_MOUNTED}/{name}/1/weights", "gpu_memory_utilization": 0.9}
    config = (
        f'name: "{name}"\nbackend: "vllm"\ninstance_group [ {{ count: 1 kind: KIND_MODEL }} ]\n'
    )
    return {
        str(_model(name) / "config.pbtxt"): config,
        str(_model(name) / "1" / "model.json"): json.dumps(engine, indent=1) + "\n",
        "serve.txt": _serve(
            "vllm-python-py3", _TRITON, "More arguments of vLLM go into 1/model.json."
        ),
    }


def tensorrt_repository(name: str) -> dict[str, str]:
    """TensorRT-LLM's llmapi model, but for its Python files: those are of the container's version."""
    yaml = f"""model: {_MOUNTED}/{name}/1/weights
backend: "pytorch"
tensor_parallel_size: 1
pipeline_parallel_size: 1
triton_config:
  max_batch_size: 0
  decoupled: False
"""
    inputs = ",\n".join(
        _tensor(n, t, optional=n != "text_input") for n, t in _LLMAPI_INPUTS.items()
    )
    outputs = ",\n".join(_tensor(n, t, optional=False) for n, t in _LLMAPI_OUTPUTS.items())
    config = f"""name: "{name}"
backend: "python"
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
input [
{inputs}
]
output [
{outputs}
]
"""
    version = "$(python3 -c 'import tensorrt_llm as t; print(t.__version__)' | tail -1)"
    files = "/tmp/t/triton_backend/all_models/llmapi/tensorrt_llm/1/*.py"
    fetch = (
        f"git clone -q --depth 1 -b v{version} https://github.com/NVIDIA/TensorRT-LLM /tmp/t && "
        f"cp {files} {_MOUNTED}/{name}/1/"
    )
    return {
        str(_model(name) / "config.pbtxt"): config,
        str(_model(name) / "1" / "model.yaml"): yaml,
        "serve.txt": _serve(
            "trtllm-python-py3",
            f"{fetch} && {_TRITON}",
            "model.py and helpers.py are TensorRT-LLM's own, of the container's version.",
        ),
    }


_TRITON = f"tritonserver --model-repository {_MOUNTED}"


def _model(name: str) -> Path:
    return Path("model_repository") / name


def _tensor(name: str, kind: str, *, optional: bool) -> str:
    lists = name in ("text_input", "sampling_param_stop")
    one = name in _TIMES_AND_COUNTS or (name in _LLMAPI_INPUTS and not lists)
    more = " optional: true" if optional else ""
    return f'  {{ name: "{name}" data_type: TYPE_{kind} dims: [ {1 if one else -1} ]{more} }}'


def _serve(image: str, command: str, note: str) -> str:
    """serve.txt: how to start it in a container of Triton."""
    return (
        f"# {note}\n"
        f'docker run --rm --gpus all --net host --shm-size 2g -v "$PWD/model_repository:{_MOUNTED}" \\\n'
        f"  nvcr.io/nvidia/tritonserver:{_RELEASE}-{image} bash -c \\\n"
        f'  "{command}"\n'
    )
