"""The inference engine: continuous batching over a paged KV cache, on our own decoder.

Start at `Engine` (engine.py). `step()` is: the scheduler picks tokens (scheduler.py), the runner
computes them (runner.py, decoder.py), the sampler picks the next ones (sampler.py). `blocks.py`
hands out cache blocks, `request.py` is one user's request.
"""

from tinier.engine.config import EngineConfig
from tinier.engine.decoder import Decoder, load_decoder
from tinier.engine.engine import Engine
from tinier.engine.generation import Generation, generate
from tinier.engine.request import Limits, Request, SamplingParams, TokenLogprobs

__all__ = [
    "Decoder",
    "Engine",
    "EngineConfig",
    "Generation",
    "Limits",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
    "generate",
    "load_decoder",
]
