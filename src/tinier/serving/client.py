"""Ask a server from Python without the `openai` package."""

import json
import urllib.error
import urllib.request

from tinier.benchmark import base_url, served_models
from tinier.errors import InputError, MeasuredFailure


def query(
    url: str,
    prompts: str | list[str],
    *,
    model: str | None = None,
    max_tokens: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    api_key: str | None = None,
    timeout: float = 600.0,
) -> list[str]:
    """What the model writes after each prompt; any OpenAI endpoint at http://HOST:PORT will do.

    model: as the server names it; None: its first. temperature 0 is greedy. timeout: seconds. Raises
    InputError where nothing answers or the request is refused, MeasuredFailure for an error of the server.
    """
    url = base_url(url)
    asked = {
        "model": model or served_models(url, api_key)[0],
        "prompt": [prompts] if isinstance(prompts, str) else prompts,
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            choices = json.load(answer)["choices"]
    except urllib.error.HTTPError as error:
        kind = InputError if error.code < 500 else MeasuredFailure
        raise kind(
            f"{url} answered {error.code}: {error.read().decode(errors='replace')}"
        ) from None
    except OSError as error:
        raise InputError(
            f"{url} does not answer: {error}. Start the server, or check the URL."
        ) from None
    return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]
