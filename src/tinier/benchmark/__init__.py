"""Speed and memory of an engine, and the record of what it ran on.

Start at `bench` (speed.py) and `measure_memory` (memory.py).
"""

from tinier.benchmark.environment import environment
from tinier.benchmark.memory import ServingMemory, measure_memory
from tinier.benchmark.speed import SpeedResult, Statistic, Workload, bench, compare_speed

__all__ = [
    "ServingMemory",
    "SpeedResult",
    "Statistic",
    "Workload",
    "bench",
    "compare_speed",
    "environment",
    "measure_memory",
]
