"""Which chain for which use, and what is wrong: `advise` (advise.py) and `examine_…` (doctor.py)."""

from tinier.advice.advise import USES, Advice, advise, advise_from_run
from tinier.advice.doctor import Finding, examine_checkpoint, examine_machine, examine_run
from tinier.advice.hardware import DEVICES, Hardware, device_named

__all__ = [
    "DEVICES",
    "USES",
    "Advice",
    "Finding",
    "Hardware",
    "advise",
    "advise_from_run",
    "device_named",
    "examine_checkpoint",
    "examine_machine",
    "examine_run",
]
