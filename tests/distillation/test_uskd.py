"""USKD against a loop over samples, its options and its refusals."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.distillation import USKD, uskd_loss
from support.distillation_losses import labels, logits

CLASSES = 7


def loop(z, w, target, alpha=1.0, beta=0.1, mu=0.005, smoothing=0.1, log_ranks=True):
    """As the paper's equations are written, with what the code adds, sample by sample."""
    p, weak = z.softmax(1), w.softmax(1)
    batch, classes = z.shape
    squares = torch.tensor([float(p[i, target[i]].detach()) ** 2 for i in range(batch)], dtype=z.dtype)
    total = 0.0
    for i in range(batch):
        y = int(target[i])
        total = total - alpha * (squares[i] + 1 - squares.mean()) * p[i, y].log()
        seen = p[i].log() if log_ranks else p[i]
        score = weak[i] / (1 - weak[i, y] + 1e-6) + seen / (1 - seen[y] + 1e-6)
        order = score.detach().argsort(descending=True).tolist()
        values = {c: 1 / (order.index(c) + 1) for c in range(classes) if c != y}
        others = torch.tensor([c for c in range(classes) if c != y])
        hat = z[i, others].log_softmax(0)
        for place, c in enumerate(others.tolist()):
            total = total - beta * values[c] / sum(values.values()) * hat[place]
        smooth = torch.full((classes,), smoothing / classes, dtype=z.dtype)
        smooth[y] += 1 - smoothing
        total = total - mu * (smooth * weak[i].log()).sum()
    return total / batch


@pytest.mark.parametrize("log_ranks", [True, False])
@pytest.mark.parametrize("factors", [(1.0, 0.1, 0.005), (0.0, 2.0, 0.0), (0.1, 0.0, 3.0)])
def test_against_a_loop(factors, log_ranks):
    z, w, y = logits(0, 6, CLASSES).requires_grad_(), logits(1, 6, CLASSES).requires_grad_(), labels(2, CLASSES, 6)
    alpha, beta, mu = factors
    found = uskd_loss(z, w, y, alpha=alpha, beta=beta, mu=mu, label_smoothing=0.2, log_ranks=log_ranks)
    expected = loop(z, w, y, alpha, beta, mu, 0.2, log_ranks)
    torch.testing.assert_close(found, expected)


def test_factors_and_ranks_have_no_gradient():
    """With the factor held constant the label's term has the gradient of a weighted cross entropy."""
    z, w, y = logits(0, 6, CLASSES).requires_grad_(), logits(1, 6, CLASSES).requires_grad_(), labels(2, CLASSES, 6)
    p = z.detach().softmax(1).gather(1, y[:, None]).squeeze(1).square()
    expected = ((p + 1 - p.mean()) * F.cross_entropy(z, y, reduction="none")).mean()
    gradients = [
        torch.autograd.grad(loss, (z, w), allow_unused=True, materialize_grads=True)
        for loss in (uskd_loss(z, w, y, beta=0.0, mu=0.0), expected)
    ]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_order_of_log_probabilities_matters():
    z, w, y = logits(0, 6, CLASSES), logits(1, 6, CLASSES), labels(2, CLASSES, 6)
    assert uskd_loss(z, w, y, log_ranks=True) != uskd_loss(z, w, y, log_ranks=False)


def test_soft_labels_of_two_classes():
    """Each label has the share that it has; the classes are ranked without both."""
    z, w = logits(0, 4, CLASSES), logits(1, 4, CLASSES)
    y = torch.tensor([[0, 1], [2, 0], [5, 3], [4, 6]])
    share = torch.tensor([0.7, 0.6, 0.9, 0.55], dtype=z.dtype)
    target = torch.zeros_like(z).scatter(1, y, torch.stack([share, 1 - share], 1))
    p = z.softmax(1).gather(1, y)
    shares = torch.stack([share, 1 - share], 1)
    factor = p.square() + shares - p.square().mean(0)
    expected = -(factor * p.log()).sum(1).mean()
    torch.testing.assert_close(uskd_loss(z, w, target, beta=0.0, mu=0.0), expected)
    weak = F.cross_entropy(w, 0.9 * target + 0.1 / CLASSES)
    torch.testing.assert_close(uskd_loss(z, w, target, alpha=0.0, beta=0.0, mu=1.0), weak)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_and_certain_logits_are_finite(classes):
    z = (1e4 * F.one_hot(torch.arange(classes), classes).float()).requires_grad_()
    for target in (torch.arange(classes), (torch.arange(classes) + 1) % classes):
        loss = uskd_loss(z, z, target)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("feature", [(6, 5), (6, 3, 5), (6, 5, 2, 4)])
def test_the_weak_head_stands_on_the_mean_or_the_class_token(feature):
    loss = USKD("a", width=5, num_classes=CLASSES, mu=1.0)
    seen = logits(3, *feature, dtype=torch.float32)
    at = {2: seen, 3: seen[:, 0] if len(feature) == 3 else None, 4: seen.flatten(2).mean(2) if len(feature) == 4 else 0}
    z, y = logits(0, 6, CLASSES, dtype=torch.float32), labels(1, CLASSES, 6)
    expected = uskd_loss(z, loss.head(at[len(feature)]), y, mu=1.0)
    torch.testing.assert_close(loss(z, None, y, student_features=[seen]), expected)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: USKD("a", alpha=-1.0), r"Expected `alpha` to be a finite number >= 0 but got -1.0"),
        (lambda: USKD("a", beta=-1.0), r"Expected `beta` to be"),
        (lambda: USKD("a", mu=float("nan")), r"Expected `mu` to be"),
        (lambda: USKD("a", label_smoothing=1.5), r"Expected `label_smoothing` to be in \[0.0, 1.0\] but got 1.5"),
        (lambda: USKD("a", width=0), r"Expected `width` to be an integer >= 1 but got 0"),
        (lambda: USKD("a", width=3).build([None], [], None), r"USKD cannot read off how many classes the student has;"),
        (lambda: USKD("a").build([None], [], 3), r"USKD cannot read off how many channels.*'a' have; set `width`"),
        (
            lambda: USKD("a")(torch.zeros(2, 3), None, torch.zeros(2).long(), student_features=[torch.zeros(2, 4)]),
            r"The weak head of USKD is not built; set `width` and `num_classes`",
        ),
        (
            lambda: USKD("a", width=4, num_classes=3)(torch.zeros(2, 3), None, torch.zeros(2).long()),
            r"USKD compares the features of one layer but got 0; pass student_features",
        ),
        (lambda: USKD("a")(torch.zeros(2, 3), None), r"USKD needs the labels of the samples; pass `target`"),
        (lambda: uskd_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long()), r"of one shape \[B, C\] but"),
        (lambda: uskd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3).long()), r"class indices \[2\] or"),
        (lambda: uskd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 2)), r"class probabilities \[2, 3\] b"),
        (lambda: uskd_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2).long()), r"only 1 classes"),
        (lambda: uskd_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.eye(2)), r"Expected a class besides the labels"),
    ],
)
def test_refused(action, message):
    with pytest.raises(ValueError, match=message):
        action()
