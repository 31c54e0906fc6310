import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import MAE, Focal, PolyLoss, cross_entropy, poly_loss
from support.labels import logits_and_labels, same_gradients, soft_labels


def naive(logits, labels, eps1, gamma):
    p = logits.softmax(1)[torch.arange(len(labels)), labels]
    return -((1 - p) ** gamma) * p.log() + eps1 * (1 - p) ** (gamma + 1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("eps1", [-1.0, 0.0, 2.0])
def test_values_and_gradients_are_the_definition(eps1, gamma):
    logits, labels = logits_and_labels()
    same_gradients(
        lambda z: poly_loss(z, labels, eps1=eps1, gamma=gamma), lambda z: naive(z, labels, eps1, gamma), logits
    )


def test_it_is_the_loss_it_extends_without_the_term_and_bends_towards_the_absolute_error():
    logits, labels = logits_and_labels()
    torch.testing.assert_close(PolyLoss(eps1=0.0)(logits, labels), F.cross_entropy(logits, labels))
    torch.testing.assert_close(PolyLoss(eps1=0.0, gamma=2.0)(logits, labels), Focal(gamma=2.0)(logits, labels))
    torch.testing.assert_close(
        PolyLoss(eps1=3.0)(logits, labels), F.cross_entropy(logits, labels) + 3 * MAE()(logits, labels)
    )


def test_soft_targets_take_the_probability_of_the_target():
    logits, soft = logits_and_labels()[0], soft_labels()
    expected = cross_entropy(logits, soft, reduction="none") + 2 * (1 - (soft * logits.softmax(1)).sum(1))
    torch.testing.assert_close(poly_loss(logits, soft, eps1=2.0), expected)


def test_module_and_refusals():
    logits, labels = logits_and_labels()
    module = PolyLoss(eps1=2.0, gamma=1.0, reduction="none")
    torch.testing.assert_close(module(logits, labels), poly_loss(logits, labels, eps1=2.0, gamma=1.0))
    assert repr(module) == "PolyLoss(eps1=2.0, gamma=1.0, reduction='none')"
    with pytest.raises(ValueError, match=r"Expected `eps1` to be in \[-1, inf\] but got -1\.5"):
        PolyLoss(eps1=-1.5)
    with pytest.raises(ValueError, match="Expected `gamma` to be a finite number >= 0"):
        PolyLoss(gamma=-1)
