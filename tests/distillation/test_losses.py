from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.distillation import Hard, Mixed, Soft, TopK, chunked_loss, hidden_loss
from tinier.distillation.losses import IGNORED

TOKENS, VOCAB = 21, 50


def tensors() -> tuple[Tensor, ...]:
    """Hidden states and head of student and teacher, of different widths."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return random(TOKENS, 8), random(VOCAB, 8), random(TOKENS, 12), random(VOCAB, 12)


def labels() -> Tensor:
    values = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))
    values[-1] = IGNORED
    return values


# each loss by definition, with the whole [tokens, vocab] matrices


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(dim=-1)


def plain(kind: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p = torch.softmax(teacher / temperature, dim=-1)
    q = torch.softmax(student / temperature, dim=-1)
    m = (p + q) / 2
    values = {
        "forward-kl": lambda: kl(p, q),
        "reverse-kl": lambda: kl(q, p),
        "js": lambda: 0.5 * kl(p, m) + 0.5 * kl(q, m),
    }
    return values[kind]().mean() * temperature**2


def plain_top_k(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    p, q = torch.softmax(teacher, dim=-1), torch.softmax(student, dim=-1)
    ids = p.topk(k, dim=-1).indices
    p_k, q_k = p.gather(1, ids), q.gather(1, ids)
    p_rest, q_rest = 1 - p_k.sum(dim=1), 1 - q_k.sum(dim=1)
    return ((p_k * (p_k / q_k).log()).sum(dim=1) + p_rest * (p_rest / q_rest).log()).mean()


def check(
    loss: Callable[[Tensor, Tensor], object], by_definition: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Value and gradients of the chunked loss against autograd's, in float64."""
    student, head, teacher, teacher_head = tensors()
    student.requires_grad_()
    head.requires_grad_()
    expected = by_definition(teacher @ teacher_head.t(), student @ head.t())
    wanted = torch.autograd.grad(3 * expected, (student, head))
    for chunk in (4, TOKENS, None):
        value = chunked_loss(student, head, loss(teacher, teacher_head), chunk=chunk)  # type: ignore[arg-type]
        found = torch.autograd.grad(3 * value, (student, head))
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "js"])
def test_divergences_are_autograd_s(kind: str, temperature: float) -> None:
    check(
        lambda hidden, head: Soft(hidden, head, kind, temperature),  # type: ignore[arg-type]
        lambda teacher, student: plain(kind, teacher, student, temperature),
    )


def test_cross_entropy_is_torch_s() -> None:
    check(
        lambda *_: Hard(labels()),
        lambda _, student: F.cross_entropy(student, labels(), ignore_index=IGNORED),
    )


def test_a_mix_is_the_weighted_sum() -> None:
    check(
        lambda hidden, head: Mixed(Soft(hidden, head), Hard(labels()), 0.3),
        lambda teacher, student: (
            0.7 * plain("forward-kl", teacher, student, 1.0)
            + 0.3 * F.cross_entropy(student, labels(), ignore_index=IGNORED)
        ),
    )


@pytest.mark.parametrize("k", [3, 10])
def test_top_k_counts_the_others_as_one_outcome(k: int) -> None:
    def stored(hidden: Tensor, head: Tensor) -> TopK:
        top = torch.log_softmax(hidden @ head.t(), dim=-1).topk(k, dim=-1)
        return TopK(top.values, top.indices)

    check(stored, lambda teacher, student: plain_top_k(teacher, student, k))


def test_forward_kl_is_torch_s_kl_div() -> None:
    student, head, teacher, teacher_head = tensors()
    log_p = F.log_softmax(teacher @ teacher_head.t(), dim=-1)
    log_q = F.log_softmax(student @ head.t(), dim=-1)
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert chunked_loss(student, head, Soft(teacher, teacher_head)).item() == pytest.approx(
        expected.item(), rel=1e-12
    )


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "js"])
def test_equal_models_have_no_divergence(kind: str) -> None:
    student, head, _, _ = tensors()
    loss = Soft(student, head, kind)  # type: ignore[arg-type]
    assert chunked_loss(student, head, loss).item() == pytest.approx(0.0, abs=1e-12)


def test_the_teacher_gets_no_gradient_and_a_frozen_head_none() -> None:
    student, head, teacher, teacher_head = tensors()
    student.requires_grad_()
    teacher.requires_grad_()
    chunked_loss(student, head, Soft(teacher, teacher_head)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert head.grad is None


def test_a_tied_head_in_float32_is_multiplied_in_the_hidden_type() -> None:
    student, head, teacher, teacher_head = (t.float() for t in tensors())
    head.requires_grad_()
    loss = chunked_loss(student.bfloat16(), head, Soft(teacher.bfloat16(), teacher_head.bfloat16()))
    loss.backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


def test_hidden_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(2, 3, 8, generator=generator) for _ in range(2)]
    assert hidden_loss(own, own, "mse").item() == 0
    assert hidden_loss(own, [2 * x for x in own], "cosine").item() == pytest.approx(0, abs=1e-6)
    # a state that is all zero is off by the whole of the teacher's power
    assert hidden_loss([torch.zeros_like(x) for x in own], own, "mse").item() == pytest.approx(1)


@pytest.mark.parametrize("vocab", [1000, 49152, 128256])
def test_the_kernel_is_the_plain_version(kernel_device: str, vocab: int) -> None:
    from tinier.distillation.losses import _forward_kl
    from tinier.kernels.kl_divergence import forward_kl_rows

    torch.manual_seed(0)
    student = 4 * torch.randn(70, vocab, device=kernel_device)
    teacher = student + torch.randn(70, vocab, device=kernel_device)
    value, gradient = _forward_kl(
        torch.log_softmax(teacher, dim=-1), torch.log_softmax(student, dim=-1)
    )
    found, found_gradient = forward_kl_rows(student.clone(), teacher)
    assert found.item() == pytest.approx(value.item(), rel=3e-5)
    # differences of probabilities: where both are small, their last bits are what is left
    assert (found_gradient - gradient).norm() < 1e-4 * gradient.norm()
