"""Two processes that share a model answer as one does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import quantize_tiny
from tests.engine.test_engine import prompts

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams, load_decoder
from tinier.engine.parallel import Share
from tinier.errors import InputError
from tinier.families import open_model

Tiny = Callable[..., Checkpoint]

# argv: folders, and where the first process writes [folder: outputs]
SCRIPT = """
import json, sys, torch
from pathlib import Path
from tests.engine.test_parallel import answers
torch.set_num_threads(1)
*folders, out = sys.argv[1:]
found = {folder: answers(folder, 2) for folder in folders}
if torch.distributed.get_rank() == 0:
    Path(out).write_text(json.dumps(found))
"""


def answers(folder: str, processes: int) -> list[list[float]]:
    """Greedy and drawn text of a few prompts, and the log-probabilities of one."""
    config = EngineConfig(
        max_batch_size=4, max_seq_len=96, block_size=4, tensor_parallel=processes, device="cpu"
    )
    engine = Engine(open_model(Path(folder)), config)
    greedy = engine.generate(prompts(5), SamplingParams(max_tokens=12))
    drawn = engine.generate(prompts(3), SamplingParams(max_tokens=8, temperature=0.7, seed=1))
    request = engine.add(prompts(1)[0], SamplingParams(max_tokens=1, prompt_logprobs=0))
    while engine.has_work:
        engine.step()
    scores = [[round(entry.logprob, 3) for entry in request.prompt_logprobs]]
    return [*map(list, greedy), *map(list, drawn), *scores]


def test_two_processes_answer_as_one(tiny: Tiny, tmp_path: Path) -> None:
    models = [tiny(family, name=family) for family in ("llama", "mistral", "qwen2", "qwen3")]
    models.append(tiny(name="untied", tie_word_embeddings=False, vocab_size=265))  # not even
    models += [
        quantize_tiny(models[0], preset, tmp_path / preset) for preset in ("int4", "fp8-static")
    ]
    folders = [str(model.folder) for model in models]
    out = tmp_path / "answers.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(script), *folders, str(out)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(out.read_text())
    for folder in folders:
        alone = answers(folder, 1)
        assert shared[folder][:-1] == alone[:-1], folder
        assert shared[folder][-1] == pytest.approx(alone[-1], abs=2e-3)


def test_what_cannot_be_shared_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="tensor_parallel=2 with 1 process"):
        Engine(tiny(), EngineConfig(tensor_parallel=2, device="cpu"))
    with pytest.raises(InputError, match=r"does not divide the model's heads \(4\)"):
        load_decoder(tiny(name="b"), device=torch.device("cpu"), share=Share(0, 3))
