"""Serving: OpenAI's HTTP API over any number of models, each with an engine in a process of its own.

Start at `serve` (server.py). A request goes through app.py (HTTP), generation.py (text) and model.py (the
process's handle) to worker.py (the engine). From Python: `Service` and `query`.
"""

from tinier.serving.client import query
from tinier.serving.config import MAX_BATCH_SIZE, ServeConfig
from tinier.serving.server import Service, serve
from tinier.serving.store import Source

__all__ = ["MAX_BATCH_SIZE", "ServeConfig", "Service", "Source", "query", "serve"]
