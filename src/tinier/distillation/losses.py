"""Distillation losses from hidden states, in chunks of tokens.

Start at `chunked_loss`. The [tokens, vocab] logits of student and teacher exist for one chunk at a
time: the gradient with respect to a chunk's logits is taken in the forward pass, where its
probabilities are at hand, and multiplied into the gradients of hidden states and head at once. With
student probabilities q = softmax(z / T), teacher probabilities p, and d the value for one token:

    forward KL   Σ p log(p / q)                     d/dz = (q - p) / T
    reverse KL   Σ q log(q / p)                     d/dz = q · (log(q / p) - d) / T
    JS           ½ KL(p ‖ m) + ½ KL(q ‖ m)          d/dz = q · (½ log(q / m) - Σ ½ q log(q / m)) / T
    hard         -log q[label] at T = 1             d/dz = q - onehot(label)

m = ½ (p + q). arXiv 1503.02531 (soft targets, and their gradients' scale T²), 2306.08543 (reverse KL),
2306.13649 (JS), 2408.11796 (forward KL on logits alone for pruned students).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["forward-kl", "reverse-kl", "js"]
IGNORED = -100
"""Label of a token that has none."""
# of logits in the computing type; larger chunks add the head's gradient up less often
_CHUNK_BYTES = 2**28

RowsLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(student logits [chunk, vocab], which rows of all tokens) → (sum of the loss over the rows, its
gradient with respect to the logits). May write into the logits."""


