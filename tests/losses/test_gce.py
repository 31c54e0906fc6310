import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import GCE, MAE, gce_loss
from support.labels import logits_and_labels, same_gradients


def naive(logits, labels, q, floor=0.0):
    p = logits.softmax(1)[torch.arange(len(labels)), labels]
    return (1 - p.clamp(min=floor) ** q) / q


@pytest.mark.parametrize("floor", [0.0, 1e-3])
@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_values_and_gradients_are_the_definition(q, floor):
    logits, labels = logits_and_labels()
    assert (logits.softmax(1).gather(1, labels[:, None]) < 1e-3).any()
    same_gradients(
        lambda z: gce_loss(z, labels, q=q, min_probability=floor), lambda z: naive(z, labels, q, floor), logits
    )


def test_limits():
    logits, labels = logits_and_labels()
    torch.testing.assert_close(GCE(q=1e-9)(logits, labels), F.cross_entropy(logits, labels))
    torch.testing.assert_close(GCE(q=1.0)(logits, labels), MAE()(logits, labels))


def test_extreme_logits():
    logits = torch.tensor([[120.0, -120.0], [-120.0, 120.0]], requires_grad=True)
    values = gce_loss(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7]))
    assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


def test_module_and_refusals():
    logits, labels = logits_and_labels()
    module = GCE(q=0.5, min_probability=1e-3, reduction="none")
    torch.testing.assert_close(module(logits, labels), gce_loss(logits, labels, q=0.5, min_probability=1e-3))
    assert repr(module) == "GCE(q=0.5, min_probability=0.001, reduction='none')"
    for q in (0.0, 1.1):
        with pytest.raises(ValueError, match="Expected `q`"):
            GCE(q=q)
    with pytest.raises(ValueError, match=r"Expected `min_probability` to be in \[0, 1\]"):
        GCE(min_probability=-0.1)
