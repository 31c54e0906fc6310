import pytest
import torch

from lightning_robust.losses import NCE, NFL, NGCE, nce_loss, nfl_loss, ngce_loss
from support.labels import logits_and_labels, mixed_labels, same_gradients, soft_labels


def naive(logits, labels, of):
    losses = of(logits.softmax(1))
    return losses[torch.arange(len(labels)), labels] / losses.sum(1)


def focal(p, gamma):
    return -((1 - p).detach() ** gamma) * p.log()


CASES = {
    "nce": (nce_loss, lambda p: -p.log()),
    "nfl": (lambda z, y: nfl_loss(z, y, gamma=1.3), lambda p: focal(p, 1.3)),
    "ngce": (lambda z, y: ngce_loss(z, y, q=0.4), lambda p: 1 - p**0.4),
    "ngce floor": (lambda z, y: ngce_loss(z, y, min_probability=1e-3), lambda p: 1 - p.clamp(min=1e-3) ** 0.7),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_values_and_gradients_are_the_definition(case):
    ours, of = CASES[case]
    logits, labels = logits_and_labels()
    same_gradients(lambda z: ours(z, labels), lambda z: naive(z, labels, of), logits)


@every_case
def test_the_losses_of_all_labels_add_up_to_one(case):
    # which is what makes them robust to symmetric noise
    ours, _ = CASES[case]
    logits, _ = logits_and_labels(scale=30)
    total = sum(ours(logits, torch.full((6,), label)) for label in range(5))
    torch.testing.assert_close(total, torch.ones(6, dtype=torch.float64))


@every_case
def test_soft_and_mixed_targets_lift_the_numerator(case):
    ours, of = CASES[case]
    logits, labels = logits_and_labels()
    soft, losses = soft_labels(), of(logits.softmax(1))
    torch.testing.assert_close(ours(logits, soft), (soft * losses).sum(1) / losses.sum(1))
    mixed = mixed_labels(labels)
    torch.testing.assert_close(ours(logits, mixed), ours(logits, mixed.probabilities(5, torch.float64)))


@every_case
def test_extreme_logits(case):
    ours, _ = CASES[case]
    logits = torch.tensor([[120.0, -120.0, 0.0], [-120.0, 120.0, 0.0]], requires_grad=True)
    values = ours(logits, torch.tensor([0, 0]))
    assert values[0] == 0
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), logits)[0].isfinite().all()


@every_case
def test_one_class_is_refused(case):
    with pytest.raises(ValueError, match="at least 2 classes but got 1"):
        CASES[case][0](torch.zeros(2, 1), torch.tensor([0, 0]))


def test_modules_and_refusals():
    logits, labels = logits_and_labels()
    torch.testing.assert_close(NCE()(logits, labels), nce_loss(logits, labels).mean())
    torch.testing.assert_close(NFL(gamma=2.0)(logits, labels), nfl_loss(logits, labels, gamma=2.0).mean())
    torch.testing.assert_close(NFL(gamma=0.0)(logits, labels), NCE()(logits, labels))
    options = {"q": 0.3, "min_probability": 1e-2}
    torch.testing.assert_close(NGCE(**options)(logits, labels), ngce_loss(logits, labels, **options).mean())
    assert repr(NFL()) == "NFL(gamma=0.5, reduction='mean')"
    assert repr(NGCE()) == "NGCE(q=0.7, min_probability=0.0, reduction='mean')"
    with pytest.raises(ValueError, match="Expected `gamma`"):
        NFL(gamma=-1)
    with pytest.raises(ValueError, match="Expected `q`"):
        NGCE(q=0)
    with pytest.raises(ValueError, match="Expected `min_probability`"):
        NGCE(min_probability=2)
