"""Speed and memory of an engine, load on a server, and the record of what they ran on.

Start at `bench` (speed.py), `measure_memory` (memory.py) and `load` (load.py).
"""

from tinier.benchmark.environment import environment
from tinier.benchmark.load import (
    TARGETS,
    Endpoint,
    Load,
    LoadResult,
    base_url,
    find_aiperf,
    load,
    served_models,
)
from tinier.benchmark.memory import ServingMemory, gpu_memory, measure_memory
from tinier.benchmark.speed import (
    SpeedResult,
    Statistic,
    Workload,
    bench,
    compare_speed,
    engine_for,
)

__all__ = [
    "TARGETS",
    "Endpoint",
    "Load",
    "LoadResult",
    "ServingMemory",
    "SpeedResult",
    "Statistic",
    "Workload",
    "base_url",
    "bench",
    "compare_speed",
    "engine_for",
    "environment",
    "find_aiperf",
    "gpu_memory",
    "load",
    "measure_memory",
    "served_models",
]
