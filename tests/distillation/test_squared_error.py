"""The squared error of the label's log-probability."""

import pytest
import torch

from lightning_robust.distillation import SquaredErrorLogit, squared_error_logit_loss
from lightning_robust.losses import MixedTarget
from support.distillation_losses import labels, logits

STUDENT, TEACHER, LABELS = logits(0, 6, 5), logits(1, 6, 5), labels(2, 5, 6)


def log_prob(values, target):
    return torch.distributions.Categorical(logits=values).log_prob(target)


def test_equals_torch_distributions():
    expected = (log_prob(STUDENT, LABELS) - log_prob(TEACHER, LABELS)).square().mean() / 2
    torch.testing.assert_close(SquaredErrorLogit()(STUDENT, TEACHER, LABELS), expected)
    torch.testing.assert_close(squared_error_logit_loss(STUDENT, log_prob(TEACHER, LABELS), LABELS), expected)


def test_reductions():
    each = (log_prob(STUDENT, LABELS) - log_prob(TEACHER, LABELS)).square() / 2
    told = log_prob(TEACHER, LABELS)
    torch.testing.assert_close(squared_error_logit_loss(STUDENT, told, LABELS, reduction="none"), each)
    torch.testing.assert_close(squared_error_logit_loss(STUDENT, told, LABELS, reduction="sum"), each.sum())


def test_learns_the_teacher_where_the_weighted_cross_entropy_learns_its_square():
    q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    drawn = torch.arange(3)
    found = {}
    for kind in ("squared", "weighted"):
        z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure(z=z, kind=kind, optimizer=optimizer):
            optimizer.zero_grad()
            rows = z.expand(3, 3)
            losses = (
                squared_error_logit_loss(rows, q.log(), drawn, reduction="none")
                if kind == "squared"
                else -q * rows.log_softmax(1).diagonal()
            )
            loss = (q * losses).sum()  # labels are drawn from the teacher
            loss.backward()
            return loss

        optimizer.step(closure)
        found[kind] = z.detach().softmax(0)
    torch.testing.assert_close(found["squared"], q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["weighted"], q**2 / (q**2).sum(), rtol=1e-4, atol=1e-5)


def test_stored_numbers_in_half_precision():
    told = log_prob(TEACHER, LABELS).half()
    found = squared_error_logit_loss(STUDENT.bfloat16(), told, LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, squared_error_logit_loss(STUDENT.bfloat16().float(), told.float(), LABELS))


def test_refuses_other_shapes_and_soft_targets():
    with pytest.raises(ValueError, match=r"`teacher_log_probs` to have one value per sample, shape \(6,\), but got"):
        squared_error_logit_loss(STUDENT, TEACHER, LABELS)
    for soft in (TEACHER.softmax(1), MixedTarget(LABELS, LABELS, torch.tensor(0.5))):
        with pytest.raises(ValueError, match="SquaredErrorLogit needs class indices"):
            SquaredErrorLogit()(STUDENT, TEACHER, soft)
