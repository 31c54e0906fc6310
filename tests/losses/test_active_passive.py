import pytest
import torch

from lightning_robust.losses import ActivePassive, mae_loss, nce_loss, nfl_loss, ngce_loss, rce_loss
from support.labels import logits_and_labels, same_gradients

ACTIVE = {
    "nce": nce_loss,
    "nfl": lambda z, y: nfl_loss(z, y, gamma=1.5),
    "ngce": lambda z, y: ngce_loss(z, y, q=0.4, min_probability=1e-3),
}
PASSIVE = {"mae": mae_loss, "rce": lambda z, y: rce_loss(z, y, log_zero=-4.0, min_probability=1e-3)}


@pytest.mark.parametrize("passive", PASSIVE)
@pytest.mark.parametrize("active", ACTIVE)
def test_it_is_the_weighted_sum_of_its_two_losses(active, passive):
    logits, labels = logits_and_labels()
    options = {"gamma": 1.5, "q": 0.4, "log_zero": -4.0, "min_probability": 1e-3, "reduction": "none"}
    module = ActivePassive(alpha=10.0, beta=0.1, active=active, passive=passive, **options)
    same_gradients(
        lambda z: module(z, labels),
        lambda z: 10 * ACTIVE[active](z, labels) + 0.1 * PASSIVE[passive](z, labels),
        logits,
    )


def test_its_own_defaults_are_those_of_the_parts():
    logits, labels = logits_and_labels()
    torch.testing.assert_close(
        ActivePassive(active="nfl")(logits, labels), (nfl_loss(logits, labels) + rce_loss(logits, labels)).mean()
    )


def test_repr_and_refusals():
    assert repr(ActivePassive(beta=0.5)) == (
        "ActivePassive(alpha=1.0, beta=0.5, active='nce', passive='rce', reduction='mean')"
    )
    wrong = {"alpha": -1, "beta": -1, "active": "ce", "passive": "nce", "gamma": -1, "q": 0, "log_zero": 1.0}
    for name, value in {**wrong, "min_probability": 2}.items():
        with pytest.raises(ValueError, match=f"Expected `{name}`"):
            ActivePassive(**{name: value})
