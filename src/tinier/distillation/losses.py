"""Forward KL divergence between teacher and student, from hidden states, in chunks of tokens.

Start at `forward_kl`. The [tokens, vocab] logits of both models exist for one chunk at a time. The
gradient is taken in the forward pass, where the chunk's probabilities are at hand: with student
logits z and teacher probabilities p, d KL(p ‖ softmax(z / T)) / dz = (softmax(z / T) - p) / T.
arXiv 1503.02531 (distillation), 2408.11796 (forward KL on logits alone for pruned students).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 128,
) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) in nats, times temperature² (Hinton's scaling).

    hidden: [tokens, hidden] after the final norm, each model's own width; head: [vocab, hidden].
    The products are taken in the teacher's type, the divergence in float32 (float64 for float64).
    Gradients flow to the student's hidden states and head only. Returns a scalar.
    """
    assert student_hidden.shape[0] == teacher_hidden.shape[0], (
        "student and teacher saw other tokens"
    )
    dtype = teacher_hidden.dtype
    loss: Tensor = _ForwardKL.apply(  # type: ignore[no-untyped-call]
        student_hidden.to(dtype), student_head.to(dtype), teacher_hidden, teacher_head,
        temperature, chunk,
    )  # fmt: skip
    return loss


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        teacher: Tensor,
        teacher_head: Tensor,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        grad_hidden = torch.empty_like(student)
        grad_head = torch.zeros_like(student_head, dtype=wide)
        total = torch.zeros((), dtype=wide, device=student.device)
        for start in range(0, student.shape[0], chunk):
            rows = slice(start, start + chunk)
            # [chunk, vocab]; in place from here on, the logits are the largest tensors there are
            target = F.linear(teacher[rows], teacher_head).to(wide).div_(temperature)
            target = torch.log_softmax(target, dim=-1)
            own = F.linear(student[rows], student_head).to(wide).div_(temperature)
            own = torch.log_softmax(own, dim=-1)
            probabilities = target.exp()
            total += torch.dot(probabilities.flatten(), target.sub_(own).flatten())
            grad = own.exp_().sub_(probabilities).to(student.dtype)
            grad_hidden[rows] = grad @ student_head
            grad_head += grad.t() @ student[rows]
        # temperature² · (1 / temperature), and the mean over tokens
        scale = temperature / student.shape[0]
        ctx.save_for_backward(grad_hidden * scale, (grad_head * scale).to(student_head.dtype))
        return total * temperature**2 / student.shape[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        (grad_loss,) = grad_outputs
        return grad_hidden * grad_loss, grad_head * grad_loss, None, None, None, None
