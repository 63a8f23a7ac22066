"""`tinier generate`"""

from typing import Annotated

import typer

from tinier.cli import options, output


def generate(
    model: options.Model,
    prompt: Annotated[
        str, typer.Option("--prompt", help="Text to continue; - reads stdin.", show_default=False)
    ],
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Output tokens at most.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0: greedy; more: more random.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Among the k likeliest; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Among the likeliest of this probability.")
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option("--min-p", help="Among those at least this share as likely as the best."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: seen tokens become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Off the logit of each token in the output.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option("--frequency-penalty", help="The same, for each time that it is there.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")
    ] = None,
    draft: options.Draft = None,
    tensor_parallel: options.TensorParallel = 1,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    device: options.Device = "auto",
    int4_inputs: options.Int4Inputs = "int8",
    json: options.Json = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "warning",
    debug: options.Debug = False,
) -> None:
    """Continue a prompt, streaming to the terminal.

    \b
    Examples:
      tinier generate smollm2-135m --prompt "The capital of France is"
      tinier generate smollm2-int4 --chat --prompt "Why is the sky blue?" --temperature 0.7
      tinier generate smollm2-135m --prompt "Red, green," --stop . --repetition-penalty 1.1
      tinier generate smollm2-135m --draft smollm2-int4 --prompt "Hello"
      tinier generate MODEL --tensor-parallel 2 --prompt "Hello"
    """
    from tinier.engine import SamplingParams
    from tinier.engine import generate as run_generate
    from tinier.families import open_model

    output.start(quiet=quiet, log_level=log_level)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    made = run_generate(
        open_model(model, revision), _standard_input() if prompt == "-" else prompt, params,
        chat=chat, tensor_parallel=tensor_parallel, device=device, int4_inputs=int4_inputs,
        draft=draft,
    )  # fmt: skip
    for piece in made:
        if not json:
            print(piece, end="", flush=True)
    data = {"model": model, "prompt_tokens": made.prompt_tokens, "output_tokens": made.output_tokens,
            "text": made.text}  # fmt: skip
    if draft:
        data |= dict(zip(("drafted_tokens", "accepted_tokens"), made.drafted, strict=True))
    output.result("", data, as_json=json)


def _standard_input() -> str:
    import sys

    from tinier.errors import InputError

    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: {error}.") from None
