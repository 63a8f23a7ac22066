"""Text that the model writes itself, to calibrate and to train on.

Start at `written_windows`. A window starts as the model's own text would (an instruct model with the
opening of a user's turn), or goes on from a piece of another text, so that it is of that kind; it is
sampled at temperature 1 to its full length.
"""

import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.engine import Engine, EngineConfig, SamplingParams
from tinier.families import check_length
from tinier.tokenizer import Tokenizer, load_tokenizer

_IN_FLIGHT = {"cpu": 32, "cuda": 256}
# of a window are the text's that it goes on from
_OPENING_SHARE = 8


def written_windows(
    checkpoint: Checkpoint,
    count: int,
    length: int,
    *,
    seed: int,
    device: torch.device,
    text: Tensor | None = None,
) -> Tensor:
    """Token ids [count, length] that the model samples. Raises InputError for too long a length.

    text: windows [n, m]; given, an eighth of each window is a piece of them.
    """
    check_length(checkpoint, length)
    if text is None:
        openings = [_opening(load_tokenizer(checkpoint))] * count
    else:
        openings = _pieces(text, count, max(1, length // _OPENING_SHARE), seed)
    in_flight = min(count, _IN_FLIGHT[device.type])
    config = EngineConfig(max_batch_size=in_flight, max_seq_len=length, device=device.type)
    engine = Engine(checkpoint, config)
    requests = [
        engine.add(
            opening,
            SamplingParams(
                max_tokens=length - len(opening), temperature=1.0, seed=seed + i, stop_token_ids=()
            ),
        )
        for i, opening in enumerate(openings)
    ]
    while engine.has_work:
        engine.step()
    written = zip(openings, requests, strict=True)
    return torch.tensor([opening + request.output for opening, request in written])


def _pieces(text: Tensor, count: int, size: int, seed: int) -> list[list[int]]:
    """Pieces of `size` tokens from places that the seed decides, of each window before any comes twice."""
    random = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(text), generator=random) for _ in range(-(-count // len(text)))]
    size = min(size, text.shape[1])
    starts = torch.randint(text.shape[1] - size + 1, (count,), generator=random)
    return [
        text[row, start : start + size].tolist()
        for row, start in zip(torch.cat(orders)[:count], starts.tolist(), strict=True)
    ]


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
