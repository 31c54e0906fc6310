import math

import pytest
import torch
from torch.nn import functional as F

from lightning_robust.losses import ALDRKL, LDRKL, adapted_lambda, ldr_loss, ldr_scores

LABELS = torch.tensor([0, 3, 2, 2, 1, 3])
INDEX = torch.tensor([5, 1, 0, 7, 3, 2])


def random_logits(seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(6, 4, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def distances(scores, labels, margin):
    own = scores.gather(1, labels[:, None])
    return scores - own + margin * (1 - F.one_hot(labels, scores.shape[1]).to(scores))


def naive(scores, labels, lam, margin):
    """The value at the maximising weights, from the definition with its divergence from the uniform ones."""
    d = distances(scores, labels, margin)
    q = (d / lam).softmax(1).detach()  # the gradient at a maximum is that of its weights held fixed
    divergence = torch.special.xlogy(q, q).sum(1) + math.log(scores.shape[1])
    return (q * d).sum(1) - lam * divergence


@pytest.mark.parametrize("margin", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("lam", [0.01, 1.0, 10.0])
def test_equals_the_maximum_over_weights(lam, margin):
    scores = random_logits()
    ours, reference = ldr_loss(scores, LABELS, lam=lam, margin=margin), naive(scores, LABELS, lam, margin)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    gradients = (torch.autograd.grad(loss.sum(), scores)[0] for loss in (ours, reference))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_its_ends_are_the_hinge_the_mean_and_in_between_the_cross_entropy():
    scores = random_logits()
    d = distances(scores, LABELS, 1.0)
    torch.testing.assert_close(ldr_loss(scores, LABELS, lam=1e-6, margin=1.0), d.amax(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(ldr_loss(scores, LABELS, lam=1e7, margin=1.0), d.mean(1), rtol=0, atol=1e-5)
    cross_entropy = F.cross_entropy(scores, LABELS) - math.log(4)
    torch.testing.assert_close(LDRKL(lam=1.0, margin=0.0, normalize="none")(scores, LABELS), cross_entropy)


@pytest.mark.parametrize(
    "lam", [0.05, 1.0, torch.linspace(0.2, 5.0, 6, dtype=torch.float64)], ids=["small", "1", "each"]
)
def test_soft_targets_take_the_mean_over_their_classes(lam):
    scores = random_logits(scale=1.0)
    soft = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)
    hard = [ldr_loss(scores, torch.full_like(LABELS, k), lam=lam, margin=0.3) for k in range(4)]
    reference = (soft * torch.stack(hard, 1)).sum(1)
    ours = ldr_loss(scores, soft, lam=lam, margin=0.3)
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)
    gradients = (torch.autograd.grad(loss.sum(), scores)[0] for loss in (ours, reference))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_scores_are_the_published_ones():
    logits = random_logits()
    softplus = F.softplus(logits)
    torch.testing.assert_close(ldr_scores(logits), softplus / softplus.mean(1, keepdim=True))
    torch.testing.assert_close(ldr_scores(logits, "l1"), logits * 4 / logits.abs().sum(1, keepdim=True))
    assert ldr_scores(logits, "none") is logits


@pytest.mark.parametrize("level", [-39.0, -60.0, -120.0])
def test_rows_far_below_zero_keep_their_scores_and_gradients_in_float32(level):
    logits = (torch.tensor([[0.0, 1.0, -2.0]]) + level).requires_grad_()
    scores = ldr_scores(logits)
    wide = (torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64) + level).requires_grad_()
    expected = F.softplus(wide) / F.softplus(wide).mean(1, keepdim=True)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)
    ours, reference = torch.autograd.grad(scores[0, 1], logits)[0], torch.autograd.grad(expected[0, 1], wide)[0]
    torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-6)


def test_zero_logits_have_finite_gradients():
    logits = torch.zeros(2, 4, requires_grad=True)
    ALDRKL(num_samples=2)(logits, LABELS[:2], index=torch.tensor([0, 1])).backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("normalize", ["softplus", "l1", "none"])
def test_the_gradient_is_the_true_one(normalize):
    criterion = LDRKL(lam=0.5, normalize=normalize, reduction="none")
    assert torch.autograd.gradcheck(lambda z: criterion(z, LABELS), random_logits(scale=1.0))


def test_the_temperature_of_each_sample_follows_its_own_confidence():
    criterion = ALDRKL(lam0=2.0, alpha=3.0, margin=0.2, num_samples=8, reduction="none")
    lam = torch.full((8,), 2.0, dtype=torch.float64)
    for seed in range(3):
        logits = random_logits(seed)
        scores = logits * 4 / logits.abs().sum(1, keepdim=True)
        for row, i in enumerate(INDEX.tolist()):
            p = (scores[row].detach() / lam[i]).softmax(0) + 1e-5
            p = p / p.sum()
            lam[i] = 2.0 - 2.0 * (p * (4 * p).log()).sum() / (3.0 * math.log(4))
        own = lam[INDEX]
        reference = (
            torch.stack([naive(scores[i : i + 1], LABELS[i : i + 1], own[i], 0.2)[0] for i in range(6)])
            - 3.0 * math.log(4) / 4.0 * (own - 2.0) ** 2
        )
        ours = criterion(logits, LABELS, index=INDEX)
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(criterion.lambdas.rows, lam, rtol=1e-12, atol=0)


def test_temperatures_stay_above_zero_and_fall_with_confidence():
    scores = torch.tensor([[0.0, 0.0], [1.0, -1.0], [500.0, -500.0]])
    lam = adapted_lambda(scores, torch.full((3,), 1.0), lam0=1.0, alpha=1.1)
    assert lam[0] > lam[1] > lam[2] > 0


def test_twenty_one_thousand_classes():
    for criterion in (LDRKL(), ALDRKL(num_samples=4, normalize="softplus")):
        logits = torch.randn(4, 21_000, requires_grad=True)
        context = {"index": torch.arange(4)} if criterion.needs else {}
        loss = criterion(logits, torch.arange(4), **context)
        loss.backward()
        assert bool(loss.isfinite())
        assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LDRKL, {"lam": 0.0}, "`lam` to be a finite number > 0"),
        (LDRKL, {"margin": -0.1}, "`margin` to be a finite number >= 0"),
        (LDRKL, {"normalize": "l2"}, "`normalize` to be one of 'softplus', 'l1', 'none'"),
        (ALDRKL, {"lam0": -1.0}, "`lam0` to be a finite number > 0"),
        (ALDRKL, {"margin": -0.1}, "`margin` to be a finite number >= 0"),
        (ALDRKL, {"normalize": "l2"}, "`normalize` to be one of"),
        (ALDRKL, {"alpha": 1.0}, "`alpha` to be > 1 but got 1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_dense_logits_have_no_row_in_a_table():
    with pytest.raises(ValueError, match="ALDRKL remembers one row per sample"):
        ALDRKL(num_samples=6)(torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.long), index=INDEX[:2])
