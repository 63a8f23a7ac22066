"""Calibration text that the model writes itself: it shows the quantizer what the model is used to.

Start at `written_windows`. Every window starts as the model's own text would (an instruct model with
the opening of a user's turn) and is sampled at temperature 1 to its full length.
"""

import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import check_length
from tinier.tokenizer import Tokenizer, load_tokenizer

_IN_FLIGHT = 32


def written_windows(
    checkpoint: Checkpoint, count: int, length: int, *, seed: int, device: torch.device
) -> Tensor:
    """Token ids [count, length] that the model samples. Raises InputError for too long a length."""
    check_length(checkpoint, length)
    tokenizer = load_tokenizer(checkpoint)
    opening = _opening(tokenizer)
    config = EngineConfig(
        max_batch_size=min(count, _IN_FLIGHT), max_seq_len=length, device=device.type
    )
    engine = Engine(checkpoint, config)
    requests = [
        engine.add(
            opening,
            SamplingParams(
                max_tokens=length - len(opening), temperature=1.0, seed=seed + i, stop_token_ids=()
            ),
        )
        for i in range(count)
    ]
    while engine.has_work:
        engine.step()
    return torch.tensor([opening + request.output for request in requests])


def _opening(tokenizer: Tokenizer) -> list[int]:
    """Tokens that a text of the model starts with; never none."""
    if tokenizer.has_template:
        marker = "\x00"
        opened = tokenizer.chat([{"role": "user", "content": marker}], opens_reply=False)
        ids = tokenizer.encode(opened.split(marker)[0], special=False)
        if ids:
            return ids
    known = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    return [known[0] if known else 0]
