"""`tinier fit`, killed with SIGKILL once in each of its stages and started again, to its end.

    python -m benchmarks.fit_kills --base DIR --work WORK --out RESULT.json [--limit SECONDS] -- FIT OPTIONS
    python -m benchmarks.fit_kills --shape llama-3.2-3b --work WORK --out RESULT.json -- --max-size 37.5%
        --load 512/128@4 --time 1h

A stage is known by what fit says on stderr when it begins; it is killed four seconds later. --shape makes
a model of random weights. With --limit it stops (killing fit, too) after so many seconds, and goes on when
it is started again: WORK has what was done. RESULT: by stage how long each start ran, what was there after
the kill, and fit.json's winner.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.guide_shape import random_llama

from tinier.benchmark import environment
from tinier.device import pick_device

STAGES = {
    "uniform formats": "int8-sq: measures|fp8: measures",
    "rounding": "fit: rounds",
    "divergences": "fit: measures the divergence",
    "cuts": "fit: measures what layers",
    "speed table": "fit: measures how long",
    "search": "whole models",
    "candidates": "fit: first",
    "healing": "distill ",
    "other points": "fit: spread",
    "training on the grid": "fit: trained",
}
DELAY = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--shape", choices=["llama-3.2-3b"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=float("inf"))
    parser.add_argument("options", nargs="+")
    arguments = parser.parse_args()
    started = time.monotonic()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = arguments.base or arguments.work / "llama-3.2-3b-random-28"
    if not base.exists():
        random_llama(arguments.work, 28)
    run, state = arguments.work / "run", arguments.work / "state.json"
    record: dict[str, Any] = (
        json.loads(state.read_text())
        if state.exists()
        else {"command": sys.argv, "starts": [], "ended": None}
    )
    command = [
        sys.executable,
        "-m",
        "tinier",
        "fit",
        str(base),
        "--out",
        str(run),
        *arguments.options,
    ]
    while record["ended"] is None:
        killed = {start["stage"] for start in record["starts"] if start["how"] == "killed"}
        left = {name: text for name, text in STAGES.items() if name not in killed}
        room = arguments.limit - (time.monotonic() - started)
        if room <= 0:
            break
        record["starts"].append(_start(command, left, arguments.work / "log.txt", room))
        how = record["starts"][-1]["how"]
        if how not in ("killed", "out of time"):
            record["ended"] = how
        record["kept"] = _kept(run)
        state.write_text(json.dumps(record))
        print(record["starts"][-1], flush=True)
    record["environment"] = environment(pick_device("auto"))
    if record["ended"] is not None and (run / "fit.json").exists():
        found = json.loads((run / "fit.json").read_text())
        record |= {key: found[key] for key in ("winner", "winner_figures", "limits", "seconds")}
        record["variants"] = sorted(path.name for path in (run / "variants").iterdir())
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _start(command: list[str], stages: dict[str, str], log: Path, room: float) -> dict[str, Any]:
    """Run fit until one of the stages began, it ended, or the room of seconds is over."""
    began = time.monotonic()
    with log.open("ab") as file:
        at = file.tell()
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        while process.poll() is None:
            time.sleep(0.5)
            said = log.read_bytes()[at:].decode(errors="replace")
            reached = [
                name for name, texts in stages.items() if any(t in said for t in texts.split("|"))
            ]
            late = time.monotonic() - began > room
            if reached or late:
                if reached:
                    time.sleep(DELAY)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                how, stage = ("killed", reached[0]) if reached else ("out of time", None)
                return {"stage": stage, "how": how, "seconds": time.monotonic() - began}
    how = f"exit {process.returncode}"
    return {"stage": None, "how": how, "seconds": time.monotonic() - began}


def _kept(run: Path) -> dict[str, Any]:
    """What a kill left: whole variants, and whether any is half-written under its name."""
    variants = [p for p in run.glob("variants/*") if not p.name.startswith(".")]
    return {
        "variants": sorted(p.name for p in variants if (p / "tinier.json").exists()),
        "half_written": sorted(p.name for p in variants if not (p / "tinier.json").exists()),
        "fit_files": sorted(p.name for p in run.glob("fit/*"))[:20],
    }


if __name__ == "__main__":
    main()
