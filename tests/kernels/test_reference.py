import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from tinier.kernels.reference import Cache, PagedBatch, gated, paged_attention, rms_norm, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_transformers_own(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(32, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(5, 32, dtype=dtype)
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))


def test_rotate_is_transformers_own() -> None:
    q, k = torch.randn(7, 4, 16), torch.randn(7, 2, 16)
    angles = torch.randn(7, 8).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected_q, expected_k = apply_rotary_pos_emb(
        q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), cos[None], sin[None]
    )
    ours = rotate(q, cos.unsqueeze(1), sin.unsqueeze(1))
    assert torch.allclose(ours, expected_q.squeeze(0).transpose(0, 1))
    ours = rotate(k, cos.unsqueeze(1), sin.unsqueeze(1))
    assert torch.allclose(ours, expected_k.squeeze(0).transpose(0, 1))


def test_silu_mul() -> None:
    # rows of whole vectors: torch's scalar code for what is left over differs in the last bit
    gate, up = torch.randn(3, 64), torch.randn(3, 64)
    assert torch.equal(gated(torch.cat((gate, up), dim=1)), F.silu(gate) * up)


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
) -> torch.Tensor:
    """One sequence by definition: q [n, H, D] are the last n of the k, v [context, K, D]."""
    n, heads, dim = q.shape
    context, kv_heads, _ = k.shape
    out = torch.zeros_like(q)
    for i in range(n):
        at = context - n + i
        first = 0 if window is None else max(0, at - window + 1)
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = (k[first : at + 1, kv] @ q[i, h]) / dim**0.5
            out[i, h] = torch.softmax(scores, dim=0) @ v[first : at + 1, kv]
    return out


def paged_batch(
    contexts: list[int], counts: list[int], generator: torch.Generator, block_size: int = 2
) -> tuple[PagedBatch, list[torch.Tensor]]:
    """Sequences in 32 blocks in any order, as after many requests; and each one's slots."""
    free = torch.randperm(32, generator=generator).tolist()
    width = max(contexts) // block_size + 2
    blocks = torch.zeros(len(contexts), width, dtype=torch.int32)
    slots = []
    for i, context in enumerate(contexts):
        for j in range(-(-context // block_size)):
            blocks[i, j] = free.pop()
        at = torch.arange(context)
        slots.append(blocks[i, at // block_size].long() * block_size + at % block_size)
    new = [s[-n:] for s, n in zip(slots, counts, strict=True)]
    positions = [torch.arange(c - n, c) for c, n in zip(contexts, counts, strict=True)]
    batch = PagedBatch(
        blocks, torch.tensor(contexts, dtype=torch.int32),
        torch.tensor([0, *counts]).cumsum(0).int(), torch.cat(positions).int(), torch.cat(new).int(),
        torch.tensor([counts.count(1)], dtype=torch.int32), counts, block_size, max(contexts),
    )  # fmt: skip
    return batch, slots


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("contexts", "counts"),
    [([5, 9, 1], [1, 1, 1]), ([6], [6]), ([8, 4, 7], [1, 4, 3])],
    ids=["decode", "prefill", "mixed"],
)
def test_paged_attention_is_attention(
    window: int | None, contexts: list[int], counts: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(64, 2, 8, generator=generator)
    values = torch.randn(64, 2, 8, generator=generator)
    batch, tables = paged_batch(contexts, counts, generator)
    q = torch.randn(sum(counts), 4, 8, generator=generator)
    out = paged_attention(q, Cache(keys, values, window=window), batch)
    expected = torch.cat(
        [
            naive_attention(part, keys[slots], values[slots], window)
            for part, slots in zip(q.split(counts), tables, strict=True)
        ]
    )
    assert torch.allclose(out, expected, atol=1e-5)
