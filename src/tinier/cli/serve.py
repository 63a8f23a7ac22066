"""`tinier serve`"""

from pathlib import Path
from typing import Annotated, cast

import typer

from tinier.cli import options, output


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…",
            help="MODEL, NAME=MODEL or NAME@VERSION=MODEL; several share the memory. "
            "NAME=MODEL+ADAPTER: with a LoRA adapter (see --adapters).",
            show_default=False,
        ),
    ],
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; 0.0.0.0 is every network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.")] = 8000,
    uds: Annotated[
        Path | None,
        typer.Option("--uds", help="Listen on this Unix socket, not on host and port."),
    ] = None,
    max_batch_size: Annotated[
        int, typer.Option("--max-batch-size", help="Requests computed at once; more wait.")
    ] = 64,
    max_input_len: Annotated[
        int | None, typer.Option("--max-input-len", help="Prompt tokens at most.")
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            "--max-seq-len",
            help="Prompt and output tokens at most.",
            show_default="what the model takes and the cache has room for",
        ),
    ] = None,
    max_step_tokens: Annotated[
        int,
        typer.Option(
            "--max-step-tokens", help="New tokens in one step; longer prompts go in parts."
        ),
    ] = 2048,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help="For weights and caches of all models, such as 20GB.",
            show_default="most of what is free; on a CPU half, with 1 GiB of cache a model",
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Requests of a model that may wait; more get 429.")
    ] = 256,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds until a request is given up.")
    ] = 600.0,
    drain: Annotated[
        float, typer.Option("--drain", help="Seconds for requests in flight after SIGTERM.")
    ] = 60.0,
    max_body: Annotated[
        str, typer.Option("--max-body", help="Size of a request's body at most.")
    ] = "4MB",
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="TINIER_API_KEY",
            help="Requests must carry one of these; repeatable.",
        ),
    ] = None,
    keep_alive: Annotated[
        float, typer.Option("--keep-alive", help="Seconds that an idle connection stays open.")
    ] = 75.0,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="Web page (https://HOST) that may ask; repeatable; * for all."),
    ] = None,
    allow_load: Annotated[
        Path | None,
        typer.Option(
            "--allow-load", help="Models in this folder may be loaded and unloaded over HTTP."
        ),
    ] = None,
    triton: Annotated[
        bool,
        typer.Option(
            "--triton",
            help="Triton Inference Server on PORT (HTTP), +1 (gRPC), +2 (metrics); OpenAI's API on +3.",
        ),
    ] = False,
    backend: Annotated[
        str, typer.Option("--backend", help="tinier, or vllm: start vLLM on the same model.")
    ] = "tinier",
    draft: options.Draft = None,
    tensor_parallel: options.TensorParallel = 1,
    replicas: Annotated[
        int,
        typer.Option("--replicas", help="Engines of each model, on GPUs of their own, one queue."),
    ] = 1,
    adapters: Annotated[
        str,
        typer.Option(
            "--adapters",
            help="Several adapters of one MODEL: shared, one engine and batch, which is slow on a CPU; "
            "merged, an engine for each; auto, shared on a GPU.",
        ),
    ] = "auto",
    pipeline_parallel: Annotated[
        int,
        typer.Option(
            "--pipeline-parallel", help="vllm: groups of GPUs, or hosts, that share the layers."
        ),
    ] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="vllm: over the hosts of a running Ray cluster.")
    ] = False,
    device: options.Device = "auto",
    int4_inputs: options.Int4Inputs = "int8",
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Serve models over OpenAI's HTTP API until SIGTERM or Ctrl-C.

    /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics, and a page at / that runs a prompt
    on two models side by side.

    \b
    Examples:
      tinier serve smollm2-135m
      tinier serve base=smollm2-135m small=./smollm2-int4 --port 9000 --api-key SECRET
      tinier serve llama@1=./llama llama@2=./llama-fp8 --memory 40GB --allow-load ./models
      tinier serve smollm2-135m --triton
      tinier serve smollm2-135m --draft ./smollm2-int4
      tinier serve plain=./llama a=./llama+./a-lora b=./llama+./b-lora --adapters shared
      tinier serve ./llama-fp8 --replicas 2
      tinier serve ./llama --tensor-parallel 2
      tinier serve ./llama-fp8 --backend vllm --tensor-parallel 4 --pipeline-parallel 2 --ray
    """
    import logging

    from tinier.engine import EngineConfig
    from tinier.errors import InputError
    from tinier.families import open_model
    from tinier.serving import ServeConfig, Source
    from tinier.serving import serve as run_server
    from tinier.serving.config import Adapters
    from tinier.serving.vllm import VllmPlan, serve_vllm

    output.start(quiet=quiet, log_level=log_level)
    if backend not in ("tinier", "vllm"):
        raise InputError(f"backend {backend!r} is not known. Use tinier or vllm.")
    if backend == "tinier" and (ray or pipeline_parallel > 1):
        raise InputError("--ray and --pipeline-parallel are vLLM's. Type: --backend vllm")
    if backend == "vllm" and (triton or uds or len(models) > 1 or replicas > 1 or draft):
        raise InputError(
            "--backend vllm serves one model once, on a port. Leave out --triton, --uds, --replicas, "
            "--draft and further models."
        )
    sources = [Source.parse(model) for model in models]
    engine = EngineConfig(
        max_batch_size=max_batch_size, max_input_len=max_input_len, max_seq_len=max_seq_len,
        max_step_tokens=max(max_step_tokens, max_batch_size), device=device,
        int4_inputs=int4_inputs, draft=draft,
        tensor_parallel=1 if backend == "vllm" else tensor_parallel,
    )  # fmt: skip
    config = ServeConfig(
        host=host, port=port, uds=uds, api_keys=tuple(api_key or ()), max_queue=max_queue, timeout=timeout,
        drain_seconds=drain, keep_alive=keep_alive, cors_origins=tuple(cors or ()),
        max_body_bytes=options.num_bytes(max_body),
        memory_bytes=options.num_bytes(memory) if memory else None, replicas=replicas,
        load_folder=allow_load, triton=triton, adapters=cast(Adapters, adapters),
        log_level=getattr(logging, log_level.upper()),
    )  # fmt: skip
    if backend == "vllm":
        plan = VllmPlan(
            source=sources[0], folder=open_model(sources[0].model).folder, engine=engine, serve=config,
            tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, ray=ray,
        )  # fmt: skip
        serve_vllm(plan)
        return
    run_server(sources, engine, config)
