import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_robust.distillation import KD, DistillationLoss, kd_loss


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    total = 0.0
    for z, t in zip(student.numpy(), teacher.numpy(), strict=True):
        p, q = (np.exp(row / temperature) / np.exp(row / temperature).sum() for row in (z, t))
        total += sum(q_c * np.log(q_c / p_c) for p_c, q_c in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_a_naive_loop(temperature):
    expected = reference(logits(0), logits(1), temperature)
    assert float(kd_loss(logits(0), logits(1), temperature)) == pytest.approx(expected, rel=1e-12)
    assert float(KD(temperature=temperature)(logits(0), logits(1))) == pytest.approx(expected, rel=1e-12)


def test_equals_the_divergence_of_torch_distributions():
    student, teacher = (torch.distributions.Categorical(logits=logits(seed) / 4) for seed in (0, 1))
    divergence = torch.distributions.kl_divergence(teacher, student).mean()
    torch.testing.assert_close(kd_loss(logits(0), logits(1)), 16 * divergence)


def test_the_squared_temperature_can_be_left_out():
    with_it, without = (
        KD(temperature=3.0, temperature_squared=square)(logits(0), logits(1)) for square in (True, False)
    )
    torch.testing.assert_close(with_it, 9 * without)


def test_gradient_is_the_difference_of_the_probabilities():
    student = logits(0).requires_grad_()
    kd_loss(student, logits(1), 2.0).backward()
    expected = 2.0 * ((student / 2).softmax(1) - (logits(1) / 2).softmax(1)) / 6
    torch.testing.assert_close(student.grad, expected.detach())


def test_no_gradient_reaches_the_teacher_unless_the_function_is_used():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    KD()(student, teacher).backward()
    assert teacher.grad is None
    kd_loss(student, teacher).backward()
    assert teacher.grad is not None


def test_extreme_logits_stay_finite_in_float32():
    student = torch.tensor([[120.0, -120.0, 0.0]], requires_grad=True)
    loss = KD(temperature=1.0)(student, torch.tensor([[-120.0, 120.0, 0.0]]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_half_precision_and_autocast_compute_in_float32():
    student, teacher = logits(0, torch.bfloat16), logits(1, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = KD()(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kd_loss(student.float(), teacher.float()))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_refuses_a_temperature_that_is_not_positive(temperature):
    message = "Expected `temperature` to be a finite number > 0"
    with pytest.raises(ValueError, match=message):
        KD(temperature=temperature)
    with pytest.raises(ValueError, match=message):
        kd_loss(logits(0), logits(1), temperature)


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"`teacher_logits` of the student's shape \(6, 5\) but got \(6, 4\)"):
        kd_loss(logits(0), logits(1)[:, :4])


def test_repr():
    assert repr(KD(temperature=2.0)) == "KD(temperature=2.0, temperature_squared=True)"


def test_the_base_class_is_abstract():
    with pytest.raises(NotImplementedError):
        DistillationLoss()(logits(0), logits(1))


def test_positions_count_like_samples():
    student, teacher = (logits(seed).view(2, 3, 1, 5).permute(0, 3, 1, 2) for seed in (0, 1))
    torch.testing.assert_close(kd_loss(student, teacher), kd_loss(logits(0), logits(1)))
    assert float(kd_loss(logits(0), logits(1))) == float(
        16 * F.kl_div(*((logits(s) / 4).log_softmax(1) for s in (0, 1)), reduction="batchmean", log_target=True)
    )
