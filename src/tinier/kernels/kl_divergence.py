"""Forward KL divergence and its gradient for rows of logits, in one kernel.

In eager mode each exponential and sum is a pass over [rows, vocab] in float32. Here a program owns a
row: it reads both models' logits once for their maxima and sums (kept as it goes along), once more
for the divergence and the gradient, which it writes over the student's logits. Plain torch reference:
tinier.distillation.losses._forward_kl.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(student, teacher, values, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    student += row * vocab
    teacher += row * vocab
    q_max = -float("inf")
    p_max = -float("inf")
    q_sum = 0.0
    p_sum = 0.0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocab
        q = tl.load(student + at, mask=inside, other=-float("inf")).to(tl.float32)
        p = tl.load(teacher + at, mask=inside, other=-float("inf")).to(tl.float32)
        q_top = tl.maximum(q_max, tl.max(q, axis=0))
        p_top = tl.maximum(p_max, tl.max(p, axis=0))
        q_sum = q_sum * tl.exp(q_max - q_top) + tl.sum(tl.exp(q - q_top), axis=0)
        p_sum = p_sum * tl.exp(p_max - p_top) + tl.sum(tl.exp(p - p_top), axis=0)
        q_max = q_top
        p_max = p_top
    q_norm = q_max + tl.log(q_sum)
    p_norm = p_max + tl.log(p_sum)
    value = 0.0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocab
        q = tl.load(student + at, mask=inside, other=0.0).to(tl.float32) - q_norm
        p = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32) - p_norm
        probability = tl.exp(p)
        value += tl.sum(tl.where(inside, probability * (p - q), 0.0), axis=0)
        gradient = (tl.exp(q) - probability).to(student.dtype.element_ty)
        tl.store(student + at, gradient, mask=inside)
    tl.store(values + row, value)


def forward_kl_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of KL(softmax(teacher) ‖ softmax(student)), and its gradient with respect to the
    student's logits, written over them. student, teacher: [rows, vocab], on a GPU, of one type."""
    assert student.is_contiguous()
    assert teacher.is_contiguous()
    rows, vocab = student.shape
    values = torch.empty(rows, dtype=torch.float32, device=student.device)
    _kernel[(rows,)](student, teacher, values, vocab, BLOCK=_BLOCK, num_warps=16)
    return values.sum(), student
