"""What a stage is about to do, and the hash that says whether it was done already."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from tinier.checkpoint.folder import Checkpoint
from tinier.checkpoint.manifest import Manifest, stage_key
from tinier.device import peak_memory_bytes


@dataclass(frozen=True)
class StagePlan:
    """A checked stage, ready to run. Two plans with equal keys write the same checkpoint."""

    stage: str
    parameters: dict[str, Any]
    inputs: dict[str, Checkpoint]
    """`source`, and `teacher` when distilling."""
    output_config: dict[str, Any]
    """The config.json that the stage will write."""
    output_bytes: int
    """About how large the result will be on disk."""
    memory_bytes: int
    """About how much memory the stage takes, on the device it computes on."""
    flops: float
    """About how much arithmetic it takes."""
    code: str
    """Digest of the code that the result depends on."""
    warnings: tuple[str, ...] = field(default=(), kw_only=True)
    """What the user should know before the work; kept in the manifest."""

    @cached_property
    def parents(self) -> dict[str, str]:
        """Content hash of each input."""
        return {role: checkpoint.hash for role, checkpoint in self.inputs.items()}

    def manifest(
        self,
        *,
        started: float,
        device: torch.device,
        layers: dict[str, dict[str, float | None]] | None = None,
        measures: dict[str, Any] | None = None,
        warnings: list[str] | None = None,
    ) -> Manifest:
        """What to write beside the result. started: time.monotonic() when the stage began."""
        return Manifest(
            stage=self.stage,
            parameters=self.parameters,
            parents=self.parents,
            key=self.key,
            seconds=time.monotonic() - started,
            peak_memory_bytes=peak_memory_bytes(device),
            device=str(device),
            layers=layers or {},
            measures=measures or {},
            warnings=[*self.all_warnings, *(warnings or [])],
        )

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The plan's, and what the inputs' files do other than they say."""
        notes = [f"{c.folder.name}: {note}" for c in self.inputs.values() for note in c.notes]
        return (*dict.fromkeys(notes), *self.warnings)

    def estimated_seconds(self, flops_per_s: float) -> float:
        """Arithmetic at that speed plus reading and writing the files at about 200 MB/s, which is
        what rounding 16-bit weights reaches on two cores."""
        return self.flops / flops_per_s + self.inputs["source"].weight_bytes / 2e8

    @cached_property
    def key(self) -> str:
        return stage_key(self.stage, self.parameters, self.parents, self.code)
