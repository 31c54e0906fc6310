import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import Criterion, VSLoss, vs_logits, vs_loss

COUNTS = [500, 200, 80, 30, 1]
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def random_logits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def naive(logits, gamma, tau):
    total = sum(COUNTS)
    columns = [
        logits[:, k] / (max(COUNTS) / count) ** gamma + tau * math.log(count / total) for k, count in enumerate(COUNTS)
    ]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_equals_the_formula(gamma, tau):
    logits = random_logits()
    ours = vs_loss(logits, LABELS, torch.tensor(COUNTS), gamma=gamma, tau=tau)
    reference = F.cross_entropy(naive(logits, gamma, tau), LABELS)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits)[0] for loss in (ours, reference)), rtol=1e-12, atol=1e-15
    )


def test_the_largest_class_keeps_its_scale_and_rare_ones_shrink():
    adjusted = vs_logits(torch.ones(1, 5, dtype=torch.float64), torch.tensor(COUNTS), tau=0.0)
    assert adjusted[0, 0] == 1
    assert bool((adjusted[0].diff() < 0).all())


def test_without_strength_it_is_the_cross_entropy():
    logits = random_logits()
    torch.testing.assert_close(
        VSLoss(class_counts=COUNTS, gamma=0.0, tau=0.0)(logits, LABELS), F.cross_entropy(logits, LABELS)
    )


def test_soft_targets_and_options():
    logits, counts = random_logits(), torch.tensor(COUNTS)
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(vs_loss(logits, soft, counts), F.cross_entropy(naive(logits, 0.3, 1.0), soft))
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    ignoring = torch.tensor([0, 7, 2, 2, 7, 3])
    options = {"weight": weight, "ignore_index": 7, "label_smoothing": 0.1, "reduction": "none"}
    torch.testing.assert_close(
        vs_loss(logits, ignoring, counts, **options), F.cross_entropy(naive(logits, 0.3, 1.0), ignoring, **options)
    )


def test_dense_logits():
    logits, labels = torch.randn(2, 5, 3, dtype=torch.float64), torch.randint(5, (2, 3))
    counts = torch.tensor(COUNTS)
    rows = vs_loss(logits.movedim(1, 2).reshape(6, 5), labels.flatten(), counts)
    torch.testing.assert_close(vs_loss(logits, labels, counts), rows)


def test_half_precision_autocast_and_extreme_logits():
    logits = random_logits(torch.bfloat16)
    criterion = VSLoss(class_counts=COUNTS).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(logits, LABELS)
    assert loss.dtype == torch.float32
    expected = vs_loss(logits.float(), LABELS, torch.tensor(COUNTS))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    extreme = torch.tensor([[120.0, -120.0, 0.0, 0.0, 119.0]], requires_grad=True)
    criterion(extreme, torch.tensor([4])).backward()
    assert extreme.grad.isfinite().all()


def test_module_passes_every_argument():
    options = {"gamma": 0.5, "tau": 2.0, "label_smoothing": 0.2, "ignore_index": 2, "reduction": "sum"}
    weight = [0.5, 1.0, 2.0, 0.1, 3.0]
    module = VSLoss(class_counts=COUNTS, weight=weight, **options)
    logits = random_logits(torch.float32)
    assert isinstance(module, Criterion)
    assert torch.equal(
        module(logits, LABELS), vs_loss(logits, LABELS, torch.tensor(COUNTS), weight=torch.tensor(weight), **options)
    )
    assert not module.state_dict()
    assert repr(module) == "VSLoss(classes=5, gamma=0.5, tau=2.0, reduction='sum')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_counts": [3, 0]}, "Expected `class_counts` to be an integer >= 1 but got 0"),
        ({"class_counts": [3, 0.5]}, "Expected `class_counts` to be an integer >= 1 but got 0.5"),
        ({"gamma": -0.1}, "Expected `gamma`"),
        ({"tau": float("nan")}, "Expected `tau`"),
        ({"label_smoothing": 2.0}, "Expected `label_smoothing`"),
        ({"reduction": "?"}, "Expected `reduction`"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        VSLoss(**{"class_counts": COUNTS, **options})


def test_counts_must_fit_the_logits():
    with pytest.raises(ValueError, match=r"one entry per class of `logits` but got shape \(3,\) for logits of shape"):
        VSLoss(class_counts=[1, 2, 3])(random_logits(), LABELS)
    with pytest.raises(ValueError, match="one entry per class"):
        vs_logits(torch.zeros(3), torch.ones(3))
