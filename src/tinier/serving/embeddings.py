"""`POST /v1/embeddings`: a decoder's hidden states over a text, as one vector of length 1.

They are what the model predicts the next token from, after the final norm: the mean over the text's
tokens, or the last one's. A model that was trained for embeddings says which; others were not made for
comparing texts, and do it roughly.
"""

import asyncio
import base64
import math
import struct
from typing import Any

from tinier.engine import SamplingParams
from tinier.errors import InputError
from tinier.serving.generation import encode
from tinier.serving.model import Job, Model
from tinier.serving.protocol import EmbeddingsBody

# the vector is there after the prompt; one token is sampled beside it and not given
_ONE_TOKEN = 1


class Embeddings:
    """The vectors of one HTTP request. `close` must be called: it ends what is still computed."""

    def __init__(self, model: Model, jobs: list[Job], body: EmbeddingsBody) -> None:
        self._model, self._jobs, self._body = model, jobs, body

    async def whole(self) -> dict[str, Any]:
        """The answer as one object. Raises InputError for hidden states that are no numbers."""
        vectors = await asyncio.gather(*map(_vector, self._jobs))
        tokens = sum(len(job.prompt) for job in self._jobs)
        data = [
            {"object": "embedding", "index": i, "embedding": self._encoded(vector)}
            for i, vector in enumerate(vectors)
        ]
        return {
            "object": "list", "data": data, "model": self._body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }  # fmt: skip

    def close(self) -> None:
        for job in self._jobs:
            self._model.cancel(job)

    def _encoded(self, vector: list[float]) -> list[float] | str:
        if self._body.encoding_format == "base64":
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        return vector


async def start_embeddings(model: Model, body: EmbeddingsBody) -> Embeddings:
    """Raises InputError, Overloaded or Unavailable."""
    params = SamplingParams(max_tokens=_ONE_TOKEN, pooling=body.pooling or "mean")
    asked = [(await encode(model, given), params) for given in body.inputs]
    jobs = [job for some in model.submit_all(asked) for job in some]
    return Embeddings(model, jobs, body)


async def _vector(job: Job) -> list[float]:
    async for _ in job.deltas():
        pass
    pooled = job.pooled
    assert pooled is not None
    length = math.sqrt(sum(value * value for value in pooled))
    if not 0 < length < math.inf:
        raise InputError("the model's hidden states are no numbers (NaN or Inf)")
    return [value / length for value in pooled]
