"""Speed and memory of an engine, and the record of what it ran on.

Start at `compare_speed` (speed.py) and `measure_memory` (memory.py).
"""

from tinier.benchmark.environment import environment
from tinier.benchmark.memory import ServingMemory, measure_memory
from tinier.benchmark.speed import SpeedResult, Statistic, Workload, compare_speed

__all__ = [
    "ServingMemory",
    "SpeedResult",
    "Statistic",
    "Workload",
    "compare_speed",
    "environment",
    "measure_memory",
]