@dataclass(frozen=True, slots=True)
class Soft:
    """Divergence from the teacher's distribution."""

    hidden: Tensor
    """[tokens, hidden] of the teacher, after its final norm"""
    head: Tensor
    """[vocab, hidden]"""
    kind: Kind = "forward-kl"
    temperature: float = 1.0

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        wanted = F.linear(self.hidden[rows], self.head)
        size, common = logits.shape[1], min(logits.shape[1], wanted.shape[1])
        if size == wanted.shape[1]:
            return self._divergence(logits, wanted)
        # one vocabulary is padded further than the other: what both know is compared
        value, gradient = self._divergence(
            logits[:, :common].contiguous(), wanted[:, :common].contiguous()
        )
        return value, F.pad(gradient, (0, size - common))

    def _divergence(self, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "forward-kl" and logits.is_cuda and self.temperature == 1.0:
            from tinier.kernels.kl_divergence import forward_kl_rows  # Triton is for GPUs

            return forward_kl_rows(logits, wanted)
        wide = torch.promote_types(logits.dtype, torch.float32)
        p = torch.log_softmax(wanted.to(wide).div_(self.temperature), dim=-1)
        q = torch.log_softmax(logits.to(wide).div_(self.temperature), dim=-1)
        value, gradient = _DIVERGENCES[self.kind](p, q)
        # each gradient above, with its 1 / T, times T²
        return value * self.temperature**2, gradient.mul_(self.temperature)


@dataclass(frozen=True, slots=True)
class TopK:
    """Forward KL from a teacher of whom only the k most likely tokens were stored; the others are one
    outcome together, so that the loss is 0 where the student agrees, and not only there biased."""

    log_probs: Tensor
    """[tokens, k]"""
    ids: Tensor
    """[tokens, k] int64"""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        ids, log_p = self.ids[rows], self.log_probs[rows].to(wide)
        p = log_p.exp()
        tiny = torch.finfo(wide).tiny
        p_rest = (1 - p.sum(dim=1)).clamp_(min=0.0)
        log_q = torch.log_softmax(logits.to(wide), dim=-1)
        own = log_q.gather(1, ids)
        q_rest = (1 - own.exp().sum(dim=1)).clamp_(min=1e-9)
        rest = p_rest * (p_rest.clamp(min=tiny).log() - q_rest.log())
        value = (p * (log_p - own)).sum() + rest.sum()
        # of every token: q · (Σp + p_rest - p_rest / q_rest); of the k: q · (Σp + p_rest) - p
        whole = p.sum(dim=1) + p_rest
        gradient = log_q.exp_().mul_((whole - p_rest / q_rest).unsqueeze(1))
        gradient.scatter_(1, ids, own.exp() * whole.unsqueeze(1) - p)
        return value, gradient


@dataclass(frozen=True, slots=True)
class Hard:
    """Cross-entropy with the text itself."""

    labels: Tensor
    """[tokens] int64, the next token of each; IGNORED where there is none"""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        labels = self.labels[rows]
        counted = (labels != IGNORED).unsqueeze(1)
        at = labels.clamp(min=0).unsqueeze(1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_q = torch.log_softmax(logits.to(wide), dim=-1)
        value = -(log_q.gather(1, at) * counted).sum()
        gradient = log_q.exp_()
        gradient.scatter_add_(1, at, torch.full_like(at, -1, dtype=wide))
        # the mean is over all tokens; those without a label must not make the others count less
        share = len(self.labels) / (self.labels != IGNORED).sum().to(wide)
        return value * share, gradient.mul_(counted * share)


@dataclass(frozen=True, slots=True)
class Mixed:
    """(1 - weight) · soft + weight · hard."""

    soft: RowsLoss
    hard: RowsLoss
    weight: float

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        hard, hard_gradient = self.hard(logits.clone(), rows)
        soft, gradient = self.soft(logits, rows)
        value = (1 - self.weight) * soft + self.weight * hard
        return value, gradient * (1 - self.weight) + hard_gradient * self.weight


def chunked_loss(
    hidden: Tensor, head: Tensor, loss: RowsLoss, *, chunk: int | None = None
) -> Tensor:
    """Mean over tokens of `loss`, in nats; a scalar with gradients to hidden states and head.

    hidden: [tokens, hidden] of the student after its final norm, in the type to multiply in. head:
    [vocab, hidden]. chunk: tokens at a time; None: as many as have 256 MB of logits.
    """
    chunk = chunk or max(1, _CHUNK_BYTES // (len(head) * hidden.element_size()))
    value: Tensor = _Chunked.apply(hidden, head, loss, chunk)  # type: ignore[no-untyped-call]
    return value


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, loss: RowsLoss, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        own_head = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=wide) if needs_head else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            value, gradient = loss(F.linear(hidden[rows], own_head), rows)
            total += value
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, own_head, out=grad_hidden[rows])
            if grad_head is not None:
                _add_product(grad_head, gradient.t(), hidden[rows])
        ctx.gradients = grad_hidden, grad_head
        ctx.tokens, ctx.head_dtype = len(hidden), head.dtype
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.gradients
        del ctx.gradients  # they are scaled in place: once
        scale = grad_outputs[0] / ctx.tokens
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale)
        if grad_head is not None:
            grad_head = grad_head.mul_(scale).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in float32 whatever the factors are."""
    if left.is_cuda and left.dtype != total.dtype:
        # summed in the matrix product itself, not in a tensor of the head's size beside it
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _forward_kl(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """p, q: log probabilities [rows, vocab]; both are used up."""
    probabilities = p.exp()
    # a dot product adds millions of numbers one after the other on a CPU; a sum adds them in pairs
    value = p.sub_(q).mul_(probabilities).sum()
    return value, q.exp_().sub_(probabilities)


def _reverse_kl(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = q.exp()
    ratio = q.sub_(p)
    values = (probabilities * ratio).sum(dim=-1, keepdim=True)
    return values.sum(), ratio.sub_(values).mul_(probabilities)


def _jensen_shannon(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device))
    from_p = 0.5 * (p.exp() * (p - log_m)).sum()
    ratio = (q - log_m).mul_(0.5)
    probabilities = q.exp_()
    values = (probabilities * ratio).sum(dim=-1, keepdim=True)
    return from_p + values.sum(), ratio.sub_(values).mul_(probabilities)


_DIVERGENCES = {"forward-kl": _forward_kl, "reverse-kl": _reverse_kl, "js": _jensen_shannon}


def hidden_loss(
    student: list[Tensor], teacher: list[Tensor], kind: Literal["mse", "cosine"]
) -> Tensor:
    """Mean over layers of how far the student's hidden states are from the teacher's; a scalar.

    student, teacher: [..., hidden] of the layers that belong together. `mse` is divided by the
    teacher's mean square, for the later layers' states are many times larger; `cosine` is 1 - cos.
    """
    losses = []
    for own, wanted in zip(student, teacher, strict=True):
        own, wanted = own.float(), wanted.float()
        if kind == "mse":
            losses.append(F.mse_loss(own, wanted) / wanted.square().mean())
        else:
            losses.append(1 - F.cosine_similarity(own, wanted, dim=-1).mean())
    return torch.stack(losses).mean()
