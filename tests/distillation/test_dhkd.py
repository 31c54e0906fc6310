"""DHKD against its definition, in float32 where probabilities round, and the alignment of gradients."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence

from lightning_robust.distillation import DHKD, align_gradients, binary_kl, binary_kl_norm
from lightning_robust.distillation.dhkd import conflict
from support.distillation_losses import logits

LOGITS = torch.zeros(2, 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_against_the_divergence_of_coins(temperature):
    z, t = logits(0, 6, 10).requires_grad_(), logits(1, 6, 10)
    fair = Bernoulli(torch.full_like(t, 0.5))
    expected = {
        binary_kl_norm: kl_divergence(fair, Bernoulli(logits=(z - t) / temperature)),
        binary_kl: kl_divergence(Bernoulli(logits=t / temperature), Bernoulli(logits=z / temperature)),
    }
    for function, divergence in expected.items():
        wanted = temperature**2 * divergence.sum() / len(z)
        found = function(z, t, temperature, eps=0.0)
        torch.testing.assert_close(found, wanted)
        gradients = (torch.autograd.grad(each, z, retain_graph=True)[0] for each in (found, wanted))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("function", [binary_kl_norm, binary_kl])
def test_bounds_are_those_of_probabilities(function):
    """As if the probabilities had been clamped, which float32 could not do at 1e-8."""
    z, t = logits(0, 6, 10, scale=30.0).requires_grad_(), logits(1, 6, 10, scale=30.0)
    eps = 1e-3

    def held(logit):
        return (logit / 2).sigmoid().clamp(eps, 1 - eps)

    p, q = (held(z - t), torch.full_like(t, 0.5)) if function is binary_kl_norm else (held(z), held(t))
    wanted = 4 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum() / len(z)
    found = function(z, t, eps=eps)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(each, z, retain_graph=True)[0] for each in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert (gradients[0] == 0).any()  # out there nothing pulls


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("function", [binary_kl_norm, binary_kl])
def test_float32_stays_finite(function, eps):
    z = torch.tensor([[1e4, -1e4, 0.0, 50.0]], requires_grad=True)
    value = function(z, -z.detach(), eps=eps)
    assert value.isfinite()
    assert torch.autograd.grad(value, z)[0].isfinite().all()
    assert function(z, z) == 0


def test_gradients_are_aligned_only_where_they_conflict():
    g, r = logits(0, 50), logits(1, 50)
    for sign in (1, -1):
        aligned = align_gradients(g, sign * r)
        if torch.dot(g, sign * r) >= 0:
            assert torch.equal(aligned, g)
        else:
            torch.testing.assert_close(torch.dot(aligned, r), torch.tensor(0.0, dtype=r.dtype), atol=1e-12, rtol=0)
            torch.testing.assert_close(aligned + sign * r * (torch.dot(g, sign * r) / r.square().sum()), g)
    assert torch.equal(align_gradients(g, torch.zeros_like(r)), g)


def test_a_step_that_overflowed_does_not_change_the_loss():
    """What a gradient scaler leaves out anyhow must not become a loss of NaN in the logs."""
    infinite = torch.tensor(-torch.inf)
    assert conflict(infinite, torch.tensor(torch.inf)) == 0
    assert conflict(torch.tensor(-1.0), torch.tensor(2.0)) == 0.5


@pytest.mark.parametrize("head", ["linear", "nonlinear"])
@pytest.mark.parametrize(("compare", "function"), [("norm", binary_kl_norm), ("binary", binary_kl)])
def test_the_second_head(head, compare, function):
    loss = DHKD(compare=compare, head=head, width=5, num_classes=3, temperature=3.0).eval()
    feature, t = logits(0, 6, 5, dtype=torch.float32), logits(1, 6, 3, dtype=torch.float32)
    found = loss(t * 9, t, student_features=[feature])
    torch.testing.assert_close(found, function(loss.head(feature), t, 3.0))
    maps = feature[..., None, None].expand(-1, -1, 2, 2)
    torch.testing.assert_close(loss(t, t, student_features=[maps]), found)


def test_the_layers_of_the_nonlinear_head():
    layers = [type(layer) for layer in DHKD(head="nonlinear", width=5, num_classes=3).head]
    assert layers == [nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.ReLU, nn.Linear]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: DHKD(temperature=0.0), r"Expected `temperature` to be a finite number > 0 but got 0.0"),
        (lambda: DHKD(compare="no"), r"Expected `compare` to be one of 'norm', 'binary' but got 'no'"),
        (lambda: DHKD(head="no"), r"Expected `head` to be one of 'linear', 'nonlinear' but got 'no'"),
        (lambda: DHKD(eps=0.7), r"Expected `eps` to be in \[0.0, 0.5\] but got 0.7"),
        (lambda: DHKD(num_classes=0), r"Expected `num_classes` to be an integer >= 1 but got 0"),
        (lambda: DHKD().build([None], [], 3), r"DHKD cannot read off .* before the classifier have; set `width`"),
        (lambda: DHKD(width=3).build([None], [], None), r"DHKD cannot read off how many classes the student has"),
        (lambda: DHKD()(LOGITS, LOGITS), r"The second head of DHKD is not built; set `width` and `num_classes`"),
        (lambda: DHKD(width=2, num_classes=3)(LOGITS, None), r"DHKD compares a head with a teacher; pass `teacher_log"),
        (lambda: DHKD(width=2, num_classes=3)(LOGITS, LOGITS), r"DHKD compares the features of one layer but got 0"),
        (lambda: binary_kl(LOGITS, torch.zeros(2, 4)), r"Expected `teacher_logits` of the student's shape \(2, 3\)"),
        (lambda: binary_kl_norm(LOGITS, LOGITS, 0.0), r"Expected `temperature` to be"),
    ],
)
def test_refused(action, message):
    with pytest.raises(ValueError, match=message):
        action()
