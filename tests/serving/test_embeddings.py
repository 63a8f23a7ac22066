"""Embeddings are the model's hidden states, of length 1, in OpenAI's shape."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from tests.engine.test_engine import prompts

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams, load_decoder
from tinier.families import open_model
from tinier.serving import Service
from tinier.tokenizer import load_tokenizer

Tiny = Callable[..., Checkpoint]
CPU = torch.device("cpu")


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 7, "max_batch_size": 3}])
def test_the_engine_pools_the_prompt_s_hidden_states(
    tiny: Tiny, pooling: Any, limits: dict[str, int]
) -> None:
    model = tiny()
    engine = Engine(model, EngineConfig(device="cpu", max_seq_len=64, block_size=4, **limits))
    asked = prompts(5) + prompts(1)  # the last one is cached, and computed all the same
    requests = [
        engine.add(prompt, SamplingParams(max_tokens=2, pooling=pooling)) for prompt in asked
    ]
    while engine.has_work:
        engine.step()
    decoder = load_decoder(model, device=CPU)
    for prompt, request in zip(asked, requests, strict=True):
        states = decoder.hidden_states(torch.tensor([prompt]))[0].float()
        expected = states.mean(0) if pooling == "mean" else states[-1]
        assert request.pooled is not None
        assert torch.allclose(request.pooled, expected, atol=1e-4)
        assert len(request.output) == 2


def test_embeddings_over_http(service: Service, model_folders: dict[str, Path]) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    texts = ["Ten green bottles", "hanging on the wall"]
    made = client.embeddings.create(model="one", input=texts)  # asks for base64
    checkpoint = open_model(str(model_folders["one"]))
    decoder, tokenizer = load_decoder(checkpoint, device=CPU), load_tokenizer(checkpoint)
    for i, (text, found) in enumerate(zip(texts, made.data, strict=True)):
        state = decoder.hidden_states(torch.tensor([tokenizer.encode(text)]))[0].float().mean(0)
        expected = (state / state.norm()).numpy()
        assert found.index == i
        assert np.allclose(found.embedding, expected, atol=1e-3)
        assert np.linalg.norm(found.embedding) == pytest.approx(1, abs=1e-5)
    tokens = [tokenizer.encode(text) for text in texts]
    assert made.usage.prompt_tokens == made.usage.total_tokens == sum(map(len, tokens))
    ids = tokens[0]
    asked = {"model": "one", "input": ids, "encoding_format": "float", "pooling": "last"}
    one = httpx.post(f"{service.url}/v1/embeddings", json=asked).json()
    state = decoder.hidden_states(torch.tensor([ids]))[0, -1].float()
    assert np.allclose(one["data"][0]["embedding"], (state / state.norm()).numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": []}, "input"),
        ({"input": "x" * 400}, "400 tokens"),
        ({"input": "x", "dimensions": 8}, "'dimensions' asks for something"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "colour": 1}, "colour"),
        ({"input": "x", "model": "nobody"}, "nobody"),
    ],
)
def test_what_is_refused(service: Service, fields: dict[str, Any], said: str) -> None:
    made = httpx.post(f"{service.url}/v1/embeddings", json={"model": "one"} | fields)
    assert made.status_code in (400, 404)
    assert said in made.text
