import pytest
import torch
import torch.nn.functional as F

from tinier.distillation import forward_kl


def plain_kl(
    student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor,
    temperature: float,
) -> torch.Tensor:  # fmt: skip
    """By definition, with the whole [tokens, vocab] matrices."""
    p = torch.softmax(teacher @ teacher_head.t() / temperature, dim=-1)
    log_q = torch.log_softmax(student @ head.t() / temperature, dim=-1)
    return (p * (p.log() - log_q)).sum(dim=-1).mean() * temperature**2


def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return random(21, 8), random(50, 8), random(21, 12), random(50, 12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [4, 21, 1000])
def test_value_and_gradients_are_autograd_s(temperature: float, chunk: int) -> None:
    student, head, teacher, teacher_head = tensors()
    student.requires_grad_()
    head.requires_grad_()
    expected = plain_kl(student, head, teacher, teacher_head, temperature)
    wanted = torch.autograd.grad(3 * expected, (student, head))
    loss = forward_kl(student, head, teacher, teacher_head, temperature=temperature, chunk=chunk)
    found = torch.autograd.grad(3 * loss, (student, head))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_it_is_torch_s_kl_div() -> None:
    student, head, teacher, teacher_head = tensors()
    log_p = F.log_softmax(teacher @ teacher_head.t(), dim=-1)
    log_q = F.log_softmax(student @ head.t(), dim=-1)
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = forward_kl(student, head, teacher, teacher_head)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_equal_models_have_no_divergence() -> None:
    student, head, _, _ = tensors()
    assert forward_kl(student, head, student, head).item() == pytest.approx(0.0, abs=1e-12)


def test_the_teacher_gets_no_gradient() -> None:
    student, head, teacher, teacher_head = tensors()
    student.requires_grad_()
    teacher.requires_grad_()
    forward_kl(student, head, teacher, teacher_head).backward()
    assert student.grad is not None
    assert teacher.grad is None
