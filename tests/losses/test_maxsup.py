import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import Linear, MaxSup, cross_entropy, maxsup_penalty


def random_logits() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)


def test_equals_the_soft_target_form():
    logits = random_logits()
    target = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    moved = target + 0.2 / 5 - 0.2 * F.one_hot(logits.argmax(1), 5)
    ours = cross_entropy(logits, target) + MaxSup(alpha=0.2)(logits)
    reference = -(moved * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, reference)))


def test_equals_label_smoothing_where_the_prediction_is_right():
    logits = random_logits()
    labels = logits.argmax(1)
    smoothed = cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, labels) + MaxSup(alpha=0.1)(logits), smoothed)


def test_a_tie_sends_the_gradient_to_one_index():
    logits = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    maxsup_penalty(logits).sum().backward()
    assert sorted(logits.grad[0].tolist()) == pytest.approx([-1 / 3, -1 / 3, 2 / 3])


def test_dense_logits():
    logits = torch.randn(2, 5, 3, 4)
    expected = logits.amax(1) - logits.mean(1)
    torch.testing.assert_close(maxsup_penalty(logits), expected)
    torch.testing.assert_close(MaxSup(alpha=1.0)(logits), expected.mean())


def test_bfloat16_logits_are_compared_in_float32():
    assert maxsup_penalty(torch.randn(3, 5).bfloat16()).dtype == torch.float32


def test_follows_a_schedule():
    maxsup = MaxSup(alpha=Linear(start=0.1, end=0.2))
    maxsup.set_progress(2, 3)
    logits = torch.tensor([[3.0, 0.0, 0.0]])
    torch.testing.assert_close(maxsup(logits), torch.tensor(0.4))


def test_has_no_parameters_and_no_state():
    assert not list(MaxSup().parameters())
    assert not MaxSup().state_dict()


def test_refuses_a_factor_that_is_not_finite():
    with pytest.raises(ValueError, match="Expected `alpha` to be a finite number but got nan"):
        MaxSup(alpha=float("nan"))
