"""Picks the next token from logits. Greedy at temperature 0, else temperature, top-k and top-p."""

import torch
from torch import Tensor

from tinier.engine.request import Request


def sample(logits: Tensor, requests: list[Request]) -> list[int]:
    """The next token of each request. logits: [len(requests), vocab].

    A request's draw depends on its own seed, its logits and how many tokens it has, so other
    requests in the batch do not change it.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for i, request in enumerate(requests):
        if request.params.temperature > 0:
            tokens[i] = _draw(logits[i].float().cpu(), request)
    return tokens


def _draw(logits: Tensor, request: Request) -> int:
    params = request.params
    probabilities = torch.softmax(logits / params.temperature, dim=-1)
    ranked, order = probabilities.sort(descending=True, stable=True)
    if params.top_k:
        ranked[params.top_k :] = 0
        ranked /= ranked.sum()
    # keep the tokens before which less than top_p has been seen: never fewer than one
    ranked[ranked.cumsum(0) - ranked >= params.top_p] = 0
    generator = torch.Generator().manual_seed(params.seed * 1_000_003 + len(request.output))
    return int(order[torch.multinomial(ranked, 1, generator=generator)])
